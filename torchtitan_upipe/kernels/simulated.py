"""A kernel that allocates what a real one allocates and computes nothing, for dry runs under fake tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from torchtitan_upipe.kernels.contract import accumulate_dtype


class SimulatedKernel:
    """Outputs of the contract's shapes and, in backward, the workspace of the kernel ``name`` stands for.

    FlashAttention-2, flash-attn's own and the one built into PyTorch (``csrc/flash_attn/flash_api.cpp``, ``mha_bwd``),
    keeps while its backward runs

    - a float32 sum of dq ``[B, S, h, d]``,
    - a float32 row sum of dout * out ``[B, h, S]``,
    - with fewer KV than query heads, dk and dv for each query head ``[B, S, h, d]``, summed over the group at the end.

    The same is assumed of the other kernels; only FlashAttention-2's source was read.

    Args:
        name: of the real kernel.
        workspace: count the workspace.
    """

    def __init__(self, name: str, workspace: bool = True) -> None:
        self.name = name
        self.workspace = workspace

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        return torch.empty_like(q, memory_format=torch.contiguous_format), _row_values(q)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        if self.workspace:
            workspace(q, k)
        return dq, dk, dv


def workspace(q: Tensor, k: Tensor) -> None:
    """Hold what a kernel's backward holds beside its results, for a moment."""
    kept = [torch.empty_like(q, dtype=torch.float32), _row_values(q)]
    if q.shape[2] != k.shape[2]:
        kept += [k.new_empty(*k.shape[:2], *q.shape[2:]) for _ in range(2)]


def _row_values(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=accumulate_dtype(q.dtype))  # [B, h, S]
