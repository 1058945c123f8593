"""CUDA's attention operators on CPU: real numbers, and what the real ones promise and no more.

:class:`StrictAten` stands in the place of ``torch.ops.aten`` in ``kernels/sdpa.py``, so that the wrappers of the CUDA
kernels run as they are, with their layouts, their variable-length calls and their arguments. As FlashAttention-2 does:

- the last dimension of q, k, v must be contiguous; other strides are free;
- ``lse`` is read by its address, as if it were contiguous, whatever its strides say;
- ``dout`` and ``out`` may have any strides: the operator copies them;
- offsets are int32 and cover the rows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from torchtitan_upipe.kernels import sdpa
from torchtitan_upipe.kernels.reference import ReferenceKernel

NUMBERS = ReferenceKernel()


class StrictAten:
    """Counts its calls by operator, in ``calls``."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

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
        assert (rows, keys) == (q.shape[2], k.shape[2])
        lse = by_address(lse)
        return swap(*NUMBERS.backward(*swap(dout, q, k, v, out), lse, scale=scale, causal=causal))

    def _flash_attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, keys: Tensor, *rest: Any, scale: float
    ) -> tuple[Tensor, ...]:
        self._called("varlen forward", q, k, v)
        _, _, _, causal, _ = rest
        out, lse = (
            torch.empty_like(q),
            q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float)),
        )
        for at, over in stretches(q, k, rows, keys):
            out[at], part = one(NUMBERS.forward, (q[at], k[over], v[over]), scale, causal)
            lse[:, at] = part
        return out, lse, torch.empty(0)

    def _flash_attention_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any, scale: float
    ) -> tuple[Tensor, ...]:
        self._called("varlen backward", q, k, v)
        rows, keys, _, _, _, causal, *_ = rest
        lse = by_address(lse)
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        for at, over in stretches(q, k, rows, keys):
            inputs = (dout[at], q[at], k[over], v[over], out[at], lse[:, at])
            dq[at], dk[over], dv[over] = one(NUMBERS.backward, inputs, scale, causal)
        return dq, dk, dv

    def _called(self, name: str, *tensors: Tensor) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        assert all(t.stride(-1) == 1 for t in tensors), "the last dimension must be contiguous"


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


def strict_kernel(monkeypatch: pytest.MonkeyPatch) -> tuple[sdpa.CudaFlashKernel, StrictAten]:
    """The CUDA kernel of ``"sdpa"`` over :class:`StrictAten`, and the latter for its counts."""
    aten = StrictAten()
    monkeypatch.setattr(sdpa, "aten", aten)
    return sdpa.CudaFlashKernel(), aten
