"""Attention over a list of visible pieces, by any kernel: each piece is a full rectangle, a causal square, or both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from torchtitan_upipe.kernels.contract import AttentionKernel, VarlenKernel, accumulate_dtype
from torchtitan_upipe.kernels.merge import merge_partial
from torchtitan_upipe.kernels.visibility import Interval, Piece

Rectangle = tuple[Interval, Interval, bool]  # query rows, key rows, causal (then equally many)
LONG = 8192  # rows of a call that keep a GPU busy
LARGEST = 2**31 - 1  # elements of a launch
MOST_STRETCHES = 65535 // 2  # of a launch, whose grid has 65,535 places in that direction; half for a batch of two


def attend(
    kernel: AttentionKernel, q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of queries that each stand in one piece, or in none: ``out`` is zero then, ``lse`` minus infinity.

    Args:
        q: ``[B, Sq, h, d]``.
        k: ``[B, Sk, g, d]``.
        v: ``[B, Sk, g, d]``.
        pieces: what the queries see.

    Returns:
        ``out [B, Sq, h, d]`` and ``lse [B, h, Sq]``, as :meth:`AttentionKernel.forward`.
    """
    parts = partial_attention(kernel, q, k, v, pieces, scale=scale)
    if len(pieces) == 1 and pieces[0].rows == (0, q.shape[1]):
        ((_, out, lse),) = parts
        return out.to(q.dtype), lse
    out = torch.zeros_like(q)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=accumulate_dtype(q.dtype))
    for rows, part, part_lse in parts:
        out[:, rows], lse[:, :, rows] = part, part_lse
    return out, lse


def partial_attention(
    kernel: AttentionKernel, q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], *, scale: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Attention of each piece: its query rows, ``out [B, rows, h, d]`` and ``lse [B, h, rows]``.

    Where a piece took two kernel calls, ``out`` is their merged float32 result, not yet rounded.
    """
    if isinstance(kernel, VarlenKernel):
        batches = launches([call for piece in pieces for call in rectangles(piece)], _elements(q))
        if any(len(batch) > 1 for batch in batches):
            yield from _packed_attention(kernel, q, k, v, batches, scale)
            return
    for piece in pieces:
        (rows, keys, causal), *more = rectangles(piece)
        queries = q[:, slice(*rows)]
        out, lse = kernel.forward(queries, k[:, slice(*keys)], v[:, slice(*keys)], scale=scale, causal=causal)
        for _, keys, causal in more:
            out, lse = out.to(accumulate_dtype(out.dtype)), lse.clone()
            part = kernel.forward(queries, k[:, slice(*keys)], v[:, slice(*keys)], scale=scale, causal=causal)
            merge_partial(out, lse, *part)
        yield slice(*rows), out, lse


def attend_backward(
    kernel: AttentionKernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pieces: Sequence[Piece],
    *,
    scale: float,
    into: tuple[Tensor, Tensor] | None = None,
    max_keys: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`attend`; ``out`` and ``lse`` are those of the whole softmax rows.

    Args:
        into: float32 ``dk, dv`` to add to; by default new ones.
        max_keys: call the kernel for at most so many keys that stand before the queries, which bounds the partial
            ``dk, dv`` of a call.

    Returns:
        ``dq``, zero where no piece has the row; ``dk, dv``. Those that several kernel calls contributed to are sums in
        float32; where one call made everything, all are in the dtype of ``q``.
    """
    calls = [call for piece in pieces for call in rectangles(piece, max_keys)]
    wide = accumulate_dtype(q.dtype)
    if len(calls) == 1 and calls[0][:2] == ((0, q.shape[1]), (0, k.shape[1])):
        dq, dk, dv = kernel.backward(dout, q, k, v, out, lse, scale=scale, causal=calls[0][2])
        if into is None:
            return dq, dk, dv
        for total, part in zip(into, (dk, dv), strict=True):
            total += part
        return dq, *into
    dq = torch.zeros_like(q, dtype=wide)
    dk, dv = into or (torch.zeros_like(t, dtype=wide) for t in (k, v))
    batches = launches(calls, _elements(q)) if isinstance(kernel, VarlenKernel) else [[call] for call in calls]
    for batch in batches:
        if isinstance(kernel, VarlenKernel) and len(batch) > 1:
            _packed_backward(kernel, dout, q, k, v, out, lse, batch, scale, (dq, dk, dv))
            continue
        ((rows_of_call, keys_of_call, causal),) = batch
        rows, keys = slice(*rows_of_call), slice(*keys_of_call)
        grads = kernel.backward(
            dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[:, :, rows], scale=scale, causal=causal
        )
        for total, at, part in zip((dq, dk, dv), (rows, keys, keys), grads, strict=True):
            total[:, at] += part
        del grads, part
    return dq, dk, dv


def rectangles(piece: Piece, max_keys: int | None = None) -> list[Rectangle]:
    """What kernels can do: the causal square on the diagonal first, then the full rectangle of the keys before it.

    The rectangle may be cut into several of ``max_keys`` keys.
    """
    first, last = piece.keys
    diagonal = last - (piece.rows[1] - piece.rows[0]) if piece.causal else last
    square: list[Rectangle] = [(piece.rows, (diagonal, last), True)] if piece.causal else []
    step = max_keys or max(diagonal - first, 1)
    return square + [(piece.rows, (key, min(key + step, diagonal)), False) for key in range(first, diagonal, step)]


# --- variable-length kernels: many short squares, or short full rectangles, in one call ------------------------------


def launches(calls: Sequence[Rectangle], elements: int) -> list[list[Rectangle]]:
    """What a variable-length kernel computes together, of squares and full rectangles apart.

    Neither rows nor keys of a batch overlap: keys that several calls see would be copied once for each, and their
    gradients, too. Calls of ``LONG`` rows or more stand alone, since packing them saves nothing.

    Args:
        elements: of one row of queries over the whole batch of sequences; a launch has fewer than 2^31, which is as
            far as FlashAttention-2's backward counts (torch 2.11, flash-attn 2.8.3; mended in torch 2.13).
    """
    batches = [[call] for call in calls if _length(call[0]) >= LONG]
    most = max(LARGEST // elements, 1)
    for causal in (True, False):
        open_: list[_Batch] = []
        for call in sorted((c for c in calls if c[2] == causal and _length(c[0]) < LONG), key=lambda c: c[1]):
            home = next((batch for batch in open_ if batch.takes(call, most)), None)
            if home is None:
                open_.append(home := _Batch())
            home.add(call)
        batches += [batch.calls for batch in open_]
    return batches


class _Batch:
    """Calls that go to the kernel together, added in the order of their keys."""

    def __init__(self) -> None:
        self.calls: list[Rectangle] = []
        self._rows: set[Interval] = set()
        self._count = 0

    def takes(self, call: Rectangle, most: int) -> bool:
        """Whether ``call`` overlaps none of these, and ``most`` rows are enough."""
        return (
            self.calls[-1][1][1] <= call[1][0]
            and call[0] not in self._rows
            and len(self.calls) < MOST_STRETCHES
            and self._count + _length(call[0]) <= most
        )

    def add(self, call: Rectangle) -> None:
        self.calls.append(call)
        self._rows.add(call[0])
        self._count += _length(call[0])


def _packed_attention(
    kernel: VarlenKernel, q: Tensor, k: Tensor, v: Tensor, batches: Sequence[Sequence[Rectangle]], scale: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    found: dict[Interval, tuple[Tensor, Tensor]] = {}
    for batch in batches:
        rows, keys, causal = [call[0] for call in batch], [call[1] for call in batch], batch[0][2]
        packed = _pack(q, rows), _pack(k, keys), _pack(v, keys)
        if len(batch) == 1:
            out, lse = kernel.forward(*packed, scale=scale, causal=causal)
        else:
            out, lse = kernel.forward_varlen(*packed, _lengths(rows), _lengths(keys), scale=scale, causal=causal)
        parts = zip(out.split(_lengths(rows), dim=1), lse.split(_lengths(rows), dim=2), strict=True)
        for interval, (part, part_lse) in zip(rows, parts, strict=True):
            if interval not in found:
                found[interval] = part, part_lse
                continue
            earlier, earlier_lse = found[interval]
            found[interval] = earlier.to(accumulate_dtype(earlier.dtype)), earlier_lse.clone()
            merge_partial(*found[interval], part, part_lse)
    for interval, (part, part_lse) in found.items():
        yield slice(*interval), part, part_lse


def _packed_backward(
    kernel: VarlenKernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    batch: Sequence[Rectangle],
    scale: float,
    totals: tuple[Tensor, Tensor, Tensor],
) -> None:
    rows, keys = [call[0] for call in batch], [call[1] for call in batch]
    grads = kernel.backward_varlen(
        _pack(dout, rows),
        _pack(q, rows),
        _pack(k, keys),
        _pack(v, keys),
        _pack(out, rows),
        _pack(lse.transpose(1, 2), rows).transpose(1, 2),
        _lengths(rows),
        _lengths(keys),
        scale=scale,
        causal=batch[0][2],
    )
    for total, intervals, grad in zip(totals, (rows, keys, keys), grads, strict=True):
        for interval, part in zip(intervals, grad.split(_lengths(intervals), dim=1), strict=True):
            total[:, slice(*interval)] += part


def _pack(t: Tensor, intervals: Sequence[Interval]) -> Tensor:
    """The rows of ``intervals`` of ``t [B, S, ...]`` side by side; a view where they already are."""
    if all(a[1] == b[0] for a, b in pairwise(intervals)):
        return t[:, intervals[0][0] : intervals[-1][1]]
    return torch.cat([t[:, slice(*interval)] for interval in intervals], dim=1)


def _lengths(intervals: Sequence[Interval]) -> list[int]:
    return [_length(interval) for interval in intervals]


def _length(interval: Interval) -> int:
    return interval[1] - interval[0]


def _elements(q: Tensor) -> int:
    return q.shape[0] * q.shape[2] * q.shape[3]
