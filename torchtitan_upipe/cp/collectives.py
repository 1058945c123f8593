"""What context parallelism sends: all-to-alls between sequence and head shards, and a ring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """What one exchange has sent: calls (all-to-alls, or hops of a ring), and bytes from this rank to other ranks."""

    calls: int = 0
    bytes: int = 0


class HeadExchange:
    """All-to-alls of one group (Ulysses, arXiv 2309.14509, figure 2).

    Tokens are sharded contiguously: rank ``r`` holds ``[r*N, (r+1)*N)``, ``N = S/C``.

    Args:
        group: the group of ``C`` ranks; None for a single rank, which exchanges nothing.

    Attributes:
        size: ``C``.
        rank: this rank within the group.
        traffic: running count of calls and bytes.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.traffic = Traffic()

    def to_heads(self, pieces: Sequence[Tensor]) -> Tensor:
        """Sequence shard to head shard.

        Args:
            pieces: ``pieces[r] [B, N, h_r, d]``, the heads that rank ``r`` shall hold. Views are welcome, and one head
                may stand in several pieces: each piece is copied once, into the send buffer.

        Returns:
            ``[B, S, h, d]`` with ``h = h_rank``, the heads of this rank over the whole sequence.
        """
        mine = pieces[self.rank]
        if self.size == 1:
            return mine
        batch, tokens, heads, width = mine.shape
        send_sizes = [piece.numel() for piece in pieces]
        send = mine.new_empty(sum(send_sizes))
        for buffer, piece in zip(send.split(send_sizes), pieces, strict=True):
            buffer.view(piece.shape).copy_(piece)
        received = self._all_to_all(send, send_sizes, [mine.numel()] * self.size)
        blocks = received.view(self.size, batch, tokens, heads, width)  # [C, B, N, h, d]
        return blocks.transpose(0, 1).reshape(batch, self.size * tokens, heads, width)  # a view if B = 1

    def to_sequence(self, heads: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Head shard to sequence shard, the inverse of :meth:`to_heads`.

        Args:
            heads: ``[B, S, h, d]``, this rank's heads over the whole sequence.
            counts: number of heads on each rank, ``counts[rank] == h``.

        Returns:
            ``pieces[r] [B, N, counts[r], d]``, the heads of rank ``r`` for this rank's tokens (views of one buffer).
        """
        if self.size == 1:
            return [heads]
        batch, length, _, width = heads.shape
        tokens = length // self.size
        send = heads.reshape(batch, self.size, tokens, -1).transpose(0, 1).contiguous()  # [C, B, N, h*d]
        sizes = [batch * tokens * count * width for count in counts]
        received = self._all_to_all(send.view(-1), [send[0].numel()] * self.size, sizes)
        return [
            piece.view(batch, tokens, count, width) for piece, count in zip(received.split(sizes), counts, strict=True)
        ]

    def _all_to_all(self, send: Tensor, send_sizes: list[int], receive_sizes: list[int]) -> Tensor:
        received = send.new_empty(sum(receive_sizes))
        dist.all_to_all_single(received, send, receive_sizes, send_sizes, group=self.group)
        self.traffic.calls += 1
        self.traffic.bytes += (send.numel() - send_sizes[self.rank]) * send.element_size()
        return received


class RingExchange:
    """Passes tensors from each rank of a group to the next, while the caller computes.

    Args:
        group: the group of ``C`` ranks; None for a single rank, which passes nothing.
        traffic: count into this one; by default a new one.

    Attributes:
        size: ``C``.
        rank: this rank within the group.
        traffic: running count of hops and bytes.
    """

    def __init__(self, group: dist.ProcessGroup | None, traffic: Traffic | None = None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.traffic = Traffic() if traffic is None else traffic
        self._pending: tuple[list[dist.Work], tuple[Tensor, ...], tuple[Tensor, ...]] | None = None

    def start(self, tensors: Sequence[Tensor]) -> None:
        """Send ``tensors`` to the next rank and receive as many, of the same shapes, from the one before.

        The tensors must not be written before :meth:`finish`.

        Raises:
            RuntimeError: the exchange before this one was not finished, or there is no group.
        """
        if self._pending is not None or self.group is None:
            raise RuntimeError("a ring passes one set of tensors at a time, between at least two ranks")
        after = dist.get_global_rank(self.group, (self.rank + 1) % self.size)
        before = dist.get_global_rank(self.group, (self.rank - 1) % self.size)
        sent = tuple(t.contiguous() for t in tensors)
        received = tuple(torch.empty_like(t) for t in sent)
        sends = [dist.P2POp(dist.isend, t, after, self.group) for t in sent]
        receives = [dist.P2POp(dist.irecv, t, before, self.group) for t in received]
        work = dist.batch_isend_irecv(sends + receives)
        self._pending = (work, sent, received)
        self.traffic.calls += 1
        self.traffic.bytes += sum(t.numel() * t.element_size() for t in sent)

    def finish(self) -> tuple[Tensor, ...]:
        """Wait for what :meth:`start` began; return the tensors of the rank before.

        Raises:
            RuntimeError: nothing was started.
        """
        if self._pending is None:
            raise RuntimeError("nothing is under way in this ring")
        work, _, received = self._pending
        for item in work:
            item.wait()
        self._pending = None
        return received


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, *pieces: Tensor) -> Tensor:
        ctx.exchange, ctx.counts = exchange, [piece.shape[2] for piece in pieces]
        return exchange.to_heads(pieces)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.exchange.to_sequence(grads[0], ctx.counts)


class _ToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, counts: Sequence[int], heads: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return tuple(exchange.to_sequence(heads, counts))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, ctx.exchange.to_heads(grads)


def differentiable_to_heads(exchange: HeadExchange, pieces: Sequence[Tensor]) -> Tensor:
    """:meth:`HeadExchange.to_heads` as an autograd operation; its gradient is the inverse exchange."""
    return _ToHeads.apply(exchange, *pieces)


def differentiable_to_sequence(exchange: HeadExchange, heads: Tensor, counts: Sequence[int]) -> tuple[Tensor, ...]:
    """:meth:`HeadExchange.to_sequence` as an autograd operation; its gradient is the inverse exchange."""
    return _ToSequence.apply(exchange, counts, heads)
