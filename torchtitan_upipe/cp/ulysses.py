"""Ulysses: all heads at once, in ordinary autograd (arXiv 2309.14509)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_upipe.cp.attention import SequenceAttention, differentiable_attention
from torchtitan_upipe.cp.collectives import HeadExchange, differentiable_to_heads, differentiable_to_sequence
from torchtitan_upipe.cp.head_schedule import Stage, build_head_schedule
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
        q = transform(F.linear(x, weights.wq, weights.bq).unflatten(-1, (-1, head_dim)), weights.q_norm)  # [B, N, H, d]
        k = transform(F.linear(x, weights.wk, weights.bk).unflatten(-1, (-1, head_dim)), weights.k_norm)  # [B, N, G, d]
        v = F.linear(x, weights.wv, weights.bv).unflatten(-1, (-1, head_dim))

        # exchange: sequence shards to head shards
        keys, values = self._exchange_keys(k), self._exchange_keys(v)  # [B, S, G/C, d]
        outs = [
            self._attend(select_heads(q, stage.queries.distinct), keys, values, stage, head_dim, documents)
            for stage in self.schedule.stages
        ]
        o = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)  # [B, N, H, d]
        return F.linear(o.flatten(2), weights.wo)

    def _attend(
        self,
        q: Tensor,
        keys: dict[int, Tensor],
        values: dict[int, Tensor],
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
                keys[call.block][:, :, slice(*call.keys)],
                values[call.block][:, :, slice(*call.keys)],
                **options,
            )
            for call in stage.calls[rank]
        ]
        o = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)  # [B, Sq, H/C, d]

        # exchange back
        to_shard = [rows.count(r, rank) for r in ranks]
        pieces = differentiable_to_sequence(self.exchange, o, stage.queries.counts, from_shards, to_shard)
        return join_queries(pieces, stage.queries, rows, rank)  # [B, N, H, d]

    def _exchange_keys(self, heads: Tensor) -> dict[int, Tensor]:
        """The KV heads ``[B, N, G, d]`` of this rank's tokens to each stage's blocks ``[B, S, g, d]`` on this rank.

        A rank may be sent nothing for one of the stages. The blocks are joined and cut again so that autograd walks
        back through every exchange on every rank.
        """
        rows = [heads.shape[1]] * self.exchange.size
        fetches = {i: stage.fetch for i, stage in enumerate(self.schedule.stages) if any(stage.fetch.counts)}
        blocks = [
            differentiable_to_heads(self.exchange, split_keys(select_heads(heads, fetch.distinct), fetch), rows)
            for fetch in fetches.values()
        ]
        if len(blocks) > 1:
            blocks = list(torch.cat(blocks, dim=2).split([block.shape[2] for block in blocks], dim=2))
        return dict(zip(fetches, blocks, strict=True))
