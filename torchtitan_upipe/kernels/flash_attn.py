"""The ``flash-attn`` package (FlashAttention-2, an optional extra) behind the kernel contract."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)
from torch import Tensor

from torchtitan_upipe.kernels.deterministic import backward_rows
from torchtitan_upipe.kernels.varlen import offsets, pack_lse, unpack_lse

FIXED = {"dropout_p": 0.0, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}


class FlashAttn2Kernel:
    """``flash_attn`` 2.8: layouts are the contract's own, gradients are written in place."""

    name = "flash2"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse, _, _ = _flash_attn_forward(
            q,
            k,
            v,
            softmax_scale=scale,
            causal=causal,
            return_softmax=False,
            **FIXED,
        )
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _flash_attn_backward(
            dout.contiguous(),
            q,
            k,
            v,
            out,
            lse.contiguous(),  # read by its address
            dq,
            dk,
            dv,
            softmax_scale=scale,
            causal=causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **FIXED,
        )
        return dq, dk, dv

    def backward_rows(self, q: Tensor) -> int | None:
        return backward_rows(q)

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
        out, lse, _, _ = _flash_attn_varlen_forward(
            *(t.flatten(0, 1) for t in (q, k, v)),
            rows.cumulative,
            keys.cumulative,
            rows.longest,
            keys.longest,
            softmax_scale=scale,
            causal=causal,
            return_softmax=False,
            **FIXED,
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
        inputs = [t.flatten(0, 1) for t in (dout, q, k, v, out)]
        dq, dk, dv = (torch.empty_like(t) for t in inputs[1:4])
        _flash_attn_varlen_backward(
            *inputs,
            pack_lse(lse),
            dq,
            dk,
            dv,
            rows.cumulative,
            keys.cumulative,
            rows.longest,
            keys.longest,
            softmax_scale=scale,
            causal=causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **FIXED,
        )
        return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)
