"""PyTorch's own fused attention operators, called directly because they return the log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchtitan_upipe.kernels.deterministic import backward_rows
from torchtitan_upipe.kernels.varlen import offsets, pack_lse, unpack_lse

aten = torch.ops.aten


class CpuFlashKernel:
    """``aten::_scaled_dot_product_flash_attention_for_cpu``: FlashAttention-2 for CPUs; float64 too."""

    name = "sdpa"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*_bhsd(q, k, v), 0.0, causal, scale=scale)
        return out.transpose(1, 2), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *_bhsd(dout, q, k, v, out), lse, 0.0, causal, scale=scale
        )
        return _bhsd(*grads)  # type: ignore[return-value]

    def backward_rows(self, q: Tensor) -> int | None:
        return None


class CudaFlashKernel:
    """``aten::_scaled_dot_product_flash_attention``: FlashAttention-2 as built into PyTorch for CUDA.

    PyTorch can replace what stands behind this operator (``torch.nn.attention.activate_flash_attention_impl``);
    ``flash3`` uses that. Without dropout the operator's random state is never read, so backward passes empty ones.
    """

    def __init__(self, name: str = "sdpa") -> None:
        self.name = name

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(*_bhsd(q, k, v), 0.0, causal, False, scale=scale)
        return out.transpose(1, 2), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        seed, offset = torch.empty((2, 0), dtype=torch.uint64, device=q.device)
        grads = aten._scaled_dot_product_flash_attention_backward(
            *_bhsd(dout, q, k, v, out),
            lse.contiguous(),  # read by its address
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            causal,
            seed,
            offset,
            scale=scale,
        )
        return _bhsd(*grads)  # type: ignore[return-value]

    def backward_rows(self, q: Tensor) -> int | None:
        return backward_rows(q) if self.name == "sdpa" else None

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
        batch = q.shape[0]
        rows, keys = offsets(q_lengths, batch, q.device), offsets(k_lengths, batch, q.device)
        out, lse, *_ = aten._flash_attention_forward(
            *(t.flatten(0, 1) for t in (q, k, v)),
            rows.cumulative,
            keys.cumulative,
            rows.longest,
            keys.longest,
            0.0,
            causal,
            False,
            scale=scale,
        )
        return out.view(q.shape), unpack_lse(lse, batch)

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
        batch = q.shape[0]
        rows, keys = offsets(q_lengths, batch, q.device), offsets(k_lengths, batch, q.device)
        seed, offset = torch.empty((2, 0), dtype=torch.uint64, device=q.device)
        dq, dk, dv = aten._flash_attention_backward(
            *(t.flatten(0, 1) for t in (dout, q, k, v, out)),
            pack_lse(lse),
            rows.cumulative,
            keys.cumulative,
            rows.longest,
            keys.longest,
            0.0,
            causal,
            seed,
            offset,
            scale=scale,
        )
        return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


class CudnnKernel:
    """``aten::_scaled_dot_product_cudnn_attention``: cuDNN's fused attention (Hopper and later)."""

    name = "cudnn"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            *_bhsd(q, k, v), None, True, 0.0, causal, False, scale=scale
        )
        return out.transpose(1, 2), lse.flatten(2)  # [B, h, S, 1] -> [B, h, S]

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        seed, offset = torch.zeros(2, dtype=torch.int64, device=q.device)
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            *_bhsd(dout, q, k, v, out),
            lse.contiguous().unsqueeze(-1),
            seed,
            offset,
            None,
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            causal,
            scale=scale,
        )
        return _bhsd(*grads)  # type: ignore[return-value]

    def backward_rows(self, q: Tensor) -> int | None:
        return None


def _bhsd(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.transpose(1, 2) for t in tensors)  # [B, S, h, d] <-> [B, h, S, d], views
