"""Final norm, logits and cross entropy in tiles of rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchtitan_upipe.tiled.norm import rms_norm_backward
from torchtitan_upipe.tiled.tiles import add_weight_gradient, tiles, zeros_to_sum

IGNORE_INDEX = -100  # torch's, and TorchTitan's


def tiled_cross_entropy(
    h: Tensor, labels: Tensor, norm_weight: Tensor, output_weight: Tensor, *, eps: float, tile_size: int
) -> Tensor:
    """``cross_entropy(linear(rms_norm(h), output_weight), labels, reduction="sum")``, never with all logits at once.

    Where gradients are wanted they are computed here, tile by tile beside the loss; backward only scales them by the
    gradient of the loss. Peak memory is the same as of a backward that computes the logits again (``h``, its gradient,
    a tile's logits, the float32 gradient of ``output_weight``), and a quarter of the products is saved. Backward must
    come soon, as it does in training: meanwhile the gradients are kept in place of ``h``.

    ``F.linear_cross_entropy`` (torch 2.13) is no part of this: it takes normalised rows, so that ``rms_norm(h)`` and
    its gradient would live beside ``h`` and its gradient, all of them whole.

    Args:
        h: ``[..., D]``. May be wider than ``output_weight`` (autocast), see
            :func:`~torchtitan_upipe.tiled.mlp.tiled_feed_forward`.
        labels: ``[...]`` int64; rows labelled -100 count for nothing.
        norm_weight: ``[D]``.
        output_weight: ``[V, D]``.
        eps: of the norm.
        tile_size: rows per tile; the last tile may be shorter.

    Returns:
        Scalar, float32 (float64 for float64): the softmax is computed so, too.
    """
    with torch.autocast(h.device.type, enabled=False):
        return _TiledCrossEntropy.apply(torch.is_grad_enabled(), tile_size, eps, h, labels, norm_weight, output_weight)


class _TiledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        with_gradients: bool,
        tile_size: int,
        eps: float,
        h: Tensor,
        labels: Tensor,
        norm_weight: Tensor,
        output_weight: Tensor,
    ) -> Tensor:
        wide = torch.promote_types(output_weight.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=h.device)
        if with_gradients:
            dh = torch.empty_like(h, memory_format=torch.contiguous_format)
            dh_tiles = tiles(dh, tile_size)
            d_norm, d_output = zeros_to_sum(norm_weight), zeros_to_sum(output_weight)

        labels_tiles = labels.flatten().split(tile_size)
        for i, (h_tile, labels_tile) in enumerate(zip(tiles(h, tile_size), labels_tiles, strict=True)):
            n = F.rms_norm(h_tile, norm_weight.shape, norm_weight, eps).to(output_weight.dtype)
            # widened first, so that the narrow logits are gone: dtype=wide widens bfloat16 no later and holds them
            log_p = F.log_softmax(F.linear(n, output_weight).to(wide), dim=-1)  # [tile_size, V]
            loss += F.nll_loss(log_p, labels_tile, reduction="sum", ignore_index=IGNORE_INDEX)
            if not with_gradients:
                del log_p  # else it would wait for the next tile's
                continue
            d_logits = _gradient_of_logits(log_p, labels_tile).to(n.dtype)
            del log_p
            add_weight_gradient(d_output, d_logits, n)
            dh_wide, d_norm_tile = rms_norm_backward(d_logits @ output_weight, h_tile, norm_weight, eps)
            dh_tiles[i].copy_(dh_wide)
            d_norm += d_norm_tile
            del d_logits, dh_wide

        if with_gradients:
            ctx.save_for_backward(dh, d_norm, d_output)
            ctx.dtypes, ctx.tile_size = (norm_weight.dtype, output_weight.dtype), tile_size
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dh, d_norm, d_output = ctx.saved_tensors
        scale = grads[0]
        for tile in tiles(dh, ctx.tile_size):
            tile.copy_(tile.to(scale.dtype) * scale)  # mul_ would round the scale to the dtype of dh first
        norm_dtype, output_dtype = ctx.dtypes
        return None, None, None, dh, None, d_norm.mul_(scale).to(norm_dtype), d_output.mul_(scale).to(output_dtype)


def _gradient_of_logits(log_p: Tensor, labels: Tensor) -> Tensor:
    """``softmax - one_hot``, 0 where the label is ignored; overwrites ``log_p [n, V]``."""
    ignored = labels == IGNORE_INDEX
    index = labels.masked_fill(ignored, 0).unsqueeze(1)  # [n, 1]
    p = log_p.exp_()
    p.scatter_add_(1, index, torch.full_like(index, -1, dtype=p.dtype))
    return p.masked_fill_(ignored.unsqueeze(1), 0)
