"""Ring attention: queries stay, keys and values travel (arXiv 2310.01889), with balanced causal work.

Tokens are sharded zigzag (TorchTitan's "headtail"): of ``2*C`` chunks of the sequence, rank ``r`` holds chunks ``r``
and ``2*C - 1 - r``, in that order. From whatever rank keys come, half of all (query, key) pairs are visible.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchtitan_upipe.cp.collectives import RingExchange
from torchtitan_upipe.cp.strategy import AttentionWeights, HeadTransform, accumulate_dtype
from torchtitan_upipe.kernels.contract import AttentionKernel
from torchtitan_upipe.kernels.merge import merge_partial


class Ring:
    """The method ``"ring"`` of one attention layer; KV heads travel unrepeated.

    Args:
        exchange: the ring of context-parallel ranks.
        kernel: the attention kernel.
    """

    def __init__(self, exchange: RingExchange, kernel: AttentionKernel) -> None:
        self.exchange = exchange
        self.kernel = kernel

    def __call__(self, x: Tensor, weights: AttentionWeights, transform: HeadTransform, head_dim: int) -> Tensor:
        """See :class:`~torchtitan_upipe.cp.strategy.ContextParallelMethod`; an even number of tokens a rank."""
        q = transform(F.linear(x, weights.wq).unflatten(-1, (-1, head_dim)), weights.q_norm)  # [B, N, H, d]
        k = transform(F.linear(x, weights.wk).unflatten(-1, (-1, head_dim)), weights.k_norm)  # [B, N, G, d]
        v = F.linear(x, weights.wv).unflatten(-1, (-1, head_dim))
        o = _RingAttention.apply(self, head_dim**-0.5, q, k, v)  # [B, N, H, d]
        return F.linear(o.flatten(2), weights.wo)

    def visible(self, step: int, tokens: int) -> tuple[slice, slice, bool]:
        """What this rank's queries see of the keys that arrive at ``step``: (query rows, key rows, causal).

        The keys come from rank ``s = (rank - step) mod C``. From a lower rank its first chunk lies before all queries
        and its second behind them; from a higher rank both chunks lie between this rank's two.
        """
        everything, half = slice(None), tokens // 2
        source = (self.exchange.rank - step) % self.exchange.size
        if source == self.exchange.rank:
            return everything, everything, True
        if source < self.exchange.rank:
            return everything, slice(0, half), False
        return slice(half, None), everything, False


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ring: Ring, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        exchange, tokens = ring.exchange, q.shape[1]
        kv: tuple[Tensor, ...] = (k, v)
        for step in range(exchange.size):
            last = step + 1 == exchange.size
            if not last:
                exchange.start(kv)  # travels while this step computes
            rows, keys, causal = ring.visible(step, tokens)
            part, part_lse = ring.kernel.forward(q[:, rows], kv[0][:, keys], kv[1][:, keys], scale=scale, causal=causal)
            if step == 0:  # this rank's own keys: every query sees at least itself
                out, lse = part.to(accumulate_dtype(part.dtype), copy=True), part_lse.clone()
            else:
                merge_partial(out[:, rows], lse[:, :, rows], part, part_lse)
            if not last:
                kv = exchange.finish()
        o = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.ring, ctx.scale = ring, scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        do = grads[0]
        q, k, v, o, lse = ctx.saved_tensors
        ring: Ring = ctx.ring
        exchange, tokens = ring.exchange, q.shape[1]
        wide = accumulate_dtype(q.dtype)
        dq = torch.zeros_like(q, dtype=wide)
        kv: tuple[Tensor, ...] = (k, v)
        d_kv: tuple[Tensor, ...] = (torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide))
        returning = RingExchange(exchange.group, exchange.traffic)

        for step in range(exchange.size):
            last = step + 1 == exchange.size
            if not last:
                exchange.start(kv)
            rows, keys, causal = ring.visible(step, tokens)
            part_dq, part_dk, part_dv = ring.kernel.backward(
                do[:, rows],
                q[:, rows],
                kv[0][:, keys],
                kv[1][:, keys],
                o[:, rows],
                lse[:, :, rows],
                scale=ctx.scale,
                causal=causal,
            )
            dq[:, rows] += part_dq
            if step > 0:  # what the ranks before have summed for these keys
                d_kv = returning.finish()
            d_kv[0][:, keys] += part_dk
            d_kv[1][:, keys] += part_dv
            if exchange.size > 1:
                returning.start(d_kv)  # the last hop brings the sums home
            if not last:
                kv = exchange.finish()
        if exchange.size > 1:
            d_kv = returning.finish()
        return None, None, dq.to(q.dtype), d_kv[0].to(k.dtype), d_kv[1].to(v.dtype)
