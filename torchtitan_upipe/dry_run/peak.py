"""Peak device memory of a training step, measured where it is allocated."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchtitan_upipe.dry_run.live_bytes import LiveBytes


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
    """Live tensor storages, watched operator by operator, from those that a step finds.

    Not counted: what an operator allocates and frees within itself, and buffers that gloo's threads hold a while longer
    than their tensors live, which differ from run to run.
    """

    how = "live tensor storages in one further step that is not timed, with parameters and optimizer state"
    own_step = True

    def __init__(self) -> None:
        self.peak = 0
        self.marks: list[tuple[str, int]] = []
        self._watching: LiveBytes | None = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """See :class:`PeakMeter`."""
        gc.collect()
        with LiveBytes() as self._watching:
            for found in gc.get_objects():
                if type(found) in (Tensor, nn.Parameter):
                    self._watching.adopt(found)
            yield
        self.peak = max(self.peak, self._watching.peak)
        self._watching = None

    def mark(self, name: str) -> None:
        """See :class:`PeakMeter`."""
        if self._watching is not None:
            self.marks.append((name, self._watching.live))

    def before_log(self) -> None:
        """See :class:`PeakMeter`; nothing resets the record."""


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each once; of a DTensor, this rank's part."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())
