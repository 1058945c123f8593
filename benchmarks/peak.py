"""Peak device memory of a training step, measured where it is allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function

MEMORY_EVENT = "[memory]"  # the profiler's name for an allocation or a release
MARK = "mark: "


class PeakMeter(Protocol):
    """Measures steps of a rank.

    Attributes:
        how: what ``peak`` is, in words.
        own_step: measuring slows a step down, so that it needs one that is not timed.
        peak: bytes, the largest over the steps watched.
        marks: live bytes at the moments marked, in order; complete once the watch has ended.
    """

    how: str
    own_step: bool
    peak: int
    marks: list[tuple[str, int]]

    def watch(self) -> AbstractContextManager[None]:
        """Around a step."""

    def mark(self, name: str) -> None:
        """Within a watched step: note what is live now; no effect in other steps."""

    def before_log(self) -> None:
        """At the end of a step, before TorchTitan logs it and resets the device's statistics."""


class CudaMeter:
    """``torch.cuda.max_memory_allocated`` of the timed steps."""

    how = "torch.cuda.max_memory_allocated over the timed steps"
    own_step = False

    def __init__(self) -> None:
        self.peak = 0
        self.marks: list[tuple[str, int]] = []
        self._watching = False

    @contextmanager
    def watch(self) -> Iterator[None]:
        """See :class:`PeakMeter`."""
        torch.cuda.reset_peak_memory_stats()
        self._watching = True
        try:
            yield
        finally:
            self._watching = False

    def mark(self, name: str) -> None:
        """See :class:`PeakMeter`."""
        if self._watching:
            self.marks.append((name, torch.cuda.memory_allocated()))

    def before_log(self) -> None:
        """See :class:`PeakMeter`."""
        self.peak = max(self.peak, torch.cuda.max_memory_allocated())


class CpuMeter:
    """What the CPU allocator handed out and took back, as the profiler records it.

    It sees every storage, also those that FSDP frees by resizing and those that live inside one operator. What a step
    finds allocated was not recorded and is counted apart.

    Args:
        held: bytes that live through the whole step: parameters, buffers, optimizer state.
    """

    how = "live bytes of the CPU allocator in one further step that is not timed, with parameters and optimizer state"
    own_step = True

    def __init__(self, held: Callable[[], int]) -> None:
        self.peak = 0
        self.marks: list[tuple[str, int]] = []
        self._held = held

    @contextmanager
    def watch(self) -> Iterator[None]:
        """See :class:`PeakMeter`."""
        held = self._held()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorder:
            yield
        live = held
        for name, change in _memory_events(recorder):
            live += change
            self.peak = max(self.peak, live)
            if name != MEMORY_EVENT:
                self.marks.append((name.removeprefix(MARK), live))

    def mark(self, name: str) -> None:
        """See :class:`PeakMeter`."""
        with record_function(MARK + name):
            pass

    def before_log(self) -> None:
        """See :class:`PeakMeter`; nothing resets the allocator's record."""


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each once; of a DTensor, this rank's part."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())


def _memory_events(recorder: profile) -> list[tuple[str, int]]:
    """Allocations, releases and marks in order of time, each with the bytes by which it changes what is live."""
    events: list[Any] = recorder.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.name(), e.nbytes()) for e in events if e.name() == MEMORY_EVENT]
    marks = [(e.start_ns(), e.name(), 0) for e in events if e.name().startswith(MARK)]
    return [event[1:] for event in sorted(changes + marks, key=lambda event: event[0])]
