"""One rank of a job without the others: a process group whose collectives are local copies.

What would arrive from other ranks is filled with this rank's own data. Sizes, allocations and everything between two
collectives are those of the real job; values, and the time of the exchanges, are not.

On CUDA a copy runs on the stream that is current when the collective is called, and ``wait`` of its work waits for
nothing: as with collectives of the current stream, who reads on another stream waits for an event, as FSDP2 does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, _create_work_from_future  # type: ignore[attr-defined]

BACKEND = "local_copies"


class CopyCollectives:
    """The collectives of rank ``rank`` among ``size``, under the names by which ``torch.distributed`` calls them."""

    rank: Callable[[], int]
    size: Callable[[], int]

    def __init__(self) -> None:
        self._under_way: deque[Tensor] = deque()  # sent and not yet received

    def all_gather_single(self, output: Tensor, shard: Tensor, opts: object = None) -> dist.Work:
        """Every rank's part of ``output`` is ``shard``."""
        for part in output.chunk(self.size()):
            if part.data_ptr() != shard.data_ptr():  # FSDP gathers in place
                part.copy_(shard.view_as(part))
        return _done()

    def allgather(
        self, outputs: Sequence[Sequence[Tensor]], shards: Sequence[Tensor], opts: object = None
    ) -> dist.Work:
        """Every tensor of ``outputs[i]`` is ``shards[i]``."""
        for parts, shard in zip(outputs, shards, strict=True):
            for part in parts:
                part.copy_(shard)
        return _done()

    def reduce_scatter_single(self, output: Tensor, whole: Tensor, opts: object = None) -> dist.Work:
        """``output`` is this rank's part of ``whole``."""
        output.copy_(whole.chunk(self.size())[self.rank()].view_as(output))
        return _done()

    def allreduce(self, tensors: Sequence[Tensor], opts: object = None) -> dist.Work:
        """The tensors stay."""
        return _done()

    def broadcast(self, tensors: Sequence[Tensor], opts: object = None) -> dist.Work:
        """The tensors stay."""
        return _done()

    def all_to_all_single(
        self,
        output: Tensor,
        sent: Tensor,
        output_sizes: Sequence[int] | None = None,
        sent_sizes: Sequence[int] | None = None,
        opts: object = None,
    ) -> dist.Work:
        """``output`` is ``sent``, again and again until it is full."""
        into, source = output.view(-1), sent.view(-1)
        if source.numel() == 0:
            into.zero_()
            return _done()
        for part in into.split(source.numel()):
            part.copy_(source[: part.numel()])
        return _done()

    def send(self, tensors: Sequence[Tensor], rank: int, tag: int = 0) -> dist.Work:
        """Keep the tensors for :meth:`recv`."""
        self._under_way.extend(tensors)
        return _done()

    def recv(self, tensors: Sequence[Tensor], rank: int, tag: int = 0) -> dist.Work:
        """The tensors are those that were sent first."""
        for tensor in tensors:
            tensor.copy_(self._under_way.popleft())
        return _done()

    def barrier(self, opts: object = None) -> dist.Work:
        """Nobody to wait for."""
        return _done()

    # names before torch 2.13
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single


class LocalCopies(CopyCollectives, dist.ProcessGroup):  # type: ignore[misc]  # torch's stubs are overloaded
    """A process group of which one rank runs. A collective that :class:`CopyCollectives` lacks fails by its name.

    Args:
        rank: this rank.
        size: number of ranks that the group seems to have.
    """

    def __init__(self, rank: int, size: int) -> None:
        CopyCollectives.__init__(self)
        dist.ProcessGroup.__init__(self, rank, size)  # type: ignore[call-arg]

    def getBackendName(self) -> str:  # noqa: N802 torch's name
        """Name of the backend."""
        return BACKEND

    @property
    def group_name(self) -> dist.GroupName:
        """The name under which ``torch.distributed`` knows this group."""
        return dist.distributed_c10d._world.pg_names[self]


def _done() -> dist.Work:
    future: torch.futures.Future[None] = torch.futures.Future()
    future.set_result(None)
    return _create_work_from_future(future)


def join_alone(rank: int, world_size: int) -> None:
    """Initialise ``torch.distributed`` as rank ``rank`` of ``world_size``, of which no other runs."""
    dist.Backend.register_backend(BACKEND, _create, devices=["cpu", "cuda"])
    dist.init_process_group(BACKEND, store=HashStore(), rank=rank, world_size=world_size)


def _create(store: Any, rank: int, size: int, timeout: timedelta) -> LocalCopies:
    return LocalCopies(rank, size)
