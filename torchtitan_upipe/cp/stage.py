"""The phases of one stage. ``upipe.py`` puts them in order; ``gradients.py`` collects what backward yields."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_upipe.cp.attention import SequenceAttention
from torchtitan_upipe.cp.collectives import HeadExchange
from torchtitan_upipe.cp.head_schedule import HeadPlacement, KernelCall, Stage
from torchtitan_upipe.cp.segments import QueryRows
from torchtitan_upipe.cp.shards import join_queries, runs, split_keys, split_queries, sum_copies
from torchtitan_upipe.cp.strategy import AttentionWeights, HeadTransform
from torchtitan_upipe.kernels.contract import accumulate_dtype
from torchtitan_upipe.kernels.visibility import Documents, Interval
from torchtitan_upipe.tiled.rows import ALL_ROWS, Rows


@dataclass
class KVBlock:
    """KV heads that arrived together: ``k, v [B, S, g, d]`` and, in backward, the float32 sums of their gradients."""

    k: Tensor
    v: Tensor
    dk: Tensor | None = None
    dv: Tensor | None = None

    def gradients(self, heads: slice) -> tuple[Tensor, Tensor]:
        """The sums ``dk, dv [B, S, n, d]`` of ``heads``, to be added to."""
        if self.dk is None or self.dv is None:
            self.dk, self.dv = (torch.zeros_like(t, dtype=accumulate_dtype(t.dtype)) for t in (self.k, self.v))
        return self.dk[:, :, heads], self.dv[:, :, heads]


@dataclass(frozen=True)
class StageLayer:
    """One rank's attention layer, phase by phase.

    ``x [B, N, D]`` are the rows of this rank's tokens, on the device or on the host; ``weights`` have their dtype,
    ``head_dim`` is ``d``. A phase with a ``tile`` works on these ``n`` of the tokens. A rank's ``Sq`` query rows are
    the tile of the whole sequence, or its segment of that where ranks share a head.
    """

    x: Rows
    weights: AttentionWeights
    transform: HeadTransform
    head_dim: int
    documents: Documents | None
    exchange: HeadExchange
    attention: SequenceAttention

    def project(self, name: str, placement: HeadPlacement, rows: slice = ALL_ROWS) -> Tensor:
        """Project the placement's distinct heads by ``"q"``, ``"k"`` or ``"v"``: ``[B, n, h, d]``, part by part."""
        weight, bias = (getattr(self.weights, kind + name) for kind in "wb")
        weight_rows = head_rows(weight, placement.distinct, self.head_dim)
        bias_rows = None if bias is None else head_rows(bias, placement.distinct, self.head_dim)
        product = _by_parts(self.x, rows, lambda x: F.linear(x, weight_rows, bias_rows))
        return product.unflatten(-1, (-1, self.head_dim))

    def queries(self, stage: Stage, tile: Interval) -> tuple[Tensor, Tensor | None]:
        """Project, transform and exchange the stage's queries.

        Returns:
            ``q [B, Sq, u, d]`` of this rank, and the projection before the norm ``[B, n, U, d]`` where there is a norm.
        """
        rows = slice(*tile)
        projected = self.project("q", stage.queries, rows)
        q = self.transform.apply_(projected, self.weights.q_norm, rows)
        return self.to_heads(stage, tile, q), None if self.weights.q_norm is None else projected

    def fetch_kv(self, stage: Stage) -> KVBlock:
        """Project, transform and exchange the KV heads that arrive with this stage: ``k, v [B, S, g, d]``."""
        k = self.transform.apply_(self.project("k", stage.fetch), self.weights.k_norm, ALL_ROWS)
        k = self.exchange.to_heads(split_keys(k, stage.fetch))
        v = self.exchange.to_heads(split_keys(self.project("v", stage.fetch), stage.fetch))
        return KVBlock(k, v)

    def attend(self, stage: Stage, tile: Interval, q: Tensor, kv: dict[int, KVBlock]) -> tuple[Tensor, Tensor]:
        """Causal attention of this rank's heads: ``o [B, Sq, u, d]``, ``lse [B, u, Sq]``."""
        options = self._options(stage, tile)
        parts = [
            self.attention.forward(q[:, :, queries], block.k[:, :, keys], block.v[:, :, keys], **options)
            for queries, keys, block in self._calls(stage, kv)
        ]
        if len(parts) == 1:
            return parts[0]
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, dim=2), torch.cat(lses, dim=1)

    def attend_backward(
        self, stage: Stage, tile: Interval, do: Tensor, q: Tensor, kv: dict[int, KVBlock], o: Tensor, lse: Tensor
    ) -> Tensor:
        """``dq [B, Sq, u, d]``; ``dk`` and ``dv`` are added to the blocks of ``kv``."""
        parts = []
        for queries, keys, block in self._calls(stage, kv):
            dq, _, _ = self.attention.backward(
                do[:, :, queries],
                q[:, :, queries],
                block.k[:, :, keys],
                block.v[:, :, keys],
                o[:, :, queries],
                lse[:, queries],
                into=block.gradients(keys),
                **self._options(stage, tile),
            )
            parts.append(dq.to(q.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def to_heads(self, stage: Stage, tile: Interval, tokens: Tensor) -> Tensor:
        """Exchange what belongs to the stage's queries: ``[B, n, U, d]`` to ``[B, Sq, u, d]``."""
        rows, rank = self._rows(stage, tile), self.exchange.rank
        from_shards = [rows.count(rank, shard) for shard in range(self.exchange.size)]
        return self.exchange.to_heads(split_queries(tokens, stage.queries, rows, rank), from_shards)

    def to_sequence(self, stage: Stage, tile: Interval, heads: Tensor) -> Tensor:
        """The inverse of :meth:`to_heads`: ``[B, Sq, u, d]`` to ``[B, n, U, d]``."""
        rows, rank, ranks = self._rows(stage, tile), self.exchange.rank, range(self.exchange.size)
        pieces = self.exchange.to_sequence(
            heads, stage.queries.counts, [rows.count(rank, r) for r in ranks], [rows.count(r, rank) for r in ranks]
        )
        return join_queries(pieces, stage.queries, rows, rank)

    def output_gradient(self, stage: Stage, tile: Interval, dy: Rows) -> Tensor:
        """Gradient of the stage's outputs, exchanged: ``dy [B, N, D]`` to ``do [B, Sq, u, d]``."""
        columns = head_columns(self.weights.wo, stage.queries.distinct, self.head_dim)
        do = _by_parts(dy, slice(*tile), lambda dy: dy @ columns)
        return self.to_heads(stage, tile, do.unflatten(-1, (-1, self.head_dim)))

    def release(self, stage: Stage, leaving: list[Tensor]) -> Tensor:
        """Send ``dk`` (or ``dv``) of this rank's leaving blocks back to the tokens' owners.

        Args:
            leaving: ``[B, S, g, d]`` of each block that leaves this rank; the list is emptied.

        Returns:
            ``[B, N, n, d]`` for the ``n`` distinct heads of ``stage.release``, the copies of several ranks summed.
        """
        heads = [leaving.pop(0).to(self.x.dtype) for _ in range(len(leaving))]
        if not heads:  # other ranks release now, this one does not
            batch, tokens, _ = self.x.shape
            heads = [self.weights.wk.new_empty(batch, tokens * self.exchange.size, 0, self.head_dim)]
        sent = heads[0] if len(heads) == 1 else torch.cat(heads, dim=2)
        return sum_copies(self.exchange.to_sequence(sent, stage.release.counts), stage.release)

    def _rows(self, stage: Stage, tile: Interval) -> QueryRows:
        return stage.rows(self.x.shape[1], tile)

    def _options(self, stage: Stage, tile: Interval) -> dict[str, Any]:
        rows = self._rows(stage, tile).computed_by(self.exchange.rank)
        return {"scale": self.head_dim**-0.5, "rows": rows, "documents": self.documents}

    def _calls(self, stage: Stage, kv: dict[int, KVBlock]) -> Iterator[tuple[slice, slice, KVBlock]]:
        calls: tuple[KernelCall, ...] = stage.calls[self.exchange.rank]
        return ((slice(*call.queries), slice(*call.keys), kv[call.block]) for call in calls)


def _by_parts(rows: Rows, wanted: slice, product: Callable[[Tensor], Tensor]) -> Tensor:
    """``product`` of the rows ``wanted``, ``[B, n, ...]``: of one part after the other."""
    parts = rows.parts(wanted)
    results = map(product, rows.read(parts))
    if len(parts) == 1:
        return next(results)
    first = next(results)
    joined = first.new_empty(first.shape[0], parts[-1].stop - parts[0].start, *first.shape[2:])
    for at, result in zip(parts, chain([first], results), strict=True):
        joined[:, at.start - parts[0].start : at.stop - parts[0].start] = result
    return joined


def head_rows(weight: Tensor, heads: Sequence[int], head_dim: int) -> Tensor:
    """Rows ``[n*d, D]`` of ``heads`` in ``weight [H*d, D]``, or of a bias; a view where the heads are consecutive."""
    by_head = weight.unflatten(0, (-1, head_dim))  # [H, d, D]
    parts = [by_head[target] for _, target in runs(heads)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(0, 1)


def head_columns(weight: Tensor, heads: Sequence[int], head_dim: int) -> Tensor:
    """Columns ``[D, n*d]`` of ``heads`` in ``weight [D, H*d]``; a view where the heads are consecutive."""
    parts = [weight[:, target.start * head_dim : target.stop * head_dim] for _, target in runs(heads)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
