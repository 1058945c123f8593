"""Ring attention: queries stay, keys and values travel (arXiv 2310.01889), with balanced causal work.

Tokens are sharded zigzag: of ``2*R`` chunks of the sequence, rank ``r`` of the ring holds chunks ``r`` and
``2*R - 1 - r``, in that order. From whatever rank keys come, half of all (query, key) pairs are visible.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchtitan_upipe.cp.collectives import RingExchange
from torchtitan_upipe.cp.strategy import accumulate_dtype
from torchtitan_upipe.kernels.contract import AttentionKernel
from torchtitan_upipe.kernels.merge import merge_partial


class RingKernel:
    """Attention over the tokens of a whole ring, behind the contract of a kernel on one rank's tokens.

    A method given this kernel is a hybrid (USP, arXiv 2405.07719): its all-to-alls gather the tokens of one ring rank,
    this kernel lets them attend to those of all. KV heads travel unrepeated.

    Args:
        exchange: the ring.
        kernel: the kernel for each pair of ring ranks.
    """

    def __init__(self, exchange: RingExchange, kernel: AttentionKernel) -> None:
        self.exchange = exchange
        self.kernel = kernel
        self.name = f"{kernel.name} in a ring of {exchange.size}"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        """See :class:`~torchtitan_upipe.kernels.contract.AttentionKernel`; an even number of tokens, causal only."""
        _check(q, causal)
        kv: tuple[Tensor, ...] = (k, v)
        for step in range(self.exchange.size):
            last = step + 1 == self.exchange.size
            if not last:
                self.exchange.start(kv)  # travels while this step computes
            rows, keys, diagonal = self.visible(step, q.shape[1])
            part, part_lse = self.kernel.forward(
                q[:, rows], kv[0][:, keys], kv[1][:, keys], scale=scale, causal=diagonal
            )
            if step == 0:  # this rank's own keys: every query sees at least itself
                out, lse = part.to(accumulate_dtype(part.dtype), copy=True), part_lse.clone()
            else:
                merge_partial(out[:, rows], lse[:, :, rows], part, part_lse)
            if not last:
                kv = self.exchange.finish()
        return out.to(q.dtype), lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`~torchtitan_upipe.kernels.contract.AttentionKernel`; sums travel with their keys, in float32."""
        _check(q, causal)
        ring, wide = self.exchange, accumulate_dtype(q.dtype)
        returning = RingExchange(ring.group, ring.traffic)
        dq = torch.zeros_like(q, dtype=wide)
        kv: tuple[Tensor, ...] = (k, v)
        d_kv: tuple[Tensor, ...] = (torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide))

        for step in range(ring.size):
            last = step + 1 == ring.size
            if not last:
                ring.start(kv)
            rows, keys, diagonal = self.visible(step, q.shape[1])
            part_dq, part_dk, part_dv = self.kernel.backward(
                dout[:, rows],
                q[:, rows],
                kv[0][:, keys],
                kv[1][:, keys],
                out[:, rows],
                lse[:, :, rows],
                scale=scale,
                causal=diagonal,
            )
            dq[:, rows] += part_dq
            if step > 0:  # what the ranks before have summed for these keys
                d_kv = returning.finish()
            d_kv[0][:, keys] += part_dk
            d_kv[1][:, keys] += part_dv
            if ring.size > 1:
                returning.start(d_kv)  # the last hop brings the sums home
            if not last:
                kv = ring.finish()
        if ring.size > 1:
            d_kv = returning.finish()
        return dq.to(q.dtype), d_kv[0].to(k.dtype), d_kv[1].to(v.dtype)

    def visible(self, step: int, tokens: int) -> tuple[slice, slice, bool]:
        """What this rank's queries see of the keys that arrive at ``step``: (query rows, key rows, causal).

        The keys come from rank ``s = (rank - step) mod R``. From a lower rank its first chunk lies before all queries
        and its second behind them; from a higher rank both chunks lie between this rank's two.
        """
        everything, half = slice(None), tokens // 2
        source = (self.exchange.rank - step) % self.exchange.size
        if source == self.exchange.rank:
            return everything, everything, True
        if source < self.exchange.rank:
            return everything, slice(0, half), False
        return slice(half, None), everything, False


def _check(q: Tensor, causal: bool) -> None:
    if not causal or q.shape[1] % 2:
        raise ValueError(f"a ring does causal attention on an even number of tokens a rank, not on {q.shape[1]}.")
