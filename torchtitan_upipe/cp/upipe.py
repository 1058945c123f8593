"""UPipe: the attention layer walked through in chunks of heads (Untied Ulysses, arXiv 2602.21196, section 3).

One stage handles ``U`` query heads of the whole group: it projects them, exchanges, attends and exchanges back. Memory
grows with the chunk, not with the heads. Backward walks the same stages. Within a stage the queries may be walked
through in tiles, against the same keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchtitan_upipe.cp.attention import SequenceAttention
from torchtitan_upipe.cp.collectives import HeadExchange
from torchtitan_upipe.cp.gradients import LayerGradients, project_out
from torchtitan_upipe.cp.head_schedule import HeadSchedule
from torchtitan_upipe.cp.segments import query_tiles
from torchtitan_upipe.cp.stage import KVBlock, StageLayer
from torchtitan_upipe.cp.stashing import StashingMethod
from torchtitan_upipe.cp.strategy import AttentionWeights, HeadTransform
from torchtitan_upipe.kernels.visibility import Documents
from torchtitan_upipe.stash.stash import Stash


class UPipe(StashingMethod):
    """The method ``"upipe"`` of one attention layer.

    Args:
        schedule: which heads in which stage; ``schedule.degree`` must be ``exchange.size``.
        exchange: all-to-alls of the context-parallel group.
        attention: of this rank's heads over the sequence.
        new_stash: makes what keeps every stage's ``o, lse`` until the backward pass has used them; None to compute
            them again there.
        tiles: slices of the queries in each stage.
    """

    def __init__(
        self,
        schedule: HeadSchedule,
        exchange: HeadExchange,
        attention: SequenceAttention,
        new_stash: Callable[[], Stash] | None,
        tiles: int = 1,
    ) -> None:
        super().__init__(new_stash)
        self.schedule = schedule
        self.exchange = exchange
        self.attention = attention
        self.tiles = tiles

    def __call__(
        self,
        x: Tensor,
        weights: AttentionWeights,
        transform: HeadTransform,
        head_dim: int,
        documents: Documents | None = None,
    ) -> Tensor:
        """See :class:`~torchtitan_upipe.cp.strategy.ContextParallelMethod`."""
        stash, fill = self.stash_of_call()
        return _UPipeLayer.apply(self, stash, fill, transform, head_dim, documents, x, *vars(weights).values())

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


class _UPipeLayer(torch.autograd.Function):
    """Forward and backward of the stage loop. The tensors after ``x`` are the fields of ``AttentionWeights``."""

    @staticmethod
    def forward(
        ctx: Any,
        upipe: UPipe,
        stash: Stash,
        fill: bool,
        transform: HeadTransform,
        head_dim: int,
        documents: Documents | None,
        x: Tensor,
        *weights: Tensor | None,
    ) -> Tensor:
        layer = upipe.layer(x, weights, transform, head_dim, documents)
        tiles = query_tiles(x.shape[1], upipe.tiles)
        outputs = stash if fill else Stash()
        kv: dict[int, KVBlock] = {}

        stages = () if outputs.complete else upipe.schedule.stages  # complete: the block's second run
        for index, stage in enumerate(stages):
            # project and exchange: k, v of a new KV set
            if any(stage.fetch.counts):
                kv[index] = layer.fetch_kv(stage)

            for t, tile in enumerate(tiles):
                # project and exchange: q
                q = layer.queries(stage, tile)[0]  # [B, Sq, u, d]

                # attention over the whole sequence
                o, lse = layer.attend(stage, tile, q, kv)
                del q

                # exchange back, stash
                o = layer.to_sequence(stage, tile, o)  # [B, n, U, d]
                outputs.put((index, t), o, lse)
                del o, lse

            for block in stage.leave[upipe.exchange.rank]:
                del kv[block]
        outputs.settle()
        outputs.complete = True

        ctx.save_for_backward(x, *weights)
        ctx.upipe, ctx.stash, ctx.transform, ctx.head_dim, ctx.documents = upipe, stash, transform, head_dim, documents
        # project out: all stages' heads
        return project_out(outputs, upipe.schedule, tiles, x, layer.weights.wo)  # [B, N, D]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        x, *weights = ctx.saved_tensors
        upipe: UPipe = ctx.upipe
        stash: Stash = ctx.stash
        layer = upipe.layer(x, weights, ctx.transform, ctx.head_dim, ctx.documents)
        tiles = query_tiles(x.shape[1], upipe.tiles)
        total = LayerGradients(x, layer.weights, ctx.head_dim, stash.put_away)
        kv: dict[int, KVBlock] = {}

        for index, stage in enumerate(upipe.schedule.stages):
            heads = stage.queries.distinct

            # k, v of a new KV set, again
            if any(stage.fetch.counts):
                kv[index] = layer.fetch_kv(stage)

            parts = []
            for t, tile in enumerate(tiles):
                rows = slice(*tile)
                # o and lse: from the stash, or attention again
                stashed = stash.take((index, t))
                if stashed is not None:
                    o_tokens, lse = stashed  # [B, n, U, d], [B, u, Sq]
                    o = layer.to_heads(stage, tile, o_tokens)  # [B, Sq, u, d]
                    q, projected = None, None
                else:
                    q, projected = layer.queries(stage, tile)
                    o, lse = layer.attend(stage, tile, q, kv)
                    o_tokens = layer.to_sequence(stage, tile, o)

                # output projection
                total.add_output(heads, o_tokens, dy[:, rows])
                del stashed, o_tokens
                do = layer.output_gradient(stage, tile, dy)  # [B, Sq, u, d]

                # attention
                if q is None:
                    q, projected = layer.queries(stage, tile)
                total.settle()
                dq_heads = layer.attend_backward(stage, tile, do, q, kv, o, lse)
                del do, q, o, lse
                stash.fetch((index, t + 1) if t + 1 < len(tiles) else (index + 1, 0))

                # exchange back, undo rope and norm
                dq = layer.to_sequence(stage, tile, dq_heads)  # [B, n, U, d]
                del dq_heads
                dq, d_norm = layer.transform.vjp_(dq, projected, layer.weights.q_norm, rows)
                total.add_norm("q_norm", d_norm)
                parts.append(dq)
                del dq, projected

            # query projection
            dq = parts.pop() if len(parts) == 1 else torch.cat(parts, dim=1)  # [B, N, U, d]
            parts.clear()
            total.add_projection("wq", heads, dq)
            del dq

            # key and value projections, at the end of a KV set, one at a time
            total.add_keys(layer, stage, kv)

        dx = total.input()
        return None, None, None, None, None, None, dx, *(total.weight(name) for name in vars(layer.weights))
