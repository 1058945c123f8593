"""CUDA's attention kernels on CPU: real numbers, and what the real ones promise and no more.

:class:`StrictAten` stands in the place of ``torch.ops.aten`` in ``kernels/sdpa.py``, :class:`StrictFlashAttn` in that
of the ``flash_attn`` package, so that the wrappers run as they are, with their layouts, their variable-length calls and
their arguments. As FlashAttention-2 does:

- the last dimension of q, k, v must be contiguous; other strides are free;
- ``lse`` is read by its address, as if it were contiguous, whatever its strides say;
- ``dout`` and ``out`` may have any strides where the operator copies them (aten's do, flash-attn's wants a contiguous
  last dimension);
- offsets are int32 and cover the rows;
- the backward of a variable-length call, or of a batch, counts elements up to ``largest`` (32 bits).
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from torchtitan_upipe.cp import attention
from torchtitan_upipe.kernels import launches, sdpa
from torchtitan_upipe.kernels.contract import AttentionKernel
from torchtitan_upipe.kernels.reference import ReferenceKernel

NUMBERS = ReferenceKernel()


class Strict:
    """Counts its calls by operator, in ``calls``; ``largest`` is as far as a backward counts."""

    def __init__(self, largest: int = 2**31 - 1) -> None:
        self.calls: dict[str, int] = {}
        self.largest = largest

    def _called(self, name: str, *tensors: Tensor) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        assert all(t.stride(-1) == 1 for t in tensors), "the last dimension must be contiguous"

    def _counts(self, q: Tensor, k: Tensor, several: bool) -> None:
        if several:  # keys have a gradient for each query head until the end
            heads = max(q.numel(), k.numel() // k.shape[-2] * q.shape[-2])
            assert heads <= self.largest, "an index beyond 32 bits"

    def _varlen_forward(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, keys: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        self._called("varlen forward", q, k, v)
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float))
        for at, over in stretches(q, k, rows, keys):
            out[at], part = one(NUMBERS.forward, (q[at], k[over], v[over]), scale, causal)
            lse[:, at] = part
        return out, lse

    def _varlen_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        self._called("varlen backward", q, k, v)
        self._counts(q, k, several=True)
        rows, keys, scale, causal = rest
        lse = by_address(lse)
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        for at, over in stretches(q, k, rows, keys):
            inputs = (dout[at], q[at], k[over], v[over], out[at], lse[:, at])
            dq[at], dk[over], dv[over] = one(NUMBERS.backward, inputs, scale, causal)
        return dq, dk, dv


class StrictAten(Strict):
    """``torch.ops.aten`` with the operators of ``"sdpa"`` and ``"cudnn"``."""

    def _scaled_dot_product_flash_attention(
        self, q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, debug: bool, *, scale: float
    ) -> tuple[Tensor, ...]:
        self._called("forward", q, k, v)
        out, lse = NUMBERS.forward(*swap(q, k, v), scale=scale, causal=causal)
        return out.transpose(1, 2), lse, torch.empty(0)

    def _scaled_dot_product_flash_attention_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any, scale: float
    ) -> tuple[Tensor, ...]:
        self._called("backward", q, k, v)
        _, _, rows, keys, _, causal, *_ = rest
        self._counts(q.transpose(1, 2), k.transpose(1, 2), several=len(q) > 1)
        assert (rows, keys) == (q.shape[2], k.shape[2])
        lse = by_address(lse)
        return swap(*NUMBERS.backward(*swap(dout, q, k, v, out), lse, scale=scale, causal=causal))

    def _scaled_dot_product_cudnn_attention(
        self, q: Tensor, k: Tensor, v: Tensor, bias: None, with_lse: bool, *rest: Any, scale: float
    ) -> tuple[Tensor, ...]:
        dropout, causal, debug = rest
        assert (bias, with_lse, dropout, debug) == (None, True, 0.0, False)
        self._called("forward", q, k, v)
        out, lse = NUMBERS.forward(*swap(q, k, v), scale=scale, causal=causal)
        return out.transpose(1, 2), lse.unsqueeze(-1), torch.empty(0)  # [B, h, S, 1]

    def _scaled_dot_product_cudnn_attention_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any, scale: float
    ) -> tuple[Tensor, ...]:
        self._called("backward", q, k, v)
        _, _, bias, cum_q, cum_k, rows, keys, dropout, causal = rest
        assert (bias, cum_q, cum_k, dropout) == (None, None, None, 0.0)
        assert (rows, keys) == (q.shape[2], k.shape[2])
        assert lse.shape == (*q.shape[:3], 1)
        lse = by_address(lse).squeeze(-1)
        return swap(*NUMBERS.backward(*swap(dout, q, k, v, out), lse, scale=scale, causal=causal))

    def _flash_attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, keys: Tensor, *rest: Any, scale: float
    ) -> tuple[Tensor, ...]:
        _, _, _, causal, _ = rest
        return (*self._varlen_forward(q, k, v, rows, keys, scale, causal), torch.empty(0))

    def _flash_attention_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any, scale: float
    ) -> tuple[Tensor, ...]:
        rows, keys, _, _, _, causal, *_ = rest
        return self._varlen_backward(dout, q, k, v, out, lse, rows, keys, scale, causal)


class StrictFlashAttn(Strict):
    """``flash_attn.flash_attn_interface`` 2.8.3: the four functions that ``"flash2"`` calls, by their own names."""

    def _flash_attn_forward(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, **options: Any
    ) -> tuple[Any, ...]:
        self._called("forward", q, k, v)
        plain(options, dropout_p, return_softmax=False)
        return (*NUMBERS.forward(q, k, v, scale=softmax_scale, causal=causal), None, None)

    def _flash_attn_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        **options: Any,
    ) -> None:
        self._called("backward", dout, q, k, v, out, dq, dk, dv)
        self._counts(q, k, several=len(q) > 1)
        plain(options, dropout_p, deterministic=False)
        lse = by_address(softmax_lse)
        grads = NUMBERS.backward(dout, q, k, v, out, lse, scale=softmax_scale, causal=causal)
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target.copy_(grad)

    def _flash_attn_varlen_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        **options: Any,
    ) -> tuple[Any, ...]:
        plain(options, dropout_p, return_softmax=False)
        assert (max_seqlen_q, max_seqlen_k) == (longest(cu_seqlens_q), longest(cu_seqlens_k))
        return (*self._varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal), None, None)

    def _flash_attn_varlen_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        **options: Any,
    ) -> None:
        plain(options, dropout_p, deterministic=False)
        assert (max_seqlen_q, max_seqlen_k) == (longest(cu_seqlens_q), longest(cu_seqlens_k))
        lse, offsets = softmax_lse, (cu_seqlens_q, cu_seqlens_k)
        grads = self._varlen_backward(dout, q, k, v, out, lse, *offsets, softmax_scale, causal)
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target.copy_(grad)


def plain(options: dict[str, Any], dropout: float, **expected: Any) -> None:
    """No dropout, window, cap or slopes."""
    expected |= {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}
    assert (dropout, options) == (0.0, expected)


def longest(offsets: Tensor) -> int:
    return int(offsets.diff().max())


def one(function: Any, inputs: tuple[Tensor, ...], scale: float, causal: bool) -> list[Tensor]:
    """One stretch, without the batch dimension."""
    return [t[0] for t in function(*(t.unsqueeze(0) for t in inputs), scale=scale, causal=causal)]


def stretches(q: Tensor, k: Tensor, rows: Tensor, keys: Tensor) -> list[tuple[slice, slice]]:
    """Rows and keys of each stretch, from offsets that must be as the operator wants them."""
    assert rows.dtype == keys.dtype == torch.int32
    assert (int(rows[-1]), int(keys[-1])) == (len(q), len(k))
    starts, ends = (rows[:-1], keys[:-1]), (rows[1:], keys[1:])
    return [
        (slice(int(a), int(b)), slice(int(c), int(d)))
        for a, b, c, d in zip(starts[0], ends[0], starts[1], ends[1], strict=True)
    ]


def by_address(t: Tensor) -> Tensor:
    """What a kernel finds that takes ``t``'s address and believes it contiguous: garbage where it is not."""
    wanted = torch.empty(t.shape).stride()
    beyond = t.storage_offset() + t.numel() - t.untyped_storage().nbytes() // t.element_size()
    if beyond > 0:  # it would read what lies behind
        return torch.full_like(t, torch.nan)
    return t.as_strided(t.shape, wanted)


def swap(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.transpose(1, 2) for t in tensors)


def strict_kernel(
    monkeypatch: pytest.MonkeyPatch, name: str = "sdpa", largest: int = launches.LARGEST
) -> tuple[AttentionKernel, Strict]:
    """The CUDA kernel ``name`` over its strict stand-in, and the latter for its counts."""
    monkeypatch.setattr(launches, "LARGEST", largest)
    monkeypatch.setattr(attention, "LARGEST", largest)
    if name == "flash2":
        package: Any = StrictFlashAttn(largest)
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
        monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", package)
        return importlib.import_module("torchtitan_upipe.kernels.flash_attn").FlashAttn2Kernel(), package
    aten = StrictAten(largest)
    monkeypatch.setattr(sdpa, "aten", aten)
    return sdpa.CudnnKernel() if name == "cudnn" else sdpa.CudaFlashKernel(), aten
