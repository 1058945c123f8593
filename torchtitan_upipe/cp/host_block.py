"""A transformer block as a function of rows in host memory (docs/design.md, "Hidden states in host memory").

On the device are weights, keys, values and their gradients of one KV set, a query tile of one stage, and the tiles of
hidden states in flight. All else, the block's input and output and the gradients of both included, is on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchtitan_upipe.cp.gradients import LayerGradients
from torchtitan_upipe.cp.stage import StageLayer
from torchtitan_upipe.cp.strategy import AttentionWeights, HeadTransform
from torchtitan_upipe.cp.upipe import UPipe
from torchtitan_upipe.kernels.visibility import Documents
from torchtitan_upipe.stash.hidden import HiddenStates, HostRows
from torchtitan_upipe.stash.stash import Stash
from torchtitan_upipe.tiled.mlp import FeedForward
from torchtitan_upipe.tiled.norm import rms_norm_backward
from torchtitan_upipe.tiled.rows import ALL_ROWS, Rows
from torchtitan_upipe.tiled.tiles import zeros_to_sum


@dataclass(frozen=True)
class BlockWeights:
    """Weights of a block: ``attention_norm [D]``, the attention's, and the feed-forward half's.

    ``ffn_norm [D]``; ``w1 [F, D]``, ``w2 [D, F]``, ``w3 [F, D]`` as ``nn.Linear`` stores them.
    """

    attention_norm: Tensor
    attention: AttentionWeights
    ffn_norm: Tensor
    w1: Tensor
    w2: Tensor
    w3: Tensor


@dataclass(frozen=True)
class HostBlock:
    """A pre-norm block ``h = x + attention(norm(x))``, ``y = h + mlp(norm(h))`` on handles of hidden states.

    Attributes:
        method: the attention's stages.
        hidden: the rows that handles stand for.
        new_stash: makes what keeps the stages' outputs, in host memory.
        keeps: keep them until the backward pass; else attention is computed again there.
        eps: of the attention's and of the feed-forward's norm.
    """

    method: UPipe
    hidden: HiddenStates
    new_stash: Callable[[], Stash]
    keeps: bool
    eps: tuple[float, float]

    def __call__(
        self, x: Tensor, weights: BlockWeights, transform: HeadTransform, head_dim: int, documents: Documents | None
    ) -> Tensor:
        """Handle of ``x [B, N, D]`` to handle of ``y [B, N, D]``.

        The gradients of both take one place in host memory, which passes from block to block.
        """
        flat = vars(weights) | vars(weights.attention)
        flat.pop("attention")
        with torch.autocast(x.device.type, enabled=False):
            return _HostBlock.apply(self, _Options(transform, head_dim, documents), tuple(flat), x, *flat.values())

    def layer(self, rows: HostRows, weights: dict[str, Tensor], options: _Options) -> StageLayer:
        """The attention's phases, on the normalised rows."""
        attention = [weights.get(name) for name in AttentionWeights.__dataclass_fields__]
        x = self.normalised(rows, weights)
        return self.method.stage_layer(x, attention, options.transform, options.head_dim, options.documents)

    def normalised(self, rows: HostRows, weights: dict[str, Tensor]) -> NormalisedRows:
        """The attention's input."""
        return NormalisedRows(rows, weights["attention_norm"], self.eps[0])

    def tiles(self, layer: StageLayer) -> list[slice]:
        """The rows that the device has at once, none of them of two query tiles."""
        return [at for tile in self.method.query_tiles(layer) for at in layer.x.small_parts(*tile)]

    def after_attention(self, rows: HostRows, layer: StageLayer, outputs: Stash) -> Iterator[tuple[slice, Tensor]]:
        """``h = x + attention(norm(x))``: rows, and ``[B, rows, D]`` of them, tile by tile."""
        projected = self.method.project_out(layer, outputs)
        x = rows.read(self.tiles(layer))
        return ((at, part.add_(next(x))) for at, part in projected)

    def feed_forward(self, weights: dict[str, Tensor]) -> FeedForward:
        """The block's second half."""
        return FeedForward(self.eps[1], *(weights[name] for name in ("ffn_norm", "w1", "w2", "w3")))


@dataclass(frozen=True)
class _Options:
    transform: HeadTransform
    head_dim: int
    documents: Documents | None


@dataclass(frozen=True)
class NormalisedRows:
    """:class:`~torchtitan_upipe.tiled.rows.Rows` of hidden states, normalised as they arrive."""

    rows: Rows
    weight: Tensor
    eps: float

    @property
    def shape(self) -> torch.Size:
        """See :class:`~torchtitan_upipe.tiled.rows.Rows`."""
        return self.rows.shape

    @property
    def dtype(self) -> torch.dtype:
        """See :class:`~torchtitan_upipe.tiled.rows.Rows`."""
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        """See :class:`~torchtitan_upipe.tiled.rows.Rows`."""
        return self.rows.device

    def read(self, slices: Iterable[slice]) -> Iterator[Tensor]:
        """See :class:`~torchtitan_upipe.tiled.rows.Rows`."""
        return map(self.normalise, self.rows.read(slices))

    def normalise(self, x: Tensor) -> Tensor:
        """The norm of a tile."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def parts(self, rows: slice = ALL_ROWS) -> list[slice]:
        """See :class:`~torchtitan_upipe.tiled.rows.Rows`."""
        return self.rows.parts(rows)

    def small_parts(self, start: int, stop: int) -> list[slice]:
        """See :class:`~torchtitan_upipe.tiled.rows.Rows`."""
        return self.rows.small_parts(start, stop)


class _HostBlock(torch.autograd.Function):
    """The tensors after the handle ``x`` are the weights, by ``names``."""

    @staticmethod
    def forward(
        ctx: Any, block: HostBlock, options: _Options, names: tuple[str, ...], x: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        weights = _named(names, tensors)
        rows = block.hidden.of(x)
        layer, outputs = block.layer(rows, weights, options), block.new_stash()
        block.method.attend(layer, outputs)

        # second half, tile by tile
        y = block.hidden.new(rows.shape, rows.dtype, rows.device)
        out, feed_forward = block.hidden.of(y), block.feed_forward(weights)
        for at, h in block.after_attention(rows, layer, outputs):
            tile = torch.empty_like(h)
            feed_forward.forward(h.flatten(0, 1), out=tile.flatten(0, 1))
            del h
            out.write(at, tile)
            del tile
        out.settle()

        ctx.save_for_backward(x, *tensors)
        ctx.block, ctx.options, ctx.names = block, options, names
        ctx.stash = outputs if block.keeps else None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *tensors = ctx.saved_tensors
        block: HostBlock = ctx.block
        weights = _named(ctx.names, tensors)
        rows, gradient = block.hidden.of(x), block.hidden.of(grads[0])
        layer, stash = block.layer(rows, weights, ctx.options), ctx.stash
        if stash is None:
            stash = block.new_stash()
            block.method.attend(layer, stash)

        # back through the second half, dy to dh in its place
        d_weights = _feed_forward_backward(block, weights, rows, layer, stash, gradient)

        # back through attention, from dh
        total = LayerGradients(layer.x, layer.weights, ctx.options.head_dim, stash.put_away)
        block.method.attend_backward(layer, stash, gradient, total)

        # back through the projections and the first norm, dh to dx in its place
        d_weights |= _input_backward(block, weights, rows, total, gradient)
        return None, None, None, grads[0], *(d_weights.get(name) for name in ctx.names)


def _feed_forward_backward(
    block: HostBlock,
    weights: dict[str, Tensor],
    rows: HostRows,
    layer: StageLayer,
    stash: Stash,
    gradient: HostRows,
) -> dict[str, Tensor]:
    """``gradient``, that of the block's output, becomes that of ``h``; gradients of the second half's weights."""
    feed_forward = block.feed_forward(weights)
    sums = feed_forward.new_sums()
    d_out = gradient.read(block.tiles(layer))
    for at, h in block.after_attention(rows, layer, stash):
        dh = torch.empty_like(h)
        feed_forward.backward(h.flatten(0, 1), next(d_out).flatten(0, 1), sums, out=dh.flatten(0, 1))
        del h
        gradient.write(at, dh)
        del dh
    gradient.settle()
    names = ("ffn_norm", "w1", "w2", "w3")
    return {name: total.to(weights[name].dtype) for name, total in zip(names, sums, strict=True)}


def _input_backward(
    block: HostBlock, weights: dict[str, Tensor], rows: HostRows, total: LayerGradients, gradient: HostRows
) -> dict[str, Tensor]:
    """``gradient``, that of ``h``, becomes that of the block's input; gradients of the first half's weights."""
    norm = block.normalised(rows, weights)
    d_norm = zeros_to_sum(norm.weight)
    slices = rows.small_parts(0, rows.shape[1])
    heads, xs, d_outs = total.heads(slices), rows.read(slices), gradient.read(slices)
    for at in slices:
        x = next(xs)
        dn = total.project_back(next(heads), norm.normalise(x))
        dx, d_norm_tile = rms_norm_backward(dn.flatten(0, 1), x.flatten(0, 1), norm.weight, norm.eps)
        d_norm += d_norm_tile
        gradient.write(at, next(d_outs).add(dx.view_as(x)).to(x.dtype))
        del x, dn, dx
    gradient.settle()
    found = {name: total.weight(name) for name in AttentionWeights.__dataclass_fields__ if name in weights}
    return {"attention_norm": d_norm.to(norm.weight.dtype)} | {k: v for k, v in found.items() if v is not None}


def _named(names: Sequence[str], tensors: Sequence[Tensor | None]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in zip(names, tensors, strict=True) if tensor is not None}
