"""The two ends of a model whose hidden states are in host memory: embedding, and final norm, logits and loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchtitan_upipe.stash.hidden import HiddenStates
from torchtitan_upipe.tiled.loss import CrossEntropy, scaled
from torchtitan_upipe.tiled.tiles import row_slices, zeros_to_sum


def host_embedding(hidden: HiddenStates, tokens: Tensor, weight: Tensor) -> Tensor:
    """Handle of ``weight[tokens]``: ``tokens [B, N]`` int64 on the device, ``weight [V, D]``.

    The gradient of ``weight`` is summed over tiles in float32.
    """
    return _HostEmbedding.apply(hidden, tokens, weight)


class _HostEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: HiddenStates, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.hidden = hidden
        ctx.save_for_backward(tokens, weight)
        handle = hidden.new(torch.Size((*tokens.shape, weight.shape[1])), weight.dtype, weight.device)
        rows = hidden.of(handle)
        for at in rows.parts():
            rows.write(at, F.embedding(tokens[:, at], weight))
        rows.settle()
        return handle

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        tokens, weight = ctx.saved_tensors
        gradient, d_weight = ctx.hidden.of(grads[0]), zeros_to_sum(weight)
        parts = gradient.parts()
        for at, d_tile in zip(parts, gradient.read(parts), strict=True):
            d_weight.index_add_(0, tokens[:, at].flatten(), d_tile.flatten(0, 1).to(d_weight.dtype))
        return None, None, d_weight.to(weight.dtype)


def host_cross_entropy(
    hidden: HiddenStates,
    h: Tensor,
    labels: Tensor,
    norm_weight: Tensor,
    output_weight: Tensor,
    *,
    eps: float,
    tile_size: int,
) -> Tensor:
    """:func:`~torchtitan_upipe.tiled.loss.tiled_cross_entropy` of the rows that the handle ``h`` stands for.

    Args:
        hidden: has these rows.
        h: handle of ``[B, N, D]``.
        labels: ``[B, N]`` int64 on the device.
        norm_weight: ``[D]``.
        output_weight: ``[V, D]``.
        eps: of the norm.
        tile_size: rows whose logits are there at once.
    """
    with_gradients = torch.is_grad_enabled()
    with torch.autocast(h.device.type, enabled=False):
        return _HostCrossEntropy.apply(hidden, with_gradients, eps, tile_size, h, labels, norm_weight, output_weight)


class _HostCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: HiddenStates,
        with_gradients: bool,
        eps: float,
        tile_size: int,
        h: Tensor,
        labels: Tensor,
        norm_weight: Tensor,
        output_weight: Tensor,
    ) -> Tensor:
        rows, head = hidden.of(h), CrossEntropy(eps, norm_weight, output_weight)
        loss, sums = head.no_loss(), head.new_sums() if with_gradients else ()
        gradient = hidden.new(rows.shape, rows.dtype, rows.device) if with_gradients else h
        parts = rows.parts()
        for at, tile in zip(parts, rows.read(parts), strict=True):
            flat, labels_of_tile = tile.flatten(0, 1), labels[:, at].flatten()
            d_tile = torch.empty_like(flat) if with_gradients else flat
            for few in row_slices(0, len(flat), tile_size):
                loss += head.forward(flat[few], labels_of_tile[few], sums, out=d_tile[few])
            if with_gradients:
                hidden.of(gradient).write(at, d_tile.view_as(tile))
            del tile, flat, d_tile
        if with_gradients:
            hidden.of(gradient).settle()
            ctx.save_for_backward(gradient, *sums)
            ctx.hidden, ctx.dtypes = hidden, (norm_weight.dtype, output_weight.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        gradient, *sums = ctx.saved_tensors
        scale, rows = grads[0], ctx.hidden.of(gradient)
        parts = rows.parts()
        for at, tile in zip(parts, rows.read(parts), strict=True):
            rows.write(at, scaled(tile, scale))
        rows.settle()
        d_weights = (total.mul_(scale).to(dtype) for total, dtype in zip(sums, ctx.dtypes, strict=True))
        return None, None, None, None, gradient, None, *d_weights
