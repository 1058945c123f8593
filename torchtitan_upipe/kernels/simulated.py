"""A kernel that allocates what a real one allocates and computes nothing, for dry runs under fake tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchtitan_upipe.kernels.contract import accumulate_dtype
from torchtitan_upipe.kernels.deterministic import PROCESSORS, backward_rows, sums_of_dq

FLASH2 = ("auto", "sdpa", "flash2")  # FlashAttention-2
VARLEN = (*FLASH2, "flash3")  # kernels that do many stretches of rows in one call
PADDING = 128  # rows that a variable-length call's sums have more for each stretch


class SimulatedKernel:
    """Outputs of the contract's shapes and, in backward, the workspace of the kernel ``name`` stands for.

    FlashAttention-2, flash-attn's own and the one built into PyTorch (``csrc/flash_attn/flash_api.cpp``, ``mha_bwd``),
    keeps while its backward runs

    - a float32 sum of dq ``[B, S, h, d]``,
    - a float32 row sum of dout * out ``[B, h, S]``,
    - with fewer KV than query heads, dk and dv for each query head ``[B, S, h, d]``, summed over the group at the end.

    The same is assumed of the other kernels; only FlashAttention-2's source was read.

    Under deterministic algorithms FlashAttention-2 keeps several of the first (``deterministic.py``).

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
            workspace(q, k, self._sums(q, 1))
        return dq, dk, dv

    def backward_rows(self, q: Tensor) -> int | None:
        return backward_rows(q, PROCESSORS) if self.name in FLASH2 else None

    def _sums(self, q: Tensor, stretches: int) -> int:
        deterministic = self.name in FLASH2 and torch.are_deterministic_algorithms_enabled()
        return sums_of_dq(q.shape[0] * stretches, q.shape[2], PROCESSORS, deterministic)


class SimulatedVarlenKernel(SimulatedKernel):
    """The same of a kernel that does many stretches of rows in one call."""

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
        return self.forward(q, k, v, scale=scale, causal=causal)

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
        dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        if self.workspace:
            workspace(q, k, self._sums(q, len(q_lengths)), PADDING * len(q_lengths))
        return dq, dk, dv


def workspace(q: Tensor, k: Tensor, sums: int = 1, padding: int = 0) -> None:
    """Hold what a kernel's backward holds beside its results, for a moment: of ``padding`` rows more than ``q`` has."""
    batch, rows, heads, width = q.shape
    kept = [
        q.new_empty(sums, batch, rows + padding, heads, width, dtype=torch.float32),
        q.new_empty(batch, heads, rows + padding, dtype=torch.float32),
    ]
    if q.shape[2] != k.shape[2]:
        kept += [k.new_empty(*k.shape[:2], *q.shape[2:]) for _ in range(2)]


def _row_values(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=accumulate_dtype(q.dtype))  # [B, h, S]
