"""RMSNorm (arXiv 1910.07467) in tiles of rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchtitan_upipe.tiled.tiles import tiles, zeros_to_sum


def tiled_rms_norm(x: Tensor, weight: Tensor, eps: float, tile_size: int) -> Tensor:
    """``F.rms_norm`` over the last dimension, to the bit, keeping only its arguments for the backward pass.

    The plain operator may keep, or make on the way, a float32 copy of all of ``x``; here such a copy is a tile's.

    Args:
        x: ``[..., D]``.
        weight: ``[D]``.
        eps: added to the mean square.
        tile_size: rows per tile; the last tile may be shorter.

    Returns:
        Like ``x``.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _TiledRMSNorm.apply(tile_size, eps, x, weight)


class _TiledRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tile_size: int, eps: float, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tile_size, ctx.eps = tile_size, eps
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for x_tile, out_tile in zip(tiles(x, tile_size), tiles(out, tile_size), strict=True):
            out_tile.copy_(F.rms_norm(x_tile, weight.shape, weight, eps))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        d_weight = zeros_to_sum(weight)
        for x_tile, dy_tile, dx_tile in zip(*(tiles(t, ctx.tile_size) for t in (x, grads[0], dx)), strict=True):
            dx_wide, d_weight_tile = rms_norm_backward(dy_tile, x_tile, weight, ctx.eps)
            dx_tile.copy_(dx_wide)
            d_weight += d_weight_tile
        return None, None, dx, d_weight.to(weight.dtype)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of ``x [n, D]`` and ``weight [D]``, both float32 (float64 for float64), for the caller to round once.

    Not torch's own backward: that rounds the gradient of ``weight`` to its dtype, here once per tile.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(wide)
    scale = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)  # [n, 1]
    x_hat = x_wide * scale
    d_weight = (dy * x_hat).sum(0)
    d_x_hat = dy * weight.to(wide)
    dx = d_x_hat.addcmul_(x_hat, (d_x_hat * x_hat).mean(-1, keepdim=True), value=-1).mul_(scale)
    return dx, d_weight
