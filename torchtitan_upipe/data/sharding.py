"""Which tokens of a sequence each context-parallel rank holds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchtitan_upipe.cp.ring import zigzag_tokens


def shard_positions(length: int, rank: int, ulysses_degree: int, ring_degree: int, sequence_chunk: int = 0) -> Tensor:
    """Positions of a rank's tokens, in the order in which it holds them.

    Ranks are ``rank = ring_index * ulysses_degree + ulysses_index``. Each ring index holds two chunks of the sequence
    (zigzag, for balanced causal work); they are split contiguously over its Ulysses ranks, so that the all-to-all,
    which puts shards side by side, yields rising positions again. With ``ring_degree = 1`` shards are contiguous, or
    contiguous within each sequence chunk: rank ``r`` holds slice ``r`` of every chunk.

    Args:
        length: ``S``, a multiple of :func:`length_divisor`.
        rank: rank within the context-parallel group.
        sequence_chunk: tokens of a chunk of the sequence, a multiple of the degree, the last one may be shorter;
            0 = all.

    Returns:
        ``[S / C]`` int64.
    """
    ring_index, ulysses_index = divmod(rank, ulysses_degree)
    intervals = zigzag_tokens(length, ring_index, ring_degree).intervals
    positions = torch.cat([torch.arange(*interval) for interval in intervals])
    chunks = positions.split(sequence_chunk or len(positions))
    return torch.cat([chunk.chunk(ulysses_degree)[ulysses_index] for chunk in chunks])


def length_divisor(ulysses_degree: int, ring_degree: int) -> int:
    """What the sequence is padded to a multiple of: one shard a rank and, in a ring, two chunks a ring rank."""
    degree = ulysses_degree * ring_degree
    return degree if ring_degree == 1 else math.lcm(degree, 2 * ring_degree)


def degrees(method: str, degree: int, ring_degree: int) -> tuple[int, int]:
    """``(ulysses_degree, ring_degree)`` of ``method`` over ``degree`` ranks; pure ring has all ranks in the ring."""
    return (1, degree) if method == "ring" else (degree // ring_degree, ring_degree)


def chunk_of(method: str, degree: int, sequence_chunk: int) -> int:
    """Tokens of a sequence chunk, rounded down so that each rank holds equally many of them; 0 = no chunks."""
    return sequence_chunk // degree * degree if method == "fpdt" else 0


def load_balancer(method: str, ring_degree: int) -> str | None:
    """What TorchTitan's trainer must be told of sharding: its name for it, or one that it refuses."""
    if method in ("ring", "torchtitan"):
        return "headtail"
    if method == "fpdt":
        return "sequence_chunks"  # only this plugin's trainer shards in chunks, or for a hybrid
    return "hybrid" if ring_degree > 1 else None
