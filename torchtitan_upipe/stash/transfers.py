"""How tensors travel between a device and the host: a side stream, and host memory that the device can reach."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Transfers:
    """Copies to and from one device, on one side stream, beside the computation and in the order asked for.

    Every kind of device takes the same way through here: torch gives the CPU streams and events, too, whose copies
    have ended when they begin.

    Args:
        device: the device.
        streams: torch's module of the device (``torch.cuda``, ``torch.cpu``); a test may give another.
    """

    def __init__(self, device: torch.device, streams: Any = None) -> None:
        self._locked: list[Tensor] = []
        self.device = device
        self._streams: Any = streams or torch.get_device_module(device)
        self._side = self._streams.Stream(device)

    def start(self, copies: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Queue copies ``(target, source)`` behind what the device computes now; give the event of their end.

        Each pair must be contiguous: CUDA would have the CPU stage others, at once and without waiting for anything.
        """
        self._side.wait_stream(self._streams.current_stream(self.device))
        with self._streams.stream(self._side):
            for target, source in copies:
                target.copy_(source, non_blocking=True)
            return self._side.record_event()

    def wait(self, event: Any) -> None:
        """Queue what the device computes from now on behind ``event``. The host does not wait."""
        self._streams.current_stream(self.device).wait_event(event)

    def host_memory(self, size: int) -> Tensor:
        """A host buffer ``[size]`` uint8; page-locked, where only that lets copies run beside the computation.

        Raises:
            MemoryError: the system does not lock so much.
        """
        if self.device.type != "cuda" or size == 0:
            return torch.empty(size, dtype=torch.uint8, device="cpu")
        memory = page_locked(size, self._streams.cudart())
        self._locked.append(memory)
        return memory

    def __del__(self) -> None:
        if self._locked and not sys.is_finalizing():  # else the system takes all of it
            self._streams.synchronize(self.device)
            for memory in self._locked:
                self._streams.cudart().cudaHostUnregister(memory.data_ptr())


def page_locked(size: int, cudart: Any) -> Tensor:
    """``[size]`` uint8 in pages of its own, locked: what the size asks for, rounded up to a page.

    torch's own pinned memory is rounded up to a power of two (always in 2.11, by default in 2.13): 1.6 times what the
    stash of 5M tokens holds.

    Args:
        cudart: ``torch.cuda.cudart()``.

    Raises:
        MemoryError: see :meth:`Transfers.host_memory`.
    """
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = torch.empty(pages + mmap.PAGESIZE, dtype=torch.uint8, device="cpu")
    memory = memory[-memory.data_ptr() % mmap.PAGESIZE :][:pages]
    code = int(cudart.cudaHostRegister(memory.data_ptr(), pages, 0))
    if code != 0:
        raise MemoryError(
            f"the system would not page-lock {pages / 2**30:.2f} GiB more of host memory (CUDA error {code}); see "
            "`ulimit -l` and what the host has left"
        )
    return memory[:size]
