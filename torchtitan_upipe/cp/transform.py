"""Norm and RoPE of query and key heads, forward and backward, some rows at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_upipe.cp.rope import Rope
from torchtitan_upipe.kernels.contract import accumulate_dtype
from torchtitan_upipe.tiled.tiles import row_slices, slice_size


@dataclass(frozen=True)
class NormThenRope:
    """What Llama (RoPE) and Qwen3 (RMSNorm over ``d``, then RoPE) do to query and key heads."""

    rope: Rope
    norm_eps: float

    def __call__(self, heads: Tensor, norm_weight: Tensor | None) -> Tensor:
        """See :class:`~torchtitan_upipe.cp.strategy.HeadTransform`."""
        return self.rope(heads if norm_weight is None else self._norm(heads, norm_weight))

    def apply_(self, heads: Tensor, norm_weight: Tensor | None, rows: slice) -> Tensor:
        """See :class:`~torchtitan_upipe.cp.strategy.HeadTransform`."""
        if norm_weight is not None:
            normed = torch.empty_like(heads)
            for at in row_slices(0, heads.shape[1], slice_size(heads.shape[1])):
                normed[:, at] = self._norm(heads[:, at], norm_weight)
            heads = normed
        return self.rope.rotate_(heads, rows)

    def rows(self, rows: slice) -> NormThenRope:
        """See :class:`~torchtitan_upipe.cp.strategy.HeadTransform`."""
        return replace(self, rope=replace(self.rope, positions=self.rope.positions[:, rows]))

    def vjp_(
        self, grad: Tensor, heads: Tensor | None, norm_weight: Tensor | None, rows: slice
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`~torchtitan_upipe.cp.strategy.HeadTransform`."""
        grad = self.rope.rotate_(grad, rows, back=True)
        if norm_weight is None:
            return grad, None
        if heads is None:
            raise ValueError("the gradient of a norm needs the heads that were normalised")
        wide = accumulate_dtype(norm_weight.dtype)  # the caller sums d_weight over stages
        weight = norm_weight.detach().to(wide).requires_grad_()
        d_weight = torch.zeros_like(weight)
        for at in row_slices(0, grad.shape[1], slice_size(grad.shape[1])):
            with torch.enable_grad():
                inputs = heads[:, at].detach().to(wide).requires_grad_(), weight
                out = self._norm(*inputs)
            d_heads, d_part = torch.autograd.grad(out, inputs, grad[:, at].to(wide))
            grad[:, at] = d_heads
            d_weight += d_part
        return grad, d_weight

    def _norm(self, heads: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(heads, weight.shape, weight, self.norm_eps)
