"""The phases of one stage, and where its gradients go. ``upipe.py`` puts them in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_upipe.cp.attention import SequenceAttention
from torchtitan_upipe.cp.collectives import HeadExchange
from torchtitan_upipe.cp.head_schedule import HeadPlacement, KernelCall, Stage
from torchtitan_upipe.cp.shards import join_queries, runs, split_keys, split_queries, sum_copies
from torchtitan_upipe.cp.strategy import AttentionWeights, HeadTransform
from torchtitan_upipe.kernels.contract import accumulate_dtype
from torchtitan_upipe.kernels.visibility import Documents


@dataclass
class KVBlock:
    """KV heads that arrived together: ``k, v [B, S, g, d]`` and, in backward, the running sums of their gradients."""

    k: Tensor
    v: Tensor
    dk: Tensor | None = None
    dv: Tensor | None = None

    def add_gradients(self, heads: slice, dk: Tensor, dv: Tensor) -> None:
        """Add ``dk, dv [B, S, n, d]`` of one call; sums over several calls are kept in float32."""
        if self.dk is None or self.dv is None:
            if dk.shape == self.k.shape:
                self.dk, self.dv = dk, dv
                return
            self.dk, self.dv = (torch.zeros_like(t, dtype=accumulate_dtype(t.dtype)) for t in (self.k, self.v))
        wide = accumulate_dtype(self.dk.dtype)
        if self.dk.dtype != wide:
            self.dk, self.dv = self.dk.to(wide), self.dv.to(wide)
        self.dk[:, :, heads] += dk
        self.dv[:, :, heads] += dv


@dataclass(frozen=True)
class StageLayer:
    """One rank's attention layer, phase by phase.

    ``x [B, N, D]`` are this rank's tokens, ``weights`` have the dtype of ``x``, ``head_dim`` is ``d``. A rank's ``Sq``
    query rows are the whole sequence, or its segment of it where ranks share a head.
    """

    x: Tensor
    weights: AttentionWeights
    transform: HeadTransform
    head_dim: int
    documents: Documents | None
    exchange: HeadExchange
    attention: SequenceAttention

    def project(self, weight: Tensor, placement: HeadPlacement) -> Tensor:
        """Project the placement's distinct heads: ``[B, N, n, d]`` in one matrix product."""
        rows = head_rows(weight, placement.distinct, self.head_dim)
        return F.linear(self.x, rows).unflatten(-1, (-1, self.head_dim))

    def queries(self, stage: Stage) -> tuple[Tensor, Tensor | None]:
        """Project, transform and exchange the stage's queries.

        Returns:
            ``q [B, Sq, u, d]`` of this rank, and the projection before the norm ``[B, N, U, d]`` where there is a norm.
        """
        projected = self.project(self.weights.wq, stage.queries)
        q = self.transform(projected, self.weights.q_norm)
        return self.to_heads(stage, q), None if self.weights.q_norm is None else projected

    def fetch_kv(self, stage: Stage) -> KVBlock:
        """Project, transform and exchange the KV heads that arrive with this stage: ``k, v [B, S, g, d]``."""
        k = self.transform(self.project(self.weights.wk, stage.fetch), self.weights.k_norm)
        k = self.exchange.to_heads(split_keys(k, stage.fetch))
        v = self.exchange.to_heads(split_keys(self.project(self.weights.wv, stage.fetch), stage.fetch))
        return KVBlock(k, v)

    def attend(self, stage: Stage, q: Tensor, kv: dict[int, KVBlock]) -> tuple[Tensor, Tensor]:
        """Causal attention of this rank's heads: ``o [B, Sq, u, d]``, ``lse [B, u, Sq]``."""
        parts = [
            self.attention.forward(q[:, :, queries], block.k[:, :, keys], block.v[:, :, keys], **self._options(stage))
            for queries, keys, block in self._calls(stage, kv)
        ]
        if len(parts) == 1:
            return parts[0]
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, dim=2), torch.cat(lses, dim=1)

    def attend_backward(
        self, stage: Stage, do: Tensor, q: Tensor, kv: dict[int, KVBlock], o: Tensor, lse: Tensor
    ) -> Tensor:
        """``dq [B, Sq, u, d]``; ``dk`` and ``dv`` are added to the blocks of ``kv``."""
        parts = []
        for queries, keys, block in self._calls(stage, kv):
            dq, dk, dv = self.attention.backward(
                do[:, :, queries],
                q[:, :, queries],
                block.k[:, :, keys],
                block.v[:, :, keys],
                o[:, :, queries],
                lse[:, queries],
                **self._options(stage),
            )
            block.add_gradients(keys, dk, dv)
            parts.append(dq.to(q.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def to_heads(self, stage: Stage, tokens: Tensor) -> Tensor:
        """Exchange what belongs to the stage's queries: ``[B, N, U, d]`` to ``[B, Sq, u, d]``."""
        rows, rank = stage.rows(self.x.shape[1]), self.exchange.rank
        from_shards = [rows.count(rank, shard) for shard in range(self.exchange.size)]
        return self.exchange.to_heads(split_queries(tokens, stage.queries, rows, rank), from_shards)

    def to_sequence(self, stage: Stage, heads: Tensor) -> Tensor:
        """The inverse of :meth:`to_heads`: ``[B, Sq, u, d]`` to ``[B, N, U, d]``."""
        rows, rank, ranks = stage.rows(self.x.shape[1]), self.exchange.rank, range(self.exchange.size)
        pieces = self.exchange.to_sequence(
            heads, stage.queries.counts, [rows.count(rank, r) for r in ranks], [rows.count(r, rank) for r in ranks]
        )
        return join_queries(pieces, stage.queries, rows, rank)

    def release(self, stage: Stage, grads: Sequence[Tensor | None]) -> Tensor:
        """Send ``dk`` (or ``dv``) of this rank's leaving blocks back to the tokens' owners.

        Args:
            grads: ``[B, S, g, d]`` of each block that leaves this rank.

        Returns:
            ``[B, N, n, d]`` for the ``n`` distinct heads of ``stage.release``, the copies of several ranks summed.
        """
        heads = [grad.to(self.x.dtype) for grad in grads if grad is not None]
        if not heads:  # other ranks release now, this one does not
            batch, tokens, _ = self.x.shape
            heads = [self.x.new_empty(batch, tokens * self.exchange.size, 0, self.head_dim)]
        sent = heads[0] if len(heads) == 1 else torch.cat(heads, dim=2)
        return sum_copies(self.exchange.to_sequence(sent, stage.release.counts), stage.release)

    def _options(self, stage: Stage) -> dict[str, Any]:
        rows = stage.rows(self.x.shape[1]).computed_by(self.exchange.rank)
        return {"scale": self.head_dim**-0.5, "rows": rows, "documents": self.documents}

    def _calls(self, stage: Stage, kv: dict[int, KVBlock]) -> Iterator[tuple[slice, slice, KVBlock]]:
        calls: tuple[KernelCall, ...] = stage.calls[self.exchange.rank]
        return ((slice(*call.queries), slice(*call.keys), kv[call.block]) for call in calls)


class LayerGradients:
    """Gradients of ``x`` and of the weights, collected stage by stage.

    ``dx`` sums one term per projection and stage, so it is kept in float32 and rounded once: chained roundings in
    bfloat16 grow with the number of stages. Rows of the weight gradients are written where they belong.
    """

    def __init__(self, x: Tensor, weights: AttentionWeights, head_dim: int) -> None:
        self.x = x
        self.weights = weights
        self.head_dim = head_dim
        self.dx = torch.zeros_like(x, dtype=accumulate_dtype(x.dtype))
        self.weight_grads = {
            name: torch.zeros_like(weight, dtype=accumulate_dtype(weight.dtype) if "norm" in name else weight.dtype)
            for name, weight in vars(weights).items()
            if weight is not None
        }

    def add_projection(self, name: str, heads: Sequence[int], grad: Tensor) -> None:
        """``grad [B, N, n, d]`` of the projection ``name`` (``"wq"``, ``"wk"``, ``"wv"``) of ``heads``."""
        flat = grad.flatten(0, 1).flatten(1)  # [B*N, n*d]
        rows = head_rows(getattr(self.weights, name), heads, self.head_dim)
        d_rows = (flat.t() @ self.x.flatten(0, 1)).unflatten(0, (-1, self.head_dim))  # [n, d, D]
        d_weight = self.weight_grads[name].unflatten(0, (-1, self.head_dim))  # [H, d, D], a view
        for source, target in runs(heads):
            d_weight[target] += d_rows[source]
        self.dx += (flat @ rows).view_as(self.dx)

    def add_output(self, heads: Sequence[int], o: Tensor, dy: Tensor) -> None:
        """The columns of ``dWo`` of ``heads``, from ``o [B, N, n, d]`` and ``dy [B, N, D]``."""
        d_columns = (dy.flatten(0, 1).t() @ o.flatten(0, 1).flatten(1)).unflatten(1, (-1, self.head_dim))
        d_weight = self.weight_grads["wo"].unflatten(1, (-1, self.head_dim))  # [D, H, d], a view
        for source, target in runs(heads):
            d_weight[:, target] = d_columns[:, source]

    def add_norm(self, name: str, grad: Tensor | None) -> None:
        """``grad [d]`` of ``q_norm`` or ``k_norm``, or None where the model has none."""
        if grad is not None:
            self.weight_grads[name] += grad

    def result(self, name: str) -> Tensor | None:
        """The gradient of weight ``name`` in its dtype, or None where the model has no such weight."""
        grad = self.weight_grads.get(name)
        return None if grad is None else grad.to(getattr(self.weights, name).dtype)


def head_rows(weight: Tensor, heads: Sequence[int], head_dim: int) -> Tensor:
    """Rows ``[n*d, D]`` of ``heads`` in ``weight [H*d, D]``; a view where the heads are consecutive."""
    by_head = weight.unflatten(0, (-1, head_dim))  # [H, d, D]
    parts = [by_head[target] for _, target in runs(heads)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(0, 1)


def head_columns(weight: Tensor, heads: Sequence[int], head_dim: int) -> Tensor:
    """Columns ``[D, n*d]`` of ``heads`` in ``weight [D, H*d]``; a view where the heads are consecutive."""
    parts = [weight[:, target.start * head_dim : target.stop * head_dim] for _, target in runs(heads)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
