"""Rotary position embedding of head shards, with its inverse, for any positions and without a table of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from torchtitan_upipe.kernels.contract import accumulate_dtype
from torchtitan_upipe.tiled.tiles import row_slices

ROWS = 8192  # tokens rotated at a time: what bounds the float32 temporaries


@dataclass(frozen=True)
class Rope:
    """Rotation of ``[B, n, h, d]`` by each token's position (RoFormer, arXiv 2104.09864).

    Angles are float64 products, rounded to the heads' working precision once reduced to one turn: a float32 product,
    as a table holds it, is off by up to 0.3 rad at position 5,000,000. No more than ``ROWS`` tokens are in float32 at
    a time.

    Attributes:
        frequencies: ``[d/2]``, float64: radians per position.
        positions: ``[B or 1, N]`` int64, of this rank's tokens.
        interleaved: pairs are ``(0, 1), (2, 3), ..`` (Llama in TorchTitan's layout); else ``(i, i + d/2)`` (Qwen).
    """

    frequencies: Tensor
    positions: Tensor
    interleaved: bool

    def __call__(self, heads: Tensor) -> Tensor:
        """Rotate the heads of all tokens, in float32 (float64 for float64); a new tensor, differentiable."""
        return _Rotate.apply(heads, self)

    def rotate_(self, heads: Tensor, rows: slice = slice(None), *, inverse: bool = False) -> Tensor:
        """Rotate the heads of the tokens ``rows`` in place, or back; returns ``heads``.

        Back is the inverse and, a rotation being orthogonal, also the transpose.
        """
        positions = self.positions[:, rows]
        for at in row_slices(0, heads.shape[1], ROWS):
            part = heads[:, at]
            wide = part.to(accumulate_dtype(part.dtype))
            angles = positions[:, at, None, None].double() * self.frequencies  # [B or 1, n, 1, d/2]
            angles = angles.remainder(2 * math.pi).to(wide.dtype)
            cos, sin = angles.cos(), -angles.sin() if inverse else angles.sin()
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


@dataclass(frozen=True)
class RopeOfModel:
    """How one of TorchTitan's models rotates.

    Attributes:
        table: name of the model's buffer of angles for all positions.
        frequencies: from the model's arguments to ``[d/2]`` float64.
        interleaved: see :class:`Rope`.
    """

    table: str
    frequencies: Callable[[Any], Tensor]
    interleaved: bool

    def drop_table(self, model: nn.Module) -> None:
        """Let ``model``, on the meta device, have an empty table: at 5M positions it takes 2.7 GB and is not read."""
        setattr(model, f"_precompute_{self.table}", lambda: torch.empty(0))
        setattr(model, self.table, torch.empty(0, device="meta"))


def llama_frequencies(model_args: Any) -> Tensor:
    """Frequencies of TorchTitan's Llama3, with the scaling of long wavelengths that came with Llama 3.1."""
    scaling = model_args.rope_scaling_args
    plain = _frequencies(model_args.dim // model_args.n_heads, model_args.rope_theta)
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)  # within the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return plain * ((1 - kept) / scaling.scaling_factor + kept)


def qwen_frequencies(model_args: Any) -> Tensor:
    """Frequencies of TorchTitan's Qwen3."""
    return _frequencies(model_args.head_dim, model_args.rope_theta)


def _frequencies(head_dim: int, theta: float) -> Tensor:
    """``theta^(-2i/d)``, in float32 like the models' own and then widened: a checkpoint was trained with these."""
    exponents = torch.arange(0, head_dim, 2).float() / head_dim
    return (1.0 / theta**exponents).double()


LLAMA_ROPE = RopeOfModel("freqs_cis", llama_frequencies, interleaved=True)
QWEN_ROPE = RopeOfModel("rope_cache", qwen_frequencies, interleaved=False)
