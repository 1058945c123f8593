"""Final norm, logits and cross entropy in tiles of rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
        head = CrossEntropy(eps, norm_weight, output_weight)
        loss, sums = head.no_loss(), head.new_sums() if with_gradients else ()
        dh = torch.empty_like(h, memory_format=torch.contiguous_format) if with_gradients else h
        parts = (tiles(h, tile_size), labels.flatten().split(tile_size), tiles(dh, tile_size))
        for h_tile, labels_tile, dh_tile in zip(*parts, strict=True):
            loss += head.forward(h_tile, labels_tile, sums, out=dh_tile)

        if with_gradients:
            ctx.save_for_backward(dh, *sums)
            ctx.dtypes, ctx.tile_size = (norm_weight.dtype, output_weight.dtype), tile_size
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dh, *sums = ctx.saved_tensors
        scale = grads[0]
        for tile in tiles(dh, ctx.tile_size):
            tile.copy_(scaled(tile, scale))
        d_weights = (total.mul_(scale).to(dtype) for total, dtype in zip(sums, ctx.dtypes, strict=True))
        return None, None, None, dh, None, *d_weights


@dataclass(frozen=True)
class CrossEntropy:
    """A tile of final norm, logits and cross entropy; see :func:`tiled_cross_entropy` and :func:`tiled_scores`."""

    eps: float
    norm_weight: Tensor
    output_weight: Tensor

    def no_loss(self) -> Tensor:
        """The sum over no tiles."""
        return torch.zeros((), dtype=self._wide, device=self.output_weight.device)

    def new_sums(self) -> tuple[Tensor, ...]:
        """Where :meth:`forward` sums the gradients of the weights, in their order."""
        return zeros_to_sum(self.norm_weight), zeros_to_sum(self.output_weight)

    def forward(self, h: Tensor, labels: Tensor, sums: Sequence[Tensor], out: Tensor) -> Tensor:
        """The loss of a tile ``h [n, D]``, ``labels [n]``.

        Args:
            sums: of :meth:`new_sums`, to be added to; none where no gradients are wanted.
            out: ``[n, D]`` for the gradient of ``h``, if they are.
        """
        n = F.rms_norm(h, self.norm_weight.shape, self.norm_weight, self.eps).to(self.output_weight.dtype)
        # widened first, so that the narrow logits are gone: dtype=wide widens bfloat16 no later and holds them
        log_p = F.log_softmax(F.linear(n, self.output_weight).to(self._wide), dim=-1)  # [n, V]
        loss = F.nll_loss(log_p, labels, reduction="sum", ignore_index=IGNORE_INDEX)
        if not sums:
            return loss
        d_norm, d_output = sums
        d_logits = _gradient_of_logits(log_p, labels).to(n.dtype)
        del log_p
        add_weight_gradient(d_output, d_logits, n)
        dh, d_norm_tile = rms_norm_backward(d_logits @ self.output_weight, h, self.norm_weight, self.eps)
        out.copy_(dh)
        d_norm += d_norm_tile
        return loss

    def scores(self, h: Tensor, labels: Tensor) -> Tensor:
        """What :func:`score_logits` says of a tile ``h [n, D]``, ``labels [n]``, none of them ignored."""
        n = F.rms_norm(h, self.norm_weight.shape, self.norm_weight, self.eps).to(self.output_weight.dtype)
        return score_logits(F.linear(n, self.output_weight), labels)

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.output_weight.dtype, torch.float32)


def tiled_scores(head: CrossEntropy, parts: Iterable[tuple[slice, Tensor]], labels: Tensor, tile_size: int) -> Tensor:
    """Log-probabilities of labels and whether they are the likeliest tokens, of the rows that have a label alone.

    Args:
        head: final norm and output layer.
        parts: ``(rows, h[:, rows])`` of hidden states ``h [B, N, D]``, all of them.
        labels: ``[B, N]`` int64; rows labelled -100 are not computed.
        tile_size: rows whose logits are there at once.

    Returns:
        ``[2, B, N]`` float32, 0 for rows without a label.
    """
    scores = torch.zeros(2, *labels.shape, dtype=torch.float32, device=labels.device)
    with torch.autocast(labels.device.type, enabled=False):
        for rows, h in parts:
            places = (labels[:, rows] != IGNORE_INDEX).nonzero(as_tuple=True)
            for few in zip(*(place.split(tile_size) for place in places), strict=True):
                scores[:, :, rows][:, *few] = head.scores(h[few], labels[:, rows][few]).float()
    return scores


def score_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, and 1 where it is the likeliest token, else 0: ``[2, n]`` float32 (or wider).

    Args:
        logits: ``[n, V]``.
        labels: ``[n]`` int64, none of them ignored.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = wide.log_softmax(dim=-1).gather(1, labels[:, None]).squeeze(1)
    return torch.stack([log_p, (wide.argmax(dim=-1) == labels).to(log_p.dtype)])


def scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """``gradient * scale`` for a float32 scalar; ``mul_`` would round the scale to the dtype of the gradient first."""
    return (gradient.to(scale.dtype) * scale).to(gradient.dtype)


def _gradient_of_logits(log_p: Tensor, labels: Tensor) -> Tensor:
    """``softmax - one_hot``, 0 where the label is ignored; overwrites ``log_p [n, V]``."""
    ignored = labels == IGNORE_INDEX
    index = labels.masked_fill(ignored, 0).unsqueeze(1)  # [n, 1]
    p = log_p.exp_()
    p.scatter_add_(1, index, torch.full_like(index, -1, dtype=p.dtype))
    return p.masked_fill_(ignored.unsqueeze(1), 0)
