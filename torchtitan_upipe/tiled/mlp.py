"""The feed-forward half of a block in tiles of rows: norm, SwiGLU (arXiv 2002.05202) and the residual sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchtitan_upipe.tiled.norm import rms_norm_backward
from torchtitan_upipe.tiled.tiles import add_weight_gradient, tiles, zeros_to_sum


def tiled_feed_forward(
    h: Tensor, norm_weight: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, *, eps: float, tile_size: int
) -> Tensor:
    """``h + w2(silu(w1(n)) * w3(n))`` with ``n = rms_norm(h)``, keeping ``h`` alone for the backward pass.

    Backward computes a tile's inner tensors again, four of ``[tile_size, F]`` at most at a time, and sums the
    gradients of the weights over tiles in float32 (float64 for float64).

    Args:
        h: ``[..., D]``. May be wider than the weights (autocast): the norm then has the dtype of ``h``, the products
            that of the weights.
        norm_weight: ``[D]``.
        w1: gate, ``[F, D]``, as ``nn.Linear`` stores it.
        w2: down, ``[D, F]``.
        w3: up, ``[F, D]``.
        eps: of the norm.
        tile_size: rows per tile; the last tile may be shorter.

    Returns:
        Like ``h``.
    """
    with torch.autocast(h.device.type, enabled=False):
        h = _Keep.apply(h, norm_weight, w1, w2, w3)
        return _TiledFeedForward.apply(h.grad_fn, tile_size, eps, h, norm_weight, w1, w2, w3)


class _Keep(torch.autograd.Function):
    """Saves the tensors that the feed-forward's backward needs; the value is the first.

    Activation checkpointing ends a block's second run with the last tensor to be saved. Saved ahead of the work, that
    run leaves the feed-forward's forward out; saved by the feed-forward itself, it would be computed for nothing.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return tensors[0].view_as(tensors[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None, None, None


class _TiledFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kept: Any, tile_size: int, eps: float, h: Tensor, *weights: Tensor) -> Tensor:
        ctx.kept, ctx.tile_size, ctx.eps = kept, tile_size, eps
        feed_forward = FeedForward(eps, *weights)
        out = torch.empty_like(h, memory_format=torch.contiguous_format)
        for h_tile, out_tile in zip(tiles(h, tile_size), tiles(out, tile_size), strict=True):
            feed_forward.forward(h_tile, out=out_tile)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, *weights = ctx.kept.saved_tensors
        feed_forward = FeedForward(ctx.eps, *weights)
        dh = torch.empty_like(h, memory_format=torch.contiguous_format)
        sums = feed_forward.new_sums()
        for h_tile, d_out, dh_tile in zip(*(tiles(t, ctx.tile_size) for t in (h, grads[0], dh)), strict=True):
            feed_forward.backward(h_tile, d_out, sums, out=dh_tile)
        return None, None, None, dh, *(d.to(w.dtype) for d, w in zip(sums, weights, strict=True))


@dataclass(frozen=True)
class FeedForward:
    """A tile of the feed-forward half of a block; see :func:`tiled_feed_forward`."""

    eps: float
    norm_weight: Tensor
    w1: Tensor
    w2: Tensor
    w3: Tensor

    def forward(self, h: Tensor, out: Tensor) -> None:
        """Write ``h + w2(silu(w1(n)) * w3(n))`` of a tile ``h [n, D]`` into ``out``, like it."""
        n = self._normalised(h)
        inner = F.silu(F.linear(n, self.w1))  # [n, F]
        inner *= F.linear(n, self.w3)
        torch.add(h, F.linear(inner, self.w2), out=out)

    def new_sums(self) -> tuple[Tensor, ...]:
        """Where :meth:`backward` sums the gradients of the weights, in their order: float32 (float64 for float64)."""
        return tuple(zeros_to_sum(w) for w in (self.norm_weight, self.w1, self.w2, self.w3))

    def backward(self, h: Tensor, d_out: Tensor, sums: Sequence[Tensor], out: Tensor) -> None:
        """Write the gradient of the tile ``h [n, D]`` into ``out``, like it, from ``d_out [n, D]``; add to ``sums``."""
        d_norm, d_w1, d_w2, d_w3 = sums

        # forward again, up to w2
        n = self._normalised(h)
        gate, up = F.linear(n, self.w1), F.linear(n, self.w3)  # [n, F]
        activation = F.silu(gate)

        # back through w2
        dy = d_out.to(self.w2.dtype)
        add_weight_gradient(d_w2, dy, activation * up)
        d_inner = dy @ self.w2

        # back to the outputs of w1 and w3; each product takes the place of a factor no longer needed
        d_up = activation.mul_(d_inner)
        d_gate = torch.ops.aten.silu_backward(d_inner.mul_(up), gate)
        del gate, up, activation, d_inner, dy
        add_weight_gradient(d_w1, d_gate, n)
        add_weight_gradient(d_w3, d_up, n)

        # back through the norm; the residual's gradient is d_out itself
        dn = torch.addmm(d_gate @ self.w1, d_up, self.w3)
        del d_gate, d_up, n
        dh_wide, d_norm_tile = rms_norm_backward(dn, h, self.norm_weight, self.eps)
        torch.add(d_out, dh_wide, out=out)
        d_norm += d_norm_tile

    def _normalised(self, h: Tensor) -> Tensor:
        return F.rms_norm(h, self.norm_weight.shape, self.norm_weight, self.eps).to(self.w1.dtype)
