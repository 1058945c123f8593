"""What a model's attention hands to a context-parallel method, and what the methods share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from torchtitan_upipe.cp.head_schedule import HeadPlacement
from torchtitan_upipe.kernels.contract import AttentionKernel


class HeadTransform(Protocol):
    """What happens to query and key heads between projection and attention: Qwen3's norm (or nothing), then RoPE."""

    def __call__(self, heads: Tensor, norm_weight: Tensor | None) -> Tensor:
        """``[B, N, h, d]`` to the same shape and dtype; differentiable. ``norm_weight [d]`` or None for no norm."""

    def vjp(self, grad: Tensor, heads: Tensor | None, norm_weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gradients of ``heads`` and ``norm_weight`` from ``grad [B, N, h, d]``.

        ``heads`` is read only by a norm. The gradient of ``norm_weight`` is float32 (float64 for float64 weights).
        """


@dataclass(frozen=True)
class AttentionWeights:
    """Weights of one attention layer, as the checkpoint stores them.

    ``wq [H*d, D]``, ``wk [G*d, D]``, ``wv [G*d, D]``, ``wo [D, H*d]``; ``q_norm [d]`` and ``k_norm [d]`` or None.
    """

    wq: Tensor
    wk: Tensor
    wv: Tensor
    wo: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    def to(self, dtype: torch.dtype) -> AttentionWeights:
        """The same weights in ``dtype`` (differentiable)."""
        cast = {name: None if w is None else w.to(dtype) for name, w in vars(self).items()}
        return replace(self, **cast)  # type: ignore[arg-type]


class ContextParallelMethod(Protocol):
    """A context-parallel method: the whole attention layer of one rank's tokens, projections included."""

    kernel: AttentionKernel

    def __call__(self, x: Tensor, weights: AttentionWeights, transform: HeadTransform, head_dim: int) -> Tensor:
        """Attention layer (DESIGN: one attention layer, stage by stage).

        Args:
            x: ``[B, N, D]``, this rank's normalised hidden states.
            weights: in the dtype of ``x``.
            transform: norm and RoPE of this rank's positions.
            head_dim: ``d``.

        Returns:
            ``y [B, N, D]`` after the output projection.
        """


def split_by_rank(heads: Tensor, placement: HeadPlacement) -> list[Tensor]:
    """Views of ``heads [B, N, h, d]``, whose heads are ``placement.distinct``, as each rank needs them.

    A head that several ranks need (``G < C``) stands in several pieces. Within one rank the heads are consecutive.
    """
    index = {head: i for i, head in enumerate(placement.distinct)}
    return [
        heads[:, :, index[on_rank[0]] : index[on_rank[-1]] + 1] if on_rank else heads[:, :, :0]
        for on_rank in placement.heads
    ]


def sum_copies(pieces: Sequence[Tensor], placement: HeadPlacement) -> Tensor:
    """Transpose of :func:`split_by_rank`: ``[B, N, len(distinct), d]``, the copies of each head summed.

    Copies are summed in float32 (float64 stays) and rounded once.
    """
    index = {head: i for i, head in enumerate(placement.distinct)}
    first = pieces[0]
    total = first.new_zeros((*first.shape[:2], len(index), first.shape[3]), dtype=accumulate_dtype(first.dtype))
    for piece, on_rank in zip(pieces, placement.heads, strict=True):
        if on_rank:
            total[:, :, index[on_rank[0]] : index[on_rank[-1]] + 1] += piece
    return total.to(first.dtype)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of ``dtype`` terms are kept: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
