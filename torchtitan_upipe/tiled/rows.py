"""Where a layer finds the rows of a tensor ``[B, N, D]``: on the device, or in host memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from torchtitan_upipe.tiled.tiles import row_slices, slice_size

ALL_ROWS = slice(None)


class Rows(Protocol):
    """A tensor ``[B, N, D]`` of which a few rows at a time are asked for, on the device."""

    @property
    def shape(self) -> torch.Size:
        """``[B, N, D]``."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""

    @property
    def device(self) -> torch.device:
        """Where :meth:`read` gives them."""

    def read(self, slices: Iterable[slice]) -> Iterator[Tensor]:
        """``[:, rows]`` of each of ``slices``."""

    def parts(self, rows: slice = ALL_ROWS) -> list[slice]:
        """``rows`` in slices that the device may have at once: as they are, where it has all of them."""

    def small_parts(self, start: int, stop: int) -> list[slice]:
        """Rows ``[start, stop)`` in slices for what needs much memory a row."""


@dataclass(frozen=True)
class DeviceRows:
    """:class:`Rows` of a tensor on the device: views."""

    tensor: Tensor

    @property
    def shape(self) -> torch.Size:
        """See :class:`Rows`."""
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        """See :class:`Rows`."""
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        """See :class:`Rows`."""
        return self.tensor.device

    def read(self, slices: Iterable[slice]) -> Iterator[Tensor]:
        """See :class:`Rows`."""
        return (self.tensor[:, rows] for rows in slices)

    def parts(self, rows: slice = ALL_ROWS) -> list[slice]:
        """See :class:`Rows`."""
        return [slice(*rows.indices(self.tensor.shape[1])[:2])]

    def small_parts(self, start: int, stop: int) -> list[slice]:
        """See :class:`Rows`."""
        return list(row_slices(start, stop, slice_size(stop - start)))
