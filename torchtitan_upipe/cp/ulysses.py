"""Ulysses: all heads at once, in ordinary autograd (arXiv 2309.14509)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_upipe.cp.collectives import HeadExchange, differentiable_to_heads, differentiable_to_sequence
from torchtitan_upipe.cp.head_schedule import build_head_schedule
from torchtitan_upipe.cp.strategy import AttentionWeights, HeadTransform, split_by_rank
from torchtitan_upipe.kernels.contract import AttentionKernel, differentiable_attention


class Ulysses:
    """The layer that people compare against: one exchange of all heads, one attention, one exchange back.

    Its layout is the single stage of the schedule with ``U = H``. With fewer KV heads than ranks each rank is sent its
    own copy, and autograd sums the copies' gradients.

    Raises:
        ValueError: the number of query heads is not a multiple of the number of ranks.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, exchange: HeadExchange, kernel: AttentionKernel) -> None:
        self.stage = build_head_schedule(num_heads, num_kv_heads, exchange.size, num_heads).stages[0]
        self.exchange = exchange
        self.kernel = kernel

    def __call__(self, x: Tensor, weights: AttentionWeights, transform: HeadTransform, head_dim: int) -> Tensor:
        """See :class:`~torchtitan_upipe.cp.strategy.ContextParallelMethod`."""
        # project all heads of this rank's tokens
        q = transform(F.linear(x, weights.wq).unflatten(-1, (-1, head_dim)), weights.q_norm)  # [B, N, H, d]
        k = transform(F.linear(x, weights.wk).unflatten(-1, (-1, head_dim)), weights.k_norm)  # [B, N, G, d]
        v = F.linear(x, weights.wv).unflatten(-1, (-1, head_dim))

        # exchange: sequence shards to head shards
        q = differentiable_to_heads(self.exchange, split_by_rank(q, self.stage.queries))  # [B, S, H/C, d]
        k = differentiable_to_heads(self.exchange, split_by_rank(k, self.stage.fetch))
        v = differentiable_to_heads(self.exchange, split_by_rank(v, self.stage.fetch))

        # attention over the whole sequence
        scale = head_dim**-0.5
        outs = [
            differentiable_attention(
                self.kernel,
                q[:, :, slice(*call.queries)],
                k[:, :, slice(*call.keys)],
                v[:, :, slice(*call.keys)],
                scale=scale,
                causal=True,
            )
            for call in self.stage.calls[self.exchange.rank]
        ]
        o = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)  # [B, S, H/C, d]

        # exchange back, project out
        pieces = differentiable_to_sequence(self.exchange, o, self.stage.queries.counts)
        o = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)  # [B, N, H, d]
        return F.linear(o.flatten(2), weights.wo)
