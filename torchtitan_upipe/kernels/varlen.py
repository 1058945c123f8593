"""Stretches of rows packed side by side for CUDA flash kernels, which take them as ``[tokens, h, d]`` and offsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchtitan_upipe.kernels.visibility import Known


@dataclass(frozen=True)
class Offsets:
    """Where stretches begin in a packed batch.

    Attributes:
        cumulative: ``[B * stretches + 1]`` int32 on the device, the FlashAttention convention ``cu_seqlens``.
        longest: rows of the longest stretch.
    """

    cumulative: Tensor
    longest: int


def offsets(lengths: Sequence[int], batch: int, device: torch.device) -> Offsets:
    """Offsets of the same stretches in each of ``batch`` sequences; the same ones again where ``lengths`` are known."""

    def make() -> Offsets:
        ends = torch.tensor([0, *lengths] + list(lengths) * (batch - 1), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return Offsets(ends.to(device, non_blocking=True), max(lengths))

    return Known.of(lengths).work_out((batch, device), make)


def unpack_lse(lse: Tensor, batch: int) -> Tensor:
    """``[h, B * S]``, as packed kernels give it, to ``[B, h, S]``."""
    return lse.unflatten(1, (batch, -1)).transpose(0, 1)


def pack_lse(lse: Tensor) -> Tensor:
    """``[B, h, S]`` to ``[h, B * S]``."""
    return lse.transpose(0, 1).flatten(1).contiguous()
