"""Ring attention: queries stay, keys and values travel (arXiv 2310.01889), with balanced causal work.

Tokens are sharded zigzag: of ``2*R`` chunks of the sequence, rank ``r`` of the ring holds chunks ``r`` and
``2*R - 1 - r``, in that order. From whatever rank keys come, half of all (query, key) pairs are visible.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchtitan_upipe.cp.attention import by_sequence
from torchtitan_upipe.cp.collectives import RingExchange
from torchtitan_upipe.kernels.contract import AttentionKernel, accumulate_dtype
from torchtitan_upipe.kernels.merge import merge_partial
from torchtitan_upipe.kernels.pieces import attend_backward, partial_attention
from torchtitan_upipe.kernels.visibility import Documents, Interval, Tokens


def zigzag_tokens(length: int, rank: int, ring_degree: int) -> Tokens:
    """The tokens of ring rank ``rank``: chunks ``rank`` and ``2R - 1 - rank`` of ``2R``; all tokens without a ring.

    Args:
        length: ``S``, with a ring a multiple of ``2 * ring_degree``.
        rank: rank within the ring.
        ring_degree: ``R``.
    """
    if ring_degree == 1:
        return Tokens(((0, length),))
    chunk, mirrored = length // (2 * ring_degree), 2 * ring_degree - 1 - rank
    return Tokens(((rank * chunk, (rank + 1) * chunk), (mirrored * chunk, (mirrored + 1) * chunk)))


class RingAttention:
    """Attention over the tokens of a whole ring (see :class:`~torchtitan_upipe.cp.attention.SequenceAttention`).

    A method given this is a hybrid (USP, arXiv 2405.07719): its all-to-alls gather the tokens of one ring rank, here
    they attend to those of all. KV heads travel unrepeated.

    Args:
        exchange: the ring.
        kernel: the kernel for each pair of ring ranks.
    """

    def __init__(self, exchange: RingExchange, kernel: AttentionKernel) -> None:
        self.exchange = exchange
        self.kernel = kernel

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, rows: Sequence[Interval], documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`~torchtitan_upipe.cp.attention.SequenceAttention`."""
        kv: tuple[Tensor, ...] = (k, v)
        wide = accumulate_dtype(q.dtype)
        out = torch.zeros_like(q, dtype=wide)
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=wide)
        for step in range(self.exchange.size):
            last = step + 1 == self.exchange.size
            if not last:
                self.exchange.start(kv)  # travels while this step computes
            queries, keys = self._tokens(step, rows, k.shape[1])
            for b, pieces in by_sequence(queries, keys, documents, q):
                for at, *part in partial_attention(self.kernel, q[b], kv[0][b], kv[1][b], pieces, scale=scale):
                    merge_partial(out[b, at], lse[b, :, at], *part)
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
        rows: Sequence[Interval],
        documents: Documents | None,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`~torchtitan_upipe.cp.attention.SequenceAttention`; sums travel with their keys, in float32."""
        ring, wide = self.exchange, accumulate_dtype(q.dtype)
        returning = RingExchange(ring.group, ring.traffic)
        dq = torch.zeros_like(q, dtype=wide)
        kv: tuple[Tensor, ...] = (k, v)
        d_kv: tuple[Tensor, ...] = (torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide))

        for step in range(ring.size):
            last = step + 1 == ring.size
            if not last:
                ring.start(kv)
            queries, keys = self._tokens(step, rows, k.shape[1])
            parts = [
                (
                    b,
                    attend_backward(
                        self.kernel, dout[b], q[b], kv[0][b], kv[1][b], out[b], lse[b], pieces, scale=scale
                    ),
                )
                for b, pieces in by_sequence(queries, keys, documents, q)
                if pieces
            ]
            if step > 0:  # what the ranks before have summed for these keys
                d_kv = returning.finish()
            for b, (part_dq, part_dk, part_dv) in parts:
                dq[b] += part_dq
                d_kv[0][b] += part_dk
                d_kv[1][b] += part_dv
            if ring.size > 1:
                returning.start(d_kv)  # the last hop brings the sums home
            if not last:
                kv = ring.finish()
        if ring.size > 1:
            d_kv = returning.finish()
        if into is not None:
            for total, part in zip(into, d_kv, strict=True):
                total += part
            d_kv = into
        return dq, *d_kv  # type: ignore[return-value]

    def _tokens(self, step: int, rows: Sequence[Interval], tokens: int) -> tuple[Tokens, Tokens]:
        """Positions of this rank's query rows, and of the keys that arrive at ``step`` from rank ``rank - step``."""
        rank, size = self.exchange.rank, self.exchange.size
        length = tokens * size
        return zigzag_tokens(length, rank, size).rows(rows), zigzag_tokens(length, (rank - step) % size, size)
