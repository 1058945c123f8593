"""What a model's attention hands to a context-parallel method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from torchtitan_upipe.cp.attention import SequenceAttention
from torchtitan_upipe.kernels.visibility import Documents


class HeadTransform(Protocol):
    """What happens to query and key heads between projection and attention: Qwen3's norm (or nothing), then RoPE."""

    def __call__(self, heads: Tensor, norm_weight: Tensor | None) -> Tensor:
        """``[B, N, h, d]`` to the same shape and dtype; differentiable. ``norm_weight [d]`` or None for no norm."""

    def apply_(self, heads: Tensor, norm_weight: Tensor | None, rows: slice) -> Tensor:
        """The same for the tokens ``rows``, ``[B, n, h, d]``, not differentiable. Without a norm, in place."""

    def rows(self, rows: slice) -> HeadTransform:
        """The same for the tokens ``rows`` alone."""

    def vjp_(
        self, grad: Tensor, heads: Tensor | None, norm_weight: Tensor | None, rows: slice
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of ``heads`` and ``norm_weight`` from ``grad [B, n, h, d]`` of the tokens ``rows``.

        ``grad`` is overwritten; ``heads`` is read only by a norm. The gradient of ``norm_weight`` is float32 (float64
        for float64 weights).
        """


@dataclass(frozen=True)
class AttentionWeights:
    """Weights of one attention layer, as the checkpoint stores them.

    ``wq [H*d, D]``, ``wk [G*d, D]``, ``wv [G*d, D]``, ``wo [D, H*d]``; ``q_norm [d]`` and ``k_norm [d]`` or None;
    biases ``bq [H*d]``, ``bk [G*d]`` and ``bv [G*d]`` or None. A bias of the output is the caller's to add.
    """

    wq: Tensor
    wk: Tensor
    wv: Tensor
    wo: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    bq: Tensor | None = None
    bk: Tensor | None = None
    bv: Tensor | None = None

    def to(self, dtype: torch.dtype) -> AttentionWeights:
        """The same weights in ``dtype`` (differentiable)."""
        cast = {name: None if w is None else w.to(dtype) for name, w in vars(self).items()}
        return replace(self, **cast)  # type: ignore[arg-type]


class ContextParallelMethod(Protocol):
    """A context-parallel method: the whole attention layer of one rank's tokens, projections included."""

    attention: SequenceAttention

    def __call__(
        self,
        x: Tensor,
        weights: AttentionWeights,
        transform: HeadTransform,
        head_dim: int,
        documents: Documents | None = None,
    ) -> Tensor:
        """Attention layer (docs/design.md, "One attention layer").

        Args:
            x: ``[B, N, D]``, this rank's normalised hidden states.
            weights: in the dtype of ``x``.
            transform: norm and RoPE of this rank's positions.
            head_dim: ``d``.
            documents: of the whole sequences, or None for one document each.

        Returns:
            ``y [B, N, D]`` after the output projection.
        """
