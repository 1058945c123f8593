"""Hidden states in host memory, of which the device has a few rows at a time."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from torchtitan_upipe.stash.host_pool import ALL_ROWS, Arriving, HostPool
from torchtitan_upipe.stash.stash import read_ahead

IN_FLIGHT = 2  # tiles on their way to the host at once


class HostRows:
    """A tensor ``[B, N, D]`` in host memory, read and written by rows. Made by :meth:`HiddenStates.new`.

    Copies run beside the computation, in the order asked for: rows that are read after they were written have arrived.
    Its memory goes back to the pool with it.

    Attributes:
        shape, dtype, device: of the tensor, if it were on the device.
    """

    def __init__(
        self, pool: HostPool, tile_size: int, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self._tile_size = tile_size
        self._pool = pool
        self._transfers = pool.transfers(device)
        self._buffer = pool.acquire(shape.numel() * dtype.itemsize, device)
        self._host = self._buffer.view(dtype).view(shape)
        self._leaving: deque[tuple[Any, Tensor]] = deque()

    def read(self, slices: Iterable[slice]) -> Iterator[Tensor]:
        """``[:, rows]`` of each of ``slices`` on the device, one ahead of the caller."""
        return read_ahead((self, rows) for rows in slices)

    def begin_read(self, rows: slice) -> Arriving:
        """Start copying ``[:, rows]`` to the device."""
        return Arriving(self._transfers, self._host[:, rows])

    def parts(self, rows: slice = ALL_ROWS) -> list[slice]:
        """``rows`` in slices that the device may have at once."""
        return self.small_parts(*rows.indices(self.shape[1])[:2])

    def small_parts(self, start: int, stop: int) -> list[slice]:
        """Rows ``[start, stop)`` in such slices."""
        step = max(self._tile_size // self.shape[0], 1)  # a tile's rows are those of all sequences
        return [slice(row, min(row + step, stop)) for row in range(start, stop, step)]

    def write(self, rows: slice, values: Tensor) -> None:
        """Put ``values [B, n, D]`` in the place of ``[:, rows]``; they stay on the device until they have left."""
        if len(self._leaving) == IN_FLIGHT:
            self._let_go()
        values = values.contiguous()
        event = self._transfers.start(list(zip(self._host[:, rows], values, strict=True)))
        self._leaving.append((event, values))

    def settle(self) -> None:
        """Nothing written takes memory on the device any more."""
        while self._leaving:
            self._let_go()

    def _let_go(self) -> None:
        event, _ = self._leaving.popleft()
        self._transfers.wait(event)

    def __del__(self) -> None:
        self.settle()
        self._pool.release(self._buffer, self.device)


class HiddenStates:
    """The hidden states of a model on the host, and what stands for them in autograd.

    A handle is a tensor of their shape, dtype and device that holds a single number, which is not one: whoever computes
    with it finds out. That it is on the device keeps autograd's order between a block's weights, its input and FSDP's
    hooks, which know one queue a device. The rows live as long as their handle.

    Args:
        pool: of host buffers.
        tile_size: rows ``[tile_size, D]`` that the device has at once.
    """

    def __init__(self, pool: HostPool, tile_size: int) -> None:
        self._pool = pool
        self._tile_size = tile_size
        self._rows: dict[int, HostRows] = {}  # by the identity of the handle's storage

    def new(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The handle of new rows, whose numbers are yet to be written."""
        handle = torch.empty_strided(shape, (0,) * len(shape), dtype=dtype, device=device)  # no view: FSDP2 would warn
        handle.as_strided((), ()).fill_(torch.nan)
        storage = handle.untyped_storage()
        self._rows[storage._cdata] = HostRows(self._pool, self._tile_size, shape, dtype, device)
        weakref.finalize(storage, self._rows.pop, storage._cdata).atexit = False
        return handle

    def of(self, handle: Tensor) -> HostRows:
        """The rows that ``handle`` stands for.

        Raises:
            RuntimeError: it stands for none, as when something was computed with it.
        """
        rows = self._rows.get(handle.untyped_storage()._cdata)
        if rows is None:
            raise RuntimeError(
                'a hidden state is not one of those in host memory: with hidden_states = "host" nothing but blocks may '
                "stand between embedding and output."
            )
        return rows
