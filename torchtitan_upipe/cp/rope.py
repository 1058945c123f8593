"""Rotary position embedding of head shards, with its inverse, for any positions and without a table of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchtitan_upipe.kernels.contract import accumulate_dtype
from torchtitan_upipe.tiled.tiles import row_slices

ROWS = 8192  # tokens rotated at a time: what bounds the float32 temporaries


@dataclass(frozen=True)
class Rope:
    """Rotation of ``[B, n, h, d]`` by each token's position (RoFormer, arXiv 2104.09864).

    Angles are float64 products, rounded to the heads' working precision once reduced to one turn: a float32 product,
    as a table holds it, is off by 0.1 to 0.3 rad around position 5,000,000. No more than ``ROWS`` tokens are in float32
    at a time.

    Attributes:
        frequencies: ``[d/2]``, float64: radians per position.
        positions: ``[B or 1, N]`` int64, of this rank's tokens.
        interleaved: pairs are ``(0, 1), (2, 3), ..`` (Llama in TorchTitan's layout); else ``(i, i + d/2)`` (Qwen).
        scale: factor of the rotated heads (YaRN, arXiv 2309.00071, section 3.4; 1 elsewhere).
    """

    frequencies: Tensor
    positions: Tensor
    interleaved: bool
    scale: float = 1.0

    def __call__(self, heads: Tensor) -> Tensor:
        """Rotate the heads of all tokens, in float32 (float64 for float64); a new tensor, differentiable."""
        return _Rotate.apply(heads, self)

    def rotate_(self, heads: Tensor, rows: slice = slice(None), *, inverse: bool = False) -> Tensor:
        """Rotate the heads of the tokens ``rows`` in place, or back; returns ``heads``.

        Back is the transpose, which for a rotation is the inverse; the scale is applied either way.
        """
        positions = self.positions[:, rows]
        for at in row_slices(0, heads.shape[1], ROWS):
            part = heads[:, at]
            wide = part.to(accumulate_dtype(part.dtype))
            angles = positions[:, at, None, None].double() * self.frequencies  # [B or 1, n, 1, d/2]
            angles = angles.remainder(2 * math.pi).to(wide.dtype)
            cos, sin = angles.cos(), -angles.sin() if inverse else angles.sin()
            if self.scale != 1.0:
                cos, sin = cos * self.scale, sin * self.scale
            a, b = wide.unflatten(-1, (-1, 2)).unbind(-1) if self.interleaved else wide.chunk(2, dim=-1)
            rotated = (a * cos - b * sin, a * sin + b * cos)
            part.copy_(torch.stack(rotated, dim=-1).flatten(-2) if self.interleaved else torch.cat(rotated, dim=-1))
        return heads


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, rope: Rope) -> Tensor:
        ctx.rope = rope
        return rope.rotate_(heads.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.rope.rotate_(grads[0].clone(), inverse=True), None
