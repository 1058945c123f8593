"""The contract that every attention kernel fulfils."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeGuard

import torch
from torch import Tensor


class AttentionKernel(Protocol):
    """Exact attention with an explicit log-sum-exp (FlashAttention, arXiv 2205.14135, section 3).

    Both methods are plain functions of their arguments: nothing is recorded by autograd, nothing is kept. ``h`` must
    be a multiple of ``g``; query head ``i`` uses KV head ``i // (h / g)``.
    """

    name: str

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            q: ``[B, Sq, h, d]``.
            k: ``[B, Sk, g, d]``, the dtype of ``q``.
            v: ``[B, Sk, g, d]``, the dtype of ``q``.
            scale: factor on ``q @ k^T``.
            causal: query ``i`` sees keys ``0 .. i`` (needs ``Sq == Sk``).

        Returns:
            ``out [B, Sq, h, d]`` in the dtype of ``q`` and ``lse [B, h, Sq]`` (natural logarithm) in float32, or in
            float64 where ``q`` is float64.
        """

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients ``dq [B, Sq, h, d]``, ``dk [B, Sk, g, d]``, ``dv [B, Sk, g, d]`` of :meth:`forward`.

        ``out`` and ``lse`` must be those of the whole softmax row, which need not have been made in one call.
        """

    def backward_rows(self, q: Tensor) -> int | None:
        """Query rows that one :meth:`backward` for ``q`` should have at most; None where any number is as good."""


class VarlenKernel(AttentionKernel, Protocol):
    """A kernel that also does many independent stretches of rows in one call (packed documents on GPUs)."""

    def forward_varlen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_lengths: Sequence[int],
        k_lengths: Sequence[int],
        *,
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        """Attend stretch by stretch.

        Args:
            q: ``[B, sum(q_lengths), h, d]``, the stretches side by side, the same in every sequence of the batch.
            k: ``[B, sum(k_lengths), g, d]``.
            v: ``[B, sum(k_lengths), g, d]``.
            q_lengths: rows of each stretch; equal to ``k_lengths`` if ``causal``.
            k_lengths: keys of each stretch.

        Returns:
            ``out`` in the shape of ``q`` and ``lse [B, h, sum(q_lengths)]``.
        """

    def backward_varlen(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        q_lengths: Sequence[int],
        k_lengths: Sequence[int],
        *,
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients ``dq, dk, dv`` of :meth:`forward_varlen`; ``out, lse`` as in :meth:`AttentionKernel.backward`."""


def does_varlen(kernel: AttentionKernel) -> TypeGuard[VarlenKernel]:
    """Whether ``kernel`` is a :class:`VarlenKernel`. Asked at every call, for which ``isinstance`` would be slow."""
    return hasattr(kernel, "forward_varlen")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of ``dtype`` terms are kept: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
