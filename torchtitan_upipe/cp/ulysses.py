"""Ulysses: all heads at once, in ordinary autograd (arXiv 2309.14509)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_upipe.cp.attention import SequenceAttention, differentiable_attention
from torchtitan_upipe.cp.collectives import HeadExchange, differentiable_to_heads, differentiable_to_sequence
from torchtitan_upipe.cp.head_schedule import HeadPlacement, Stage, build_head_schedule
from torchtitan_upipe.cp.shards import join_queries, select_heads, split_keys, split_queries
from torchtitan_upipe.cp.strategy import AttentionWeights, HeadTransform
from torchtitan_upipe.kernels.visibility import Documents


class Ulysses:
    """The layer that people compare against: one exchange of all heads, one attention, one exchange back.

    Its layout is the single stage of the schedule with ``U = H``; where the ranks do not divide the heads, further
    stages follow for those left over, all held by autograd. With fewer KV heads than ranks each rank is sent its own
    copy, and autograd sums the copies' gradients.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, exchange: HeadExchange, attention: SequenceAttention) -> None:
        self.schedule = build_head_schedule(num_heads, num_kv_heads, exchange.size, num_heads)
        self.exchange = exchange
        self.attention = attention

    def __call__(
        self,
        x: Tensor,
        weights: AttentionWeights,
        transform: HeadTransform,
        head_dim: int,
        documents: Documents | None = None,
    ) -> Tensor:
        """See :class:`~torchtitan_upipe.cp.strategy.ContextParallelMethod`."""
        # project all heads of this rank's tokens
        q = transform(F.linear(x, weights.wq).unflatten(-1, (-1, head_dim)), weights.q_norm)  # [B, N, H, d]
        k = transform(F.linear(x, weights.wk).unflatten(-1, (-1, head_dim)), weights.k_norm)  # [B, N, G, d]
        v = F.linear(x, weights.wv).unflatten(-1, (-1, head_dim))

        outs = []
        kv: dict[int, tuple[Tensor, Tensor]] = {}
        for index, stage in enumerate(self.schedule.stages):
            # exchange: sequence shards to head shards
            if any(stage.fetch.counts):
                kv[index] = self._keys(k, stage.fetch), self._keys(v, stage.fetch)  # [B, S, G/C, d]
            outs.append(self._attend(select_heads(q, stage.queries.distinct), kv, stage, head_dim, documents))

        o = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)  # [B, N, H, d]
        return F.linear(o.flatten(2), weights.wo)

    def _attend(
        self,
        q: Tensor,
        kv: dict[int, tuple[Tensor, Tensor]],
        stage: Stage,
        head_dim: int,
        documents: Documents | None,
    ) -> Tensor:
        """The stage's heads of this rank's tokens, ``q [B, N, U, d]``, to their attention output, alike."""
        rank, ranks, rows = self.exchange.rank, range(self.exchange.size), stage.rows(q.shape[1])
        from_shards = [rows.count(rank, r) for r in ranks]
        q = differentiable_to_heads(
            self.exchange, split_queries(q, stage.queries, rows, rank), from_shards
        )  # [B, Sq, H/C, d]

        # attention over the whole sequence
        options = {"scale": head_dim**-0.5, "rows": rows.computed_by(rank), "documents": documents}
        outs = [
            differentiable_attention(
                self.attention,
                q[:, :, slice(*call.queries)],
                kv[call.block][0][:, :, slice(*call.keys)],
                kv[call.block][1][:, :, slice(*call.keys)],
                **options,
            )
            for call in stage.calls[rank]
        ]
        o = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)  # [B, Sq, H/C, d]

        # exchange back
        to_shard = [rows.count(r, rank) for r in ranks]
        pieces = differentiable_to_sequence(self.exchange, o, stage.queries.counts, from_shards, to_shard)
        return join_queries(pieces, stage.queries, rows, rank)  # [B, N, H, d]

    def _keys(self, heads: Tensor, placement: HeadPlacement) -> Tensor:
        pieces = split_keys(select_heads(heads, placement.distinct), placement)
        return differentiable_to_heads(self.exchange, pieces, [heads.shape[1]] * self.exchange.size)
