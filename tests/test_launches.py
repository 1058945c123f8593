"""Kernel calls for many documents, large batches and deterministic sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_pieces import DOCUMENTS, LENGTH, SCALE, WHOLE, PackedKernel, check, dense
from torchtitan_upipe.cp.attention import LocalAttention
from torchtitan_upipe.kernels import visibility
from torchtitan_upipe.kernels.deterministic import backward_rows, rows_of_a_call
from torchtitan_upipe.kernels.pieces import attend, attend_backward
from torchtitan_upipe.kernels.sdpa import CpuFlashKernel
from torchtitan_upipe.kernels.varlen import offsets
from torchtitan_upipe.kernels.visibility import Documents, Known, Tokens, visible_pieces


class Counting(TorchDispatchMode):
    """Counts operators other than views."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += not func.is_view
        return func(*args, **(kwargs or {}))


class Idle(PackedKernel):
    """Computes nothing, so that what is counted is what stands around the kernel."""

    def forward_varlen(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1])

    def backward_varlen(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def operators_around(count: int, into: bool) -> int:
    """Operators of a forward and a backward over ``count`` documents of two tokens, beginning within one."""
    length = 2 * count
    queries, keys = Tokens(((1, length),)), Tokens(((0, length),))
    pieces = visible_pieces(queries, keys, tuple(range(0, length, 2)))
    q, k, v = (torch.zeros(1, n, 2, 4) for n in (length - 1, length, length))
    sums = (torch.zeros_like(k), torch.zeros_like(v)) if into else None
    with Counting() as counting:
        out, lse = attend(Idle(), q, k, v, pieces, scale=SCALE)
        attend_backward(Idle(), out, q, k, v, out, lse, pieces, scale=SCALE, into=sums)
    return counting.calls


@pytest.mark.parametrize("into", [False, True])
def test_operators_do_not_grow_with_the_documents(into: bool) -> None:
    assert operators_around(1000, into) == operators_around(10, into) < 80


def test_what_documents_show_is_worked_out_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tokens] = []

    def counting(queries: Tokens, *rest: Any) -> Any:
        asked.append(queries)
        return visible_pieces(queries, *rest)

    monkeypatch.setattr(visibility, "visible_pieces", counting)
    attention = LocalAttention(PackedKernel())
    truth = dense(WHOLE, DOCUMENTS, 4, 2, torch.float64)
    documents = Documents((DOCUMENTS, DOCUMENTS[:3]))
    options: dict[str, Any] = {"scale": SCALE, "rows": ((0, LENGTH),), "documents": documents}
    for _ in range(3):  # layers
        out, lse = attention.forward(*truth.inputs, **options)
        attention.backward(truth.dout, *truth.inputs, out, lse, **options)
    assert len(asked) == 2  # one for each sequence
    attention.forward(*truth.inputs, **{**options, "rows": ((3, 9),)})
    assert len(asked) == 4
    assert Documents((DOCUMENTS, DOCUMENTS[:3])) == documents  # what was worked out is not what they are


def test_offsets_of_known_lengths_are_made_once() -> None:
    lengths, device = Known((3, 5, 1)), torch.device("cpu")
    assert offsets(lengths, 2, device) is offsets(lengths, 2, device)
    assert offsets(lengths, 1, device).cumulative.tolist() == [0, 3, 8, 9]


class Batches(CpuFlashKernel):
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def backward(self, *tensors: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        self.sizes.append(len(tensors[0]))
        return super().backward(*tensors, scale=scale, causal=causal)


def test_a_batch_beyond_32_bits_goes_sequence_by_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = dense(WHOLE, (0,), 4, 2, torch.float64)
    attention = LocalAttention(Batches())
    options: dict[str, Any] = {"scale": SCALE, "rows": ((0, LENGTH),), "documents": None}
    for largest, sizes in ((truth.inputs[0].numel(), [2]), (truth.inputs[0].numel() - 1, [1, 1])):
        monkeypatch.setattr("torchtitan_upipe.cp.attention.LARGEST", largest)
        attention.kernel.sizes.clear()
        out, lse = attention.forward(*truth.inputs, **options)
        check([out, lse], [truth.out, truth.lse])
        check(attention.backward(truth.dout, *truth.inputs, out, lse, **options), truth.grads)
        assert attention.kernel.sizes == sizes


class Deterministic(CpuFlashKernel):
    """As FlashAttention-2 under deterministic algorithms: fewer rows a call, more sums."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def backward(self, *tensors: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        self.rows.append(tensors[0].shape[1])
        return super().backward(*tensors, scale=scale, causal=causal)

    def backward_rows(self, q: Tensor) -> int | None:
        return 24


@pytest.mark.parametrize("max_keys", [None, 20])
def test_backward_in_fewer_rows_a_call(max_keys: int | None) -> None:
    truth, kernel = dense(WHOLE, DOCUMENTS, 4, 2, torch.float64), Deterministic()
    for starts in ((0,), DOCUMENTS):
        truth, pieces = dense(WHOLE, starts, 4, 2, torch.float64), visible_pieces(WHOLE, WHOLE, starts)
        out, lse = attend(kernel, *truth.inputs, pieces, scale=SCALE)
        grads = attend_backward(kernel, truth.dout, *truth.inputs, out, lse, pieces, scale=SCALE, max_keys=max_keys)
        check(grads, truth.grads)
    assert max(kernel.rows) <= 24


def test_rows_of_a_deterministic_call() -> None:
    """132 processors: one head keeps 132 sums, so each call has a 132nd of the rows; four heads keep 33."""
    assert rows_of_a_call(1, 1, 5 << 20, 132, deterministic=True) == -(-(5 << 20) // 132)
    assert rows_of_a_call(1, 4, 5 << 20, 132, deterministic=True) == -(-(5 << 20) // 33)
    assert rows_of_a_call(1, 1, 1 << 17, 132, deterministic=True) == 8192  # fewer would leave the device idle
    assert rows_of_a_call(2, 66, 5 << 20, 132, deterministic=True) is None
    assert rows_of_a_call(1, 1, 5 << 20, 132, deterministic=False) is None
    q = torch.empty(1, 1 << 20, 2, 8, device="meta")
    assert backward_rows(q, 132) is None
    torch.use_deterministic_algorithms(True)
    try:
        assert backward_rows(q, 132) == -(-(1 << 20) // 66)
    finally:
        torch.use_deterministic_algorithms(False)
