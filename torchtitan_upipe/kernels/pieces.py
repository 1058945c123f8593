"""Attention over a list of visible pieces, by any kernel: each piece is a full rectangle, a causal square, or both.

``launches.py`` puts rectangles together that a variable-length kernel does in one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torchtitan_upipe.kernels.contract import AttentionKernel, accumulate_dtype, does_varlen
from torchtitan_upipe.kernels.launches import Launch, Run, plan_launches
from torchtitan_upipe.kernels.merge import merge_partial
from torchtitan_upipe.kernels.visibility import Interval, Piece


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
    out = lse = None
    for rows, part, part_lse in partial_attention(kernel, q, k, v, pieces, scale=scale):
        if part.shape == q.shape:
            return part.to(q.dtype), part_lse
        if out is None or lse is None:
            out, lse = _nothing_seen(q)
        out[:, rows], lse[:, :, rows] = part, part_lse
    return _nothing_seen(q) if out is None or lse is None else (out, lse)


def partial_attention(
    kernel: AttentionKernel, q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], *, scale: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Attention of some rows at a time: these rows, ``out [B, rows, h, d]`` and ``lse [B, h, rows]``.

    Where rows took two kernel calls, ``out`` is their merged float32 result, not yet rounded.
    """
    merged: dict[Interval, tuple[Tensor, Tensor]] = {}
    for launch in plan_launches(pieces, _elements(kernel, q)):
        out, lse = _forward(kernel, launch, q, k, v, scale)
        for rows, at in launch.alone:
            yield rows, out[:, at], lse[:, :, at]
        for interval, at, last in launch.shared:
            part, part_lse = out[:, at], lse[:, :, at]
            if interval in merged:
                merge_partial(*merged[interval], part, part_lse)
            else:
                merged[interval] = part.to(accumulate_dtype(part.dtype)), part_lse
            del part, part_lse
            if last:
                yield slice(*interval), *merged.pop(interval)
        del out, lse


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
    launches = plan_launches(pieces, _elements(kernel, q), max_keys, kernel.backward_rows(q))
    wide = accumulate_dtype(q.dtype)
    if len(launches) == 1 and launches[0].covers(q.shape[1], k.shape[1]):
        dq, dk, dv = _backward(kernel, launches[0], dout, q, k, v, out, lse, scale)
        if into is None:
            return dq, dk, dv
        for total, part in zip(into, (dk, dv), strict=True):
            total += part
        return dq, *into
    dq = torch.zeros_like(q, dtype=wide)
    dk, dv = into or (torch.zeros_like(t, dtype=wide) for t in (k, v))
    for launch in launches:
        grads = _backward(kernel, launch, dout, q, k, v, out, lse, scale)
        runs = (launch.row_runs, launch.key_runs, launch.key_runs)
        for total, where, grad in zip((dq, dk, dv), runs, grads, strict=True):
            for target, source in where:
                total[:, target] += grad[:, source]
        del grads, grad
    return dq, dk, dv


def _forward(
    kernel: AttentionKernel, launch: Launch, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    packed = _pack(q, launch.row_runs), _pack(k, launch.key_runs), _pack(v, launch.key_runs)
    if launch.is_one:
        return kernel.forward(*packed, scale=scale, causal=launch.causal)
    assert does_varlen(kernel)  # others get no launches of several
    return kernel.forward_varlen(*packed, launch.row_lengths, launch.key_lengths, scale=scale, causal=launch.causal)


def _backward(
    kernel: AttentionKernel,
    launch: Launch,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, keys = launch.row_runs, launch.key_runs
    packed = (
        _pack(dout, rows),
        _pack(q, rows),
        _pack(k, keys),
        _pack(v, keys),
        _pack(out, rows),
        _pack(lse.transpose(1, 2), rows).transpose(1, 2),
    )
    if launch.is_one:
        return kernel.backward(*packed, scale=scale, causal=launch.causal)
    assert does_varlen(kernel)
    return kernel.backward_varlen(*packed, launch.row_lengths, launch.key_lengths, scale=scale, causal=launch.causal)


def _elements(kernel: AttentionKernel, q: Tensor) -> int | None:
    return q.shape[0] * q.shape[2] * q.shape[3] if does_varlen(kernel) else None


def _nothing_seen(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _ = q.shape
    lse = q.new_full((batch, heads, rows), float("-inf"), dtype=accumulate_dtype(q.dtype))
    return torch.zeros_like(q), lse


def _pack(t: Tensor, runs: Sequence[Run]) -> Tensor:
    """The rows of ``runs`` of ``t [B, S, ...]`` side by side; a view where they already are."""
    parts = [t[:, rows] for rows, _ in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
