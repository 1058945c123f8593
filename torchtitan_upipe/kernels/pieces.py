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


def attend(
    kernel: AttentionKernel, q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of queries that each stand in one piece.

    Args:
        q: ``[B, Sq, h, d]``.
        k: ``[B, Sk, g, d]``.
        v: ``[B, Sk, g, d]``.
        pieces: cover all query rows.

    Returns:
        ``out [B, Sq, h, d]`` and ``lse [B, h, Sq]``, as :meth:`AttentionKernel.forward`.
    """
    parts = partial_attention(kernel, q, k, v, pieces, scale=scale)
    if len(pieces) == 1:
        ((_, out, lse),) = parts
        return out.to(q.dtype), lse
    out, lse = torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=accumulate_dtype(q.dtype))
    for rows, part, part_lse in parts:
        out[:, rows], lse[:, :, rows] = part, part_lse
    return out, lse


def partial_attention(
    kernel: AttentionKernel, q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], *, scale: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Attention of each piece: its query rows, ``out [B, rows, h, d]`` and ``lse [B, h, rows]``.

    Where a piece took two kernel calls, ``out`` is their merged float32 result, not yet rounded.
    """
    if len(pieces) > 1 and isinstance(kernel, VarlenKernel):
        yield from _packed_attention(kernel, q, k, v, pieces, scale)
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
    if len(pieces) > 1 and isinstance(kernel, VarlenKernel):
        _packed_backward(kernel, dout, q, k, v, out, lse, calls, scale, (dq, dk, dv))
        return dq, dk, dv
    for rows_of_call, keys_of_call, causal in calls:
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


# --- variable-length kernels: all squares in one call, all full rectangles in another --------------------------------


def _packed_attention(
    kernel: VarlenKernel, q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], scale: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    found: dict[Interval, tuple[Tensor, Tensor]] = {}
    calls = [call for piece in pieces for call in rectangles(piece)]
    for causal in (True, False):
        group = [call for call in calls if call[2] == causal]
        if not group:
            continue
        rows, keys = [call[0] for call in group], [call[1] for call in group]
        out, lse = kernel.forward_varlen(
            _pack(q, rows), _pack(k, keys), _pack(v, keys), _lengths(rows), _lengths(keys), scale=scale, causal=causal
        )
        parts = zip(out.split(_lengths(rows), dim=1), lse.split(_lengths(rows), dim=2), strict=True)
        for interval, (part, part_lse) in zip(rows, parts, strict=True):
            if interval not in found:
                found[interval] = part, part_lse
                continue
            square, square_lse = found[interval]
            found[interval] = square.to(accumulate_dtype(square.dtype)), square_lse.clone()
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
    calls: Sequence[Rectangle],
    scale: float,
    totals: tuple[Tensor, Tensor, Tensor],
) -> None:
    for causal in (True, False):
        group = [call for call in calls if call[2] == causal]
        if not group:
            continue
        rows, keys = [call[0] for call in group], [call[1] for call in group]
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
            causal=causal,
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
    return [stop - start for start, stop in intervals]
