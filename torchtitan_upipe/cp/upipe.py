"""UPipe: the attention layer walked through in chunks of heads (Untied Ulysses, arXiv 2602.21196, section 3).

One stage handles ``U`` query heads of the whole group: it projects them, exchanges, attends, exchanges back and adds
its share of the output projection. Memory grows with the chunk, not with the heads. Backward walks the same stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchtitan_upipe.cp.attention import SequenceAttention
from torchtitan_upipe.cp.collectives import HeadExchange
from torchtitan_upipe.cp.head_schedule import HeadSchedule
from torchtitan_upipe.cp.stage import KVBlock, LayerGradients, StageLayer, head_columns
from torchtitan_upipe.cp.strategy import AttentionWeights, HeadTransform
from torchtitan_upipe.kernels.contract import accumulate_dtype
from torchtitan_upipe.kernels.visibility import Documents
from torchtitan_upipe.memory.stash import Stash


class UPipe:
    """The method ``"upipe"`` of one attention layer.

    Args:
        schedule: which heads in which stage; ``schedule.degree`` must be ``exchange.size``.
        exchange: all-to-alls of the context-parallel group.
        attention: of this rank's heads over the sequence.
        keep_stash: keep every stage's ``o, lse`` until the backward pass has used them; else compute them again there.
    """

    def __init__(
        self, schedule: HeadSchedule, exchange: HeadExchange, attention: SequenceAttention, keep_stash: bool
    ) -> None:
        self.schedule = schedule
        self.exchange = exchange
        self.attention = attention
        self.keep_stash = keep_stash
        self._block_stash: Stash | None = None

    def __call__(
        self,
        x: Tensor,
        weights: AttentionWeights,
        transform: HeadTransform,
        head_dim: int,
        documents: Documents | None = None,
    ) -> Tensor:
        """See :class:`~torchtitan_upipe.cp.strategy.ContextParallelMethod`."""
        keep = self.keep_stash and torch.is_grad_enabled()
        stash = (self._block_stash or Stash()) if keep else None
        return _UPipeLayer.apply(self, stash, transform, head_dim, documents, x, *vars(weights).values())

    def layer(
        self,
        x: Tensor,
        weights: Sequence[Tensor | None],
        transform: HeadTransform,
        head_dim: int,
        documents: Documents | None,
    ) -> StageLayer:
        """The phases of this layer for tokens ``x [B, N, D]``; ``weights`` are the fields of ``AttentionWeights``."""
        return StageLayer(
            x,
            AttentionWeights(*weights),  # type: ignore[arg-type]
            transform,
            head_dim,
            documents,
            self.exchange,
            self.attention,
        )

    @contextmanager
    def using(self, stash: Stash) -> Iterator[None]:
        """Let the calls made meanwhile use ``stash``.

        Under activation checkpointing a block runs twice. Given the same stash both times, the second run finds there
        what the first has put, and computes neither attention nor exchange.
        """
        self._block_stash = stash
        try:
            yield
        finally:
            self._block_stash = None


class _UPipeLayer(torch.autograd.Function):
    """Forward and backward of the stage loop. The tensors after ``x`` are the fields of ``AttentionWeights``."""

    @staticmethod
    def forward(
        ctx: Any,
        upipe: UPipe,
        stash: Stash | None,
        transform: HeadTransform,
        head_dim: int,
        documents: Documents | None,
        x: Tensor,
        *weights: Tensor | None,
    ) -> Tensor:
        layer = upipe.layer(x, weights, transform, head_dim, documents)
        kv: dict[int, KVBlock] = {}
        y = torch.zeros_like(x, dtype=accumulate_dtype(x.dtype))

        for index, stage in enumerate(upipe.schedule.stages):
            stashed = None if stash is None else stash.get(index)
            if stashed is not None:  # the block's second run
                o, _ = stashed
            else:
                # project and exchange: k, v of a new KV set, then q
                if any(stage.fetch.counts):
                    kv[index] = layer.fetch_kv(stage)
                q, _ = layer.queries(stage)  # [B, Sq, u, d]

                # attention over the whole sequence
                o, lse = layer.attend(stage, q, kv)
                del q
                for block in stage.leave[upipe.exchange.rank]:
                    del kv[block]

                # exchange back, stash
                o = layer.to_sequence(stage, o)  # [B, N, U, d]
                if stash is not None:
                    stash.put(index, o, lse)
                del lse

            # project out: the stage's share of y
            columns = head_columns(layer.weights.wo, stage.queries.distinct, head_dim)
            y += F.linear(o.flatten(2), columns)  # [B, N, D]
            del o

        ctx.save_for_backward(x, *weights)
        ctx.upipe, ctx.stash, ctx.transform, ctx.head_dim, ctx.documents = upipe, stash, transform, head_dim, documents
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        x, *weights = ctx.saved_tensors
        upipe: UPipe = ctx.upipe
        exchange = upipe.exchange
        layer = upipe.layer(x, weights, ctx.transform, ctx.head_dim, ctx.documents)
        total = LayerGradients(x, layer.weights, ctx.head_dim)
        kv: dict[int, KVBlock] = {}

        for index, stage in enumerate(upipe.schedule.stages):
            heads = stage.queries.distinct

            # k, v of a new KV set, again
            if any(stage.fetch.counts):
                kv[index] = layer.fetch_kv(stage)

            # o and lse: from the stash, or attention again
            stashed = None if ctx.stash is None else ctx.stash.take(index)
            if stashed is not None:
                o_tokens, lse = stashed  # [B, N, U, d], [B, u, Sq]
                o = layer.to_heads(stage, o_tokens)  # [B, Sq, u, d]
                q, projected = None, None
            else:
                q, projected = layer.queries(stage)
                o, lse = layer.attend(stage, q, kv)
                o_tokens = layer.to_sequence(stage, o)

            # output projection
            total.add_output(heads, o_tokens, dy)
            del stashed, o_tokens
            do = (dy @ head_columns(layer.weights.wo, heads, ctx.head_dim)).unflatten(-1, (-1, ctx.head_dim))
            do = layer.to_heads(stage, do)  # [B, Sq, u, d]

            # attention
            if q is None:
                q, projected = layer.queries(stage)
            dq = layer.attend_backward(stage, do, q, kv, o, lse)
            del do, q, o, lse

            # query projection
            dq = layer.to_sequence(stage, dq)  # [B, N, U, d]
            dq, d_norm = layer.transform.vjp(dq, projected, layer.weights.q_norm)
            del projected
            total.add_projection("wq", heads, dq)
            total.add_norm("q_norm", d_norm)
            del dq

            # key and value projections, at the end of a KV set, one at a time
            if any(stage.release.counts):
                leaving = [kv.pop(block) for block in stage.leave[exchange.rank]]
                released = stage.release.distinct
                dk = layer.release(stage, [block.dk for block in leaving])  # [B, N, n, d]
                projected = None if layer.weights.k_norm is None else layer.project(layer.weights.wk, stage.release)
                dk, d_norm = layer.transform.vjp(dk, projected, layer.weights.k_norm)
                total.add_projection("wk", released, dk)
                total.add_norm("k_norm", d_norm)
                del dk, projected
                dv = layer.release(stage, [block.dv for block in leaving])
                total.add_projection("wv", released, dv)
                del dv, leaving

        weight_grads = [total.result(name) for name in vars(layer.weights)]
        return None, None, None, None, None, total.dx.to(x.dtype), *weight_grads
