"""Cutting a stage's heads into what each rank needs, and putting together what comes back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torchtitan_upipe.cp.head_schedule import HeadPlacement
from torchtitan_upipe.cp.segments import QueryRows
from torchtitan_upipe.kernels.contract import accumulate_dtype


def split_queries(heads: Tensor, placement: HeadPlacement, rows: QueryRows, shard: int) -> list[Tensor]:
    """The rows and heads that each rank computes, of ``heads [B, n, h, d]`` with heads ``placement.distinct``.

    Args:
        shard: the rank that holds these tokens, the tile of ``rows``.

    Returns:
        ``pieces[r] [B, n_r, h_r, d]``, views.
    """
    return [heads[:, slice(*rows.shared(rank, shard)), at] for rank, at in enumerate(_heads_of_ranks(placement))]


def join_queries(pieces: Sequence[Tensor], placement: HeadPlacement, rows: QueryRows, shard: int) -> Tensor:
    """Inverse of :func:`split_queries`: ``[B, n, h, d]`` from what each rank computed."""
    if rows.team == 1:
        return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=2)
    batch, _, _, width = pieces[0].shape
    joined = pieces[0].new_empty(batch, rows.tile[1] - rows.tile[0], len(placement.distinct), width)
    for rank, (piece, at) in enumerate(zip(pieces, _heads_of_ranks(placement), strict=True)):
        joined[:, slice(*rows.shared(rank, shard)), at] = piece
    return joined


def split_keys(heads: Tensor, placement: HeadPlacement) -> list[Tensor]:
    """The heads that each rank needs, all rows: views of ``heads [B, N, h, d]`` with heads ``placement.distinct``.

    A head that several ranks need (``G < C``) stands in several pieces.
    """
    return [heads[:, :, at] for at in _heads_of_ranks(placement)]


def sum_copies(pieces: Sequence[Tensor], placement: HeadPlacement) -> Tensor:
    """Transpose of :func:`split_keys`: ``[B, N, len(distinct), d]``, the copies of each head summed.

    Copies are summed in float32 (float64 stays) and rounded once.
    """
    first = pieces[0]
    if placement.distinct == tuple(head for heads in placement.heads for head in heads):  # no copies
        return first if len(pieces) == 1 else torch.cat(list(pieces), dim=2)
    shape = (*first.shape[:2], len(placement.distinct), first.shape[3])
    total = first.new_zeros(shape, dtype=accumulate_dtype(first.dtype))
    for piece, at in zip(pieces, _heads_of_ranks(placement), strict=True):
        total[:, :, at] += piece
    return total.to(first.dtype)


def _heads_of_ranks(placement: HeadPlacement) -> list[slice]:
    """Where the heads of each rank, which are consecutive, stand among the distinct ones."""
    index = {head: i for i, head in enumerate(placement.distinct)}
    return [slice(index[h[0]], index[h[-1]] + 1) if h else slice(0, 0) for h in placement.heads]


def runs(heads: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Slices (positions in ``heads``, head indices) of maximal consecutive runs: slices copy without index tensors."""
    start = 0
    for i in range(1, len(heads) + 1):
        if i == len(heads) or heads[i] != heads[i - 1] + 1:
            yield slice(start, i), slice(heads[start], heads[i - 1] + 1)
            start = i


def select_heads(heads: Tensor, wanted: Sequence[int]) -> Tensor:
    """The heads ``wanted`` of ``heads [B, N, H, d]``; a view where they are consecutive."""
    parts = [heads[:, :, at] for _, at in runs(wanted)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
