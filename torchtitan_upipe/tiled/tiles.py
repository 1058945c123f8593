"""Rows in tiles, and sums over tiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 8192  # of a slice at most: what bounds temporaries where a shard is long
SLICES = 8  # at least: what bounds them where it is short
FEWEST = 64  # rows of a slice; fewer cost more time than they save memory


def slice_size(rows: int) -> int:
    """Rows of one slice of ``rows`` that are worked through slice by slice."""
    return min(ROWS, max(FEWEST, -(-rows // SLICES)))


def row_slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """Rows ``[start, stop)`` in slices of ``size``, the last maybe shorter."""
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))


def tiles(x: Tensor, tile_size: int) -> tuple[Tensor, ...]:
    """Rows of ``x [..., D]`` in tiles ``[tile_size, D]``, the last maybe shorter; views where ``x`` is contiguous."""
    return x.flatten(0, -2).split(tile_size)


def zeros_to_sum(weight: Tensor) -> Tensor:
    """Where the gradient of ``weight`` is summed over tiles: float32, or float64 for float64."""
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


def add_weight_gradient(total: Tensor, d_out: Tensor, x: Tensor) -> None:
    """``total [M, K] += d_out^T @ x`` for a tile's ``d_out [n, M]`` and ``x [n, K]``, summed in the dtype of ``total``.

    A tile's share in bfloat16 would be one more rounding, as large as that of the result: 1.2 to 1.4 times the error.
    """
    if d_out.dtype == total.dtype:
        total.addmm_(d_out.t(), x)
    elif total.device.type == "cpu":  # has no product with a wider result
        total.addmm_(d_out.t().to(total.dtype), x.to(total.dtype))
    else:
        torch.addmm(total, d_out.t(), x, out_dtype=total.dtype, out=total)


def as_in_products(weight: Tensor) -> Tensor:
    """``weight`` in the dtype in which autocast multiplies (one device or plain data parallel in mixed precision)."""
    device_type = weight.device.type
    return weight.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else weight
