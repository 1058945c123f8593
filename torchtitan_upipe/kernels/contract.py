"""The contract that every attention kernel fulfils, and its autograd wrapper."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients ``dq [B, Sq, h, d]``, ``dk [B, Sk, g, d]``, ``dv [B, Sk, g, d]`` of :meth:`forward`.

        ``out`` and ``lse`` must be those of the whole softmax row, which need not have been made in one call.
        """


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: AttentionKernel, scale: float, causal: bool, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        out, lse = kernel.forward(q, k, v, scale=scale, causal=causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kernel, ctx.scale, ctx.causal = kernel, scale, causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = ctx.kernel.backward(grads[0], q, k, v, out, lse, scale=ctx.scale, causal=ctx.causal)
        return None, None, None, dq, dk, dv


def differentiable_attention(
    kernel: AttentionKernel, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool
) -> Tensor:
    """``kernel.forward`` as an ordinary autograd operation; returns ``out [B, Sq, h, d]``."""
    return _Attention.apply(kernel, scale, causal, q, k, v)
