"""Host buffers for tensors that leave the device between forward and backward."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor


class HostPool:
    """Copies device tensors to host memory and back, in buffers that are used again and again.

    For CUDA tensors the buffers are pinned and all copies run on one side stream, beside the computation and in the
    order in which they were asked for. For other devices the same calls copy at once, without streams.

    Attributes:
        bytes: of all buffers, in use or not. Buffers are kept, so that this grows in the first step only.
        bytes_in_use: of the buffers that hold a copy now.
    """

    def __init__(self) -> None:
        self.bytes = self.bytes_in_use = 0
        self._free: dict[tuple[torch.device, int], list[Tensor]] = defaultdict(list)  # by bytes
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def put(self, tensor: Tensor) -> HostCopy:
        """Start copying ``tensor`` (any shape, dtype and strides) to the host.

        The copy holds ``tensor`` until :meth:`HostCopy.settle`.
        """
        return HostCopy(self, tensor)

    def acquire(self, size: int, device: torch.device) -> Tensor:
        """A host buffer ``[size]`` uint8 for copies from and to ``device``; a new one where none is free."""
        free = self._free[device, size]
        if not free:
            free.append(torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda"))
            self.bytes += size
        self.bytes_in_use += size
        return free.pop()

    def release(self, buffer: Tensor, device: torch.device) -> None:
        """Take back a buffer of :meth:`acquire`. Copies out of it may still run: the next ones queue behind them."""
        self.bytes_in_use -= buffer.nbytes
        self._free[device, buffer.nbytes].append(buffer)

    def stream(self, device: torch.device) -> torch.cuda.Stream | None:
        """The side stream of ``device``, on which all its copies run; None where there are no streams."""
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class HostCopy:
    """One tensor in a buffer of a :class:`HostPool`; made by :meth:`HostPool.put`.

    Its life: ``settle`` once the device may free the tensor, ``fetch`` some time before the tensor is needed again,
    ``get`` to have it. A copy that is dropped before ``get`` gives its buffer back.
    """

    def __init__(self, pool: HostPool, tensor: Tensor) -> None:
        self._pool = pool
        self._device = tensor.device
        self._stream = pool.stream(tensor.device)
        self._done: torch.cuda.Event | None = None
        self._buffer: Tensor | None = pool.acquire(tensor.nbytes, tensor.device)
        self._host = self._buffer.view(tensor.dtype).view(tensor.shape)
        self._source: Tensor | None = tensor.detach()
        self._fetched: Tensor | None = None
        self._copy(self._host, self._source)

    def settle(self) -> None:
        """Let go of the tensor on the device.

        The host does not wait: computation that is queued from now on does, for the copy to end, and only then finds
        the tensor's memory free.
        """
        if self._source is not None:
            self._wait()
            self._source = None

    def fetch(self) -> None:
        """Start copying back to the device. No more than a hint: nothing where that was done before.

        The next :meth:`get` or :meth:`read` of all rows is handed what arrives.
        """
        if self._buffer is not None and self._fetched is None:
            self.settle()
            self._fetched = torch.empty_like(self._host, device=self._device, pin_memory=False)
            self._copy(self._fetched, self._host)

    def read(self, rows: slice) -> Tensor:
        """The rows ``[:, rows]`` of the tensor, copied to the device; the host keeps all.

        Raises:
            RuntimeError: after :meth:`get`.
        """
        if self._buffer is None:
            raise RuntimeError("a tensor kept in host memory is read after its buffer was given back.")
        self.settle()
        if self._fetched is not None and rows == slice(None):
            self._wait()
            fetched, self._fetched = self._fetched, None
            return fetched
        kept = self._host[:, rows]
        target = torch.empty(kept.shape, dtype=kept.dtype, device=self._device)
        for ours, theirs in zip(target, kept, strict=True):  # contiguous each: a strided copy would be staged at once,
            ours.copy_(theirs, non_blocking=True)  # by the CPU, which does not wait for what settle() waits for
        return target

    def get(self) -> Tensor:
        """The tensor, contiguous on its device again. Its buffer goes back to the pool.

        Raises:
            RuntimeError: the second time.
        """
        self.fetch()
        tensor = self._fetched
        if tensor is None:
            raise RuntimeError(
                "a tensor kept in host memory is asked for a second time, after its buffer was given back; "
                "run forward again before another backward pass."
            )
        self._end()
        return tensor

    def __del__(self) -> None:
        self._end()

    def _end(self) -> None:
        if self._buffer is not None:
            self._wait()
            self._pool.release(self._buffer, self._device)
            self._buffer = self._source = self._fetched = None

    def _copy(self, target: Tensor, source: Tensor) -> None:
        """Queue the copy behind what the device computes now."""
        if self._stream is None:
            target.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            self._done = self._stream.record_event()

    def _wait(self) -> None:
        """Queue what the device computes from now on behind this copy."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)
