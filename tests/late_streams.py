"""A side stream on CPU that copies as late as it may, and keeps an eye on what its copies need until then.

:class:`LateStreams` stands in the place of ``torch.cuda`` in ``stash/transfers.py``. Its computation is what the CPU
does, at once; a copy happens when the computation first waits for it. Until then, as on a real device,

- the target of a copy holds no sensible number (here: NaN), and what its source holds at the end is what is copied;
- neither may be freed: their memory would go to the next tensor.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


@dataclass(eq=False)
class View:
    """A tensor that is not kept alive."""

    storage: weakref.ref[Any]
    as_tensor: dict[str, Any]
    dtype: torch.dtype

    @classmethod
    def of(cls, t: Tensor) -> View:
        place = {"storage_offset": t.storage_offset(), "size": t.shape, "stride": t.stride()}
        return cls(weakref.ref(t.untyped_storage()), place, t.dtype)

    def tensor(self) -> Tensor | None:
        storage = self.storage()
        return None if storage is None else torch.empty(0, dtype=self.dtype).set_(storage, **self.as_tensor)


class LateStreams:
    """Streams and events of one device.

    Attributes:
        copies: how many were asked for.
        broken: what a real device would have got wrong.
        registered: start and bytes of page-locked memory.
    """

    def __init__(self) -> None:
        self.copies = self.done = 0
        self.broken: list[str] = []
        self.registered: dict[int, int] = {}
        self._pending: deque[tuple[View, View]] = deque()
        self._ordered = False

    # --- what torch.cuda has ------------------------------------------------------------------------------------------

    def Stream(self, device: torch.device) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(wait_stream=self._order, record_event=lambda: self.copies)

    def current_stream(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(wait_event=self._run_until)

    def synchronize(self, device: torch.device) -> None:
        self._run_until(self.copies)

    @contextmanager
    def stream(self, side: object) -> Iterator[None]:
        if not self._ordered:
            self.broken.append("a copy does not wait for the computation before it")
        self._ordered = False
        with _Deferring(self):
            yield

    def cudart(self) -> SimpleNamespace:
        return SimpleNamespace(cudaHostRegister=self._register, cudaHostUnregister=lambda at: self.registered.pop(at))

    # --- what it does with it -----------------------------------------------------------------------------------------

    def _order(self, stream: object) -> None:
        self._ordered = True

    def defer(self, target: Tensor, source: Tensor) -> None:
        if not (target.is_contiguous() and source.is_contiguous()):
            self.broken.append("a strided copy, which the CPU would stage at once")
        if target.is_floating_point():
            target.fill_(torch.nan)
        self._pending.append((View.of(target), View.of(source)))
        self.copies += 1

    def _run_until(self, event: int) -> None:
        with _disable_current_modes():
            while self.done < event:
                self.done += 1
                target, source = (view.tensor() for view in self._pending.popleft())
                if target is None or source is None:
                    self.broken.append("a copy's memory was freed before its end")
                else:
                    target.copy_(source)

    def _register(self, start: int, size: int, flags: int) -> int:
        if any(start < at + length and at < start + size for at, length in self.registered.items()):
            return 712  # cudaErrorHostMemoryAlreadyRegistered
        self.registered[start] = size
        return 0


class _Deferring(TorchDispatchMode):
    def __init__(self, streams: LateStreams) -> None:
        super().__init__()
        self.streams = streams

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        assert args[2:] == (True,), "non_blocking"
        self.streams.defer(*args[:2])
        return args[0]
