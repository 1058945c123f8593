"""Attention over pieces against dense attention in float64, with the mask written out token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.reference import relative_error
from torchtitan_upipe.cp.ring import zigzag_tokens
from torchtitan_upipe.cp.segments import QueryRows
from torchtitan_upipe.kernels import launches
from torchtitan_upipe.kernels.contract import AttentionKernel, does_varlen
from torchtitan_upipe.kernels.launches import rectangles, together
from torchtitan_upipe.kernels.merge import merge_partial
from torchtitan_upipe.kernels.pieces import attend, attend_backward, partial_attention
from torchtitan_upipe.kernels.reference import ReferenceKernel
from torchtitan_upipe.kernels.sdpa import CpuFlashKernel
from torchtitan_upipe.kernels.varlen import offsets, pack_lse, unpack_lse
from torchtitan_upipe.kernels.visibility import Interval, Tokens, cut_rows, visible_pieces

SCALE, LENGTH, WIDTH = 0.3, 64, 8
WHOLE = Tokens(((0, LENGTH),))
DOCUMENTS = (0, 5, 6, 29, 41)

Tensors = tuple[Tensor, ...]


class PackedKernel(ReferenceKernel):
    """A variable-length kernel on CPU, with the layouts of the CUDA ones: ``[tokens, h, d]`` and offsets."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def forward(self, *qkv: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        self.calls.append("one stretch")
        return super().forward(*qkv, scale=scale, causal=causal)

    def backward(self, *tensors: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append("one stretch")
        return super().backward(*tensors, scale=scale, causal=causal)

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
        self.calls.append("causal" if causal else "full")
        batch, packed = q.shape[0], [t.flatten(0, 1) for t in (q, k, v)]
        out, lse = torch.full_like(packed[0], math.nan), q.new_full((q.shape[2], len(packed[0])), math.nan)
        for rows, keys in _stretches(batch, q_lengths, k_lengths):
            inputs = (t[at].unsqueeze(0) for t, at in zip(packed, (rows, keys, keys), strict=True))
            part, part_lse = super().forward(*inputs, scale=scale, causal=causal)
            out[rows], lse[:, rows] = part[0], part_lse[0]
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
        self.calls.append("causal" if causal else "full")
        packed, packed_lse = [t.flatten(0, 1) for t in (dout, q, k, v, out)], pack_lse(lse)
        grads = [torch.full_like(t, math.nan) for t in packed[1:4]]
        for rows, keys in _stretches(q.shape[0], q_lengths, k_lengths):
            inputs = [t[at].unsqueeze(0) for t, at in zip(packed, (rows, rows, keys, keys, rows), strict=True)]
            parts = super().backward(*inputs, packed_lse[:, rows].unsqueeze(0), scale=scale, causal=causal)
            for grad, at, part in zip(grads, (rows, keys, keys), parts, strict=True):
                grad[at] = part[0]
        return tuple(grad.view(t.shape) for grad, t in zip(grads, (q, k, v), strict=True))  # type: ignore[return-value]


def _stretches(batch: int, q_lengths: Sequence[int], k_lengths: Sequence[int]) -> list[tuple[slice, slice]]:
    ends = [offsets(lengths, batch, torch.device("cpu")).cumulative.tolist() for lengths in (q_lengths, k_lengths)]
    rows, keys = ([slice(a, b) for a, b in pairwise(e)] for e in ends)
    return list(zip(rows, keys, strict=True))


@dataclass
class Dense:
    """``q [B, Sq, h, d]``, ``k, v [B, Sk, g, d]`` and the truth about them, in float64; ``seen [Sq, Sk]``."""

    inputs: Tensors
    dout: Tensor
    out: Tensor
    lse: Tensor
    grads: Tensors


def dense(queries: Tokens, starts: Sequence[int], heads: int, kv_heads: int, dtype: torch.dtype) -> Dense:
    gen = torch.Generator().manual_seed(heads + len(queries))
    shapes = [(2, len(queries), heads, WIDTH), *[(2, LENGTH, kv_heads, WIDTH)] * 2, (2, len(queries), heads, WIDTH)]
    q, k, v, dout = (torch.randn(s, generator=gen, dtype=torch.float64).to(dtype).double() for s in shapes)
    row = torch.tensor([t for interval in queries.intervals for t in range(*interval)])
    key, first = torch.arange(LENGTH), torch.tensor(starts)
    document = [(t[:, None] >= first).sum(1) for t in (row, key)]
    seen = (key <= row[:, None]) & (document[0][:, None] == document[1])

    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    wide = [leaves[0], *(t.repeat_interleave(heads // kv_heads, dim=2) for t in leaves[1:])]
    scores = torch.einsum("bqhd,bkhd->bhqk", wide[0], wide[1]) * SCALE
    scores = scores.masked_fill(~seen, -math.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), wide[2])
    out.backward(dout)
    grads = tuple(t.grad for t in leaves if t.grad is not None)
    return Dense((q, k, v), dout, out.detach(), scores.logsumexp(-1).detach(), grads)


def kernel_named(name: str) -> AttentionKernel:
    return PackedKernel() if name == "packed" else CpuFlashKernel()


def check(got: Sequence[Tensor], truth: Sequence[Tensor], tolerance: float = 1e-13) -> None:
    for value, reference in zip(got, truth, strict=True):
        assert value.shape == reference.shape
        assert relative_error(value, reference) < tolerance


@pytest.mark.parametrize("max_rows", [None, 13])
@pytest.mark.parametrize("starts", [(0,), DOCUMENTS], ids=["causal", "packed"])
@pytest.mark.parametrize(
    "rows",
    [
        ((0, LENGTH),),
        *(QueryRows(2, 4, LENGTH // 4, (0, LENGTH // 4)).computed_by(r) for r in (0, 1)),
        ((3, 7), (7, 8), (30, 47)),
    ],
    ids=["all", "outer segment", "inner segment", "ragged"],
)
@pytest.mark.parametrize("name", ["sdpa", "packed"])
def test_rows_of_a_sequence(
    name: str, rows: tuple[Interval, ...], starts: tuple[int, ...], max_rows: int | None
) -> None:
    queries = WHOLE.rows(rows)
    truth = dense(queries, starts, 6, 2, torch.float64)
    pieces = [tile for piece in visible_pieces(queries, WHOLE, starts) for tile in cut_rows(piece, max_rows)]
    kernel = kernel_named(name)
    out, lse = attend(kernel, *truth.inputs, pieces, scale=SCALE)
    check([out, lse], [truth.out, truth.lse])
    check(attend_backward(kernel, truth.dout, *truth.inputs, out, lse, pieces, scale=SCALE), truth.grads)
    if isinstance(kernel, PackedKernel) and len(pieces) > 1:
        calls = [call for piece in pieces for call in rectangles(piece)]
        batches = together(calls, elements=1)
        names = ["one stretch" if len(batch) == 1 else "causal" if batch[0][2] else "full" for batch in batches]
        assert kernel.calls == names * 2
        assert sorted(call for batch in batches for call in batch) == sorted(calls)


@pytest.mark.parametrize("starts", [(0,), DOCUMENTS], ids=["causal", "packed"])
@pytest.mark.parametrize("name", ["sdpa", "packed"])
def test_keys_chunk_by_chunk(name: str, starts: tuple[int, ...]) -> None:
    """A query that sees none of a chunk's keys has no output there, and merging it changes nothing."""
    kernel, unseen = kernel_named(name), 0
    queries = WHOLE.rows(((24, 48),))
    truth = dense(queries, starts, 6, 2, torch.float64)
    q, k, v = truth.inputs
    out, lse = attend(kernel, q, k[:, 24:48], v[:, 24:48], visible_pieces(queries, queries, starts), scale=SCALE)
    for start in (0, 12):
        keys = WHOLE.rows(((start, start + 12),))
        seen = [k[:, start : start + 12], v[:, start : start + 12]]
        part, part_lse = attend(kernel, q, *seen, visible_pieces(queries, keys, starts), scale=SCALE)
        blind = part_lse.isneginf()
        assert not part.transpose(1, 2)[blind].any()
        unseen += int(blind.sum())
        merge_partial(out, lse, part, part_lse)
    check([out, lse], [truth.out, truth.lse])
    assert (unseen > 0) == (starts == DOCUMENTS)


def disjoint(intervals: Sequence[Interval]) -> bool:
    return all(a[1] <= b[0] for a, b in pairwise(sorted(intervals)))


def test_launches_copy_no_key_twice_and_stay_below_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = WHOLE.rows(((8, 16), (24, 32), (40, 48), (56, 64)))  # a query tile of four ranks' shards
    calls = [call for piece in visible_pieces(tile, WHOLE) for call in rectangles(piece)]
    batches = together(calls, elements=1)
    assert [len(batch) for batch in batches] == [4, 1, 1, 1, 1]  # squares together; each prefix holds the one before
    documents = [call for piece in visible_pieces(WHOLE, WHOLE, tuple(range(0, 64, 2))) for call in rectangles(piece)]
    assert [len(batch) for batch in together(documents, elements=1)] == [32]
    for batch in together(calls + documents, elements=1):
        assert disjoint([keys for _, keys, _ in batch])
        assert disjoint([rows for rows, _, _ in batch])
    assert max(map(len, together(documents, elements=2**31 // 11))) == 5  # rows of two elements each: 10 of 11
    monkeypatch.setattr(launches, "MOST_STRETCHES", 8)
    assert [len(batch) for batch in together(documents, elements=1)] == [8] * 4
    monkeypatch.setattr(launches, "LONG", 8)
    assert [len(batch) for batch in together(calls, elements=1)] == [1] * len(calls)


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("starts", [(0,), DOCUMENTS], ids=["causal", "packed"])
@pytest.mark.parametrize("team", [1, 2])
@pytest.mark.parametrize("name", ["sdpa", "packed"])
def test_keys_that_come_in_parts(name: str, team: int, starts: tuple[int, ...], degree: int) -> None:
    """A ring without its ranks: of many parts of the keys a row sees some keys, all or none."""
    kernel = kernel_named(name)
    for rank in range(degree):
        mine = zigzag_tokens(LENGTH, rank, degree)
        queries = mine.rows(QueryRows(team, team, len(mine) // team, (0, len(mine) // team)).computed_by(rank % team))
        truth = dense(queries, starts, 4, 2, torch.float64)
        q, k, v = truth.inputs
        out, lse = torch.zeros_like(q), torch.full_like(truth.lse, -math.inf)
        parts = []
        for other in range(degree):
            tokens = zigzag_tokens(LENGTH, other, degree)
            at = torch.cat([torch.arange(*interval) for interval in tokens.intervals])
            parts.append((at, visible_pieces(queries, tokens, starts)))
            for row, part, part_lse in partial_attention(kernel, q, k[:, at], v[:, at], parts[-1][1], scale=SCALE):
                merge_partial(out[:, row], lse[:, :, row], part, part_lse)
        check([out, lse], [truth.out, truth.lse])

        dq, dk, dv = (torch.zeros_like(t) for t in truth.inputs)
        for at, pieces in parts:
            grads = attend_backward(kernel, truth.dout, q, k[:, at], v[:, at], out, lse, pieces, scale=SCALE)
            seeing = {row for piece in pieces for row in range(*piece.rows)}
            blind = [row for row in range(len(queries)) if row not in seeing]
            assert not grads[0][:, blind].any()
            dq += grads[0]
            dk[:, at] += grads[1]
            dv[:, at] += grads[2]
        check([dq, dk, dv], truth.grads)


@pytest.mark.parametrize("name", ["sdpa", "packed"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1.5e-2)])
def test_dtypes(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Outputs are in the inputs' dtype, log-sum-exp and sums of gradients in float32."""
    kernel = kernel_named(name)
    queries = WHOLE.rows(((0, 16), (48, 64)))  # the second stretch of the causal mask takes two calls
    for starts in ((0,), DOCUMENTS):
        truth = dense(queries, starts, 4, 2, dtype)
        inputs = [t.to(dtype) for t in truth.inputs]
        pieces = visible_pieces(queries, WHOLE, starts)
        out, lse = attend(kernel, *inputs, pieces, scale=SCALE)
        assert out.dtype == dtype
        assert lse.dtype == torch.float32
        grads = attend_backward(kernel, truth.dout.to(dtype), *inputs, out, lse, pieces, scale=SCALE)
        assert {grad.dtype for grad in grads} == {torch.float32}
        check([out, lse, *grads], [truth.out, truth.lse, *truth.grads], tolerance)


def test_one_call_rounds_once() -> None:
    """A whole causal sequence is the kernel's own call: its results go through unchanged."""
    kernel = CpuFlashKernel()
    truth = dense(WHOLE, (0,), 4, 2, torch.bfloat16)
    inputs, dout = [t.bfloat16() for t in truth.inputs], truth.dout.bfloat16()
    pieces = visible_pieces(WHOLE, WHOLE)
    out, lse = attend(kernel, *inputs, pieces, scale=SCALE)
    plain = kernel.forward(*inputs, scale=SCALE, causal=True)
    assert torch.equal(out, plain[0])
    assert torch.equal(lse, plain[1])
    grads = attend_backward(kernel, dout, *inputs, out, lse, pieces, scale=SCALE)
    for grad, reference in zip(grads, kernel.backward(dout, *inputs, out, lse, scale=SCALE, causal=True), strict=True):
        assert grad.dtype == torch.bfloat16
        assert torch.equal(grad, reference)


def test_packed_layout() -> None:
    assert does_varlen(PackedKernel())
    assert not does_varlen(CpuFlashKernel())
    packed = offsets([3, 5, 1], batch=2, device=torch.device("cpu"))
    assert packed.cumulative.tolist() == [0, 3, 8, 9, 12, 17, 18]
    assert packed.cumulative.dtype == torch.int32
    assert packed.longest == 5
    lse = torch.randn(2, 4, 9)
    assert pack_lse(lse).shape == (4, 18)
    assert torch.equal(pack_lse(lse)[:, 9:], lse[1])
    assert torch.equal(unpack_lse(pack_lse(lse), 2), lse)
