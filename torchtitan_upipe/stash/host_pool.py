"""Host buffers for tensors that leave the device between forward and backward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchtitan_upipe.stash.transfers import Transfers

ALL_ROWS = slice(None)


class HostPool:
    """Copies device tensors to host memory and back, in buffers that are used again and again.

    Args:
        transfers: makes what copies to and from a device.

    Attributes:
        bytes: of all buffers, in use or not. Buffers are kept, so that this grows in the first step only.
        bytes_in_use: of the buffers that hold a copy now.
    """

    def __init__(self, transfers: Callable[[torch.device], Transfers] = Transfers) -> None:
        self.bytes = self.bytes_in_use = 0
        self._free: dict[tuple[torch.device, int], list[Tensor]] = defaultdict(list)  # by bytes
        self._make_transfers = transfers
        self._transfers: dict[torch.device, Transfers] = {}

    def put(self, tensor: Tensor) -> HostCopy:
        """Start copying ``tensor`` (any shape, dtype and strides) to the host.

        The copy holds ``tensor`` until :meth:`HostCopy.settle`.
        """
        return HostCopy(self, tensor)

    def acquire(self, size: int, device: torch.device) -> Tensor:
        """A host buffer ``[size]`` uint8 for copies from and to ``device``; a new one where none is free."""
        free = self._free[device, size]
        if not free:
            free.append(self.transfers(device).host_memory(size))
            self.bytes += size
        self.bytes_in_use += size
        return free.pop()

    def release(self, buffer: Tensor, device: torch.device) -> None:
        """Take back a buffer of :meth:`acquire`. Copies out of it may still run: the next ones queue behind them."""
        self.bytes_in_use -= buffer.nbytes
        self._free[device, buffer.nbytes].append(buffer)

    def transfers(self, device: torch.device) -> Transfers:
        """What copies to and from ``device``."""
        if device not in self._transfers:
            self._transfers[device] = self._make_transfers(device)
        return self._transfers[device]


class Arriving:
    """A tensor on its way to the device."""

    def __init__(self, transfers: Transfers, host: Tensor) -> None:
        """Start copying ``host``, whose sequences ``host[b]`` are contiguous."""
        self._transfers = transfers
        self._tensor: Tensor | None = torch.empty(host.shape, dtype=host.dtype, device=transfers.device)
        pairs = [(self._tensor, host)] if host.is_contiguous() else list(zip(self._tensor, host, strict=True))
        self._done = transfers.start(pairs)

    def get(self) -> Tensor:
        """The tensor, contiguous; what is computed from now on waits for it. Not a second time."""
        tensor = self._tensor
        assert tensor is not None
        self._end()
        return tensor

    def __del__(self) -> None:
        self._end()

    def _end(self) -> None:
        if self._tensor is not None:
            self._transfers.wait(self._done)
            self._tensor = None


class HostCopy:
    """One tensor in a buffer of a :class:`HostPool`; made by :meth:`HostPool.put`.

    Its life: ``settle`` once the device may free the tensor, ``fetch`` some time before the tensor is needed again,
    ``get`` to have it. A copy that is dropped before ``get`` gives its buffer back.
    """

    _buffer: Tensor | None = None  # until there is one, if ever

    def __init__(self, pool: HostPool, tensor: Tensor) -> None:
        self._pool = pool
        self._device = tensor.device
        self._transfers = pool.transfers(tensor.device)
        self._buffer = pool.acquire(tensor.nbytes, tensor.device)
        self._host = self._buffer.view(tensor.dtype).view(tensor.shape)
        self._source: Tensor | None = tensor.detach().contiguous()
        self._arriving: Arriving | None = None
        self._left: Any = self._transfers.start([(self._host, self._source)])

    def settle(self) -> None:
        """Let go of the tensor on the device.

        The host does not wait: computation that is queued from now on does, for the copy to end, and only then finds
        the tensor's memory free.
        """
        if self._source is not None:
            self._transfers.wait(self._left)
            self._source = None

    def fetch(self) -> None:
        """Start copying back to the device. No more than a hint: nothing where that was done before.

        The next reading of the whole tensor is handed what arrives.
        """
        if self._buffer is not None and self._arriving is None:
            self._arriving = self.begin_read()

    def begin_read(self, rows: slice = ALL_ROWS) -> Arriving:
        """Start copying the rows ``[:, rows]`` of the tensor to the device; the host keeps all.

        Raises:
            RuntimeError: after :meth:`get`.
        """
        if self._buffer is None:
            raise RuntimeError("a tensor kept in host memory is read after its buffer was given back.")
        self.settle()
        if self._arriving is not None and rows == ALL_ROWS:
            arriving, self._arriving = self._arriving, None
            return arriving
        return Arriving(self._transfers, self._host if rows == ALL_ROWS else self._host[:, rows])

    def read(self, rows: slice) -> Tensor:
        """The rows ``[:, rows]`` of the tensor, contiguous on its device; the host keeps all."""
        return self.begin_read(rows).get()

    def get(self) -> Tensor:
        """The tensor, contiguous on its device again. Its buffer goes back to the pool.

        Raises:
            RuntimeError: the second time.
        """
        self.fetch()
        if self._arriving is None:
            raise RuntimeError(
                "a tensor kept in host memory is asked for a second time, after its buffer was given back; "
                "run forward again before another backward pass."
            )
        tensor = self._arriving.get()
        self._end()
        return tensor

    def __del__(self) -> None:
        self._end()

    def _end(self) -> None:
        if self._buffer is not None:
            self.settle()
            self._pool.release(self._buffer, self._device)
            self._buffer = self._arriving = None
