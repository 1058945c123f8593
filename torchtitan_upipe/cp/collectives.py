"""What context parallelism sends: all-to-alls between sequence and head shards, and a ring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
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


Watch = Callable[[], AbstractContextManager[None]]  # entered around what may wait for other ranks


class HeadExchange:
    """All-to-alls of one group (Ulysses, arXiv 2309.14509, figure 2).

    Tokens are sharded contiguously: rank ``r`` holds ``[r*N, (r+1)*N)``, ``N = S/C``.

    Args:
        group: the group of ``C`` ranks; None for a single rank, which exchanges nothing.

    Attributes:
        size: ``C``.
        rank: this rank within the group.
        traffic: running count of calls and bytes.
        watch: around each all-to-all.
    """

    watch: Watch = nullcontext

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.traffic = Traffic()

    def to_heads(self, pieces: Sequence[Tensor], rows: Sequence[int] | None = None) -> Tensor:
        """Sequence shard to head shard.

        Args:
            pieces: ``pieces[r] [B, n_r, h_r, d]``, the heads and rows that rank ``r`` shall hold. Views are welcome,
                and one head may stand in several pieces: each piece is copied once, into the send buffer.
            rows: number of rows that each rank sends here; by default everyone's ``N``.

        Returns:
            ``[B, S, h, d]`` with ``h = h_rank``: the heads of this rank, the rows of all ranks one after another.
        """
        mine = pieces[self.rank]
        if self.size == 1:
            return mine
        batch, tokens, heads, width = mine.shape
        rows = [tokens] * self.size if rows is None else rows
        send_sizes = [piece.numel() for piece in pieces]
        send = mine.new_empty(sum(send_sizes))
        for buffer, piece in zip(send.split(send_sizes), pieces, strict=True):
            buffer.view(piece.shape).copy_(piece)
        sizes = [batch * count * heads * width for count in rows]
        received = self._all_to_all(send, send_sizes, sizes)
        if batch == 1:
            return received.view(1, sum(rows), heads, width)
        parts = zip(received.split(sizes), rows, strict=True)
        return torch.cat([part.view(batch, count, heads, width) for part, count in parts], dim=1)

    def to_sequence(
        self,
        heads: Tensor,
        counts: Sequence[int],
        rows: Sequence[int] | None = None,
        received_rows: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Head shard to sequence shard, the inverse of :meth:`to_heads`.

        Args:
            heads: ``[B, S, h, d]``, this rank's heads, the rows of all ranks one after another.
            counts: number of heads on each rank, ``counts[rank] == h``.
            rows: number of rows in ``heads`` that belong to each rank; by default equally many.
            received_rows: number of this rank's rows that each rank holds; by default all ``N``.

        Returns:
            ``pieces[r] [B, received_rows[r], counts[r], d]``, what rank ``r`` held of this rank's tokens (views of one
            buffer).
        """
        if self.size == 1:
            return [heads]
        batch, length, _, width = heads.shape
        rows = [length // self.size] * self.size if rows is None else rows
        received_rows = rows if received_rows is None else received_rows
        send_sizes = [batch * count * heads.shape[2] * width for count in rows]
        if batch == 1:
            send = heads.reshape(-1)
        else:
            send = torch.cat([part.flatten() for part in heads.split(list(rows), dim=1)])
        sizes = [batch * tokens * count * width for tokens, count in zip(received_rows, counts, strict=True)]
        received = self._all_to_all(send, send_sizes, sizes)
        shapes = zip(received.split(sizes), received_rows, counts, strict=True)
        return [piece.view(batch, tokens, count, width) for piece, tokens, count in shapes]

    def _all_to_all(self, send: Tensor, send_sizes: list[int], receive_sizes: list[int]) -> Tensor:
        received = send.new_empty(sum(receive_sizes))
        with self.watch():
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
        watch: around each wait for the rank before.
    """

    watch: Watch = nullcontext

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
        with self.watch():
            for item in work:
                item.wait()
        self._pending = None
        return received


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, rows: Sequence[int], *pieces: Tensor) -> Tensor:
        ctx.exchange, ctx.rows = exchange, rows
        ctx.counts, ctx.sent_rows = [piece.shape[2] for piece in pieces], [piece.shape[1] for piece in pieces]
        return exchange.to_heads(pieces, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.exchange.to_sequence(grads[0], ctx.counts, ctx.rows, ctx.sent_rows)


class _ToSequence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        exchange: HeadExchange,
        counts: Sequence[int],
        rows: Sequence[int],
        received_rows: Sequence[int],
        heads: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.rows = exchange, rows
        return tuple(exchange.to_sequence(heads, counts, rows, received_rows))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, ctx.exchange.to_heads(grads, ctx.rows)


def differentiable_to_heads(exchange: HeadExchange, pieces: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """:meth:`HeadExchange.to_heads` as an autograd operation; its gradient is the inverse exchange."""
    return _ToHeads.apply(exchange, rows, *pieces)


def differentiable_to_sequence(
    exchange: HeadExchange, heads: Tensor, counts: Sequence[int], rows: Sequence[int], received_rows: Sequence[int]
) -> tuple[Tensor, ...]:
    """:meth:`HeadExchange.to_sequence` as an autograd operation; its gradient is the inverse exchange."""
    return _ToSequence.apply(exchange, counts, rows, received_rows, heads)
