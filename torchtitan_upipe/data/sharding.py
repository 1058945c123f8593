"""Which tokens of a sequence each context-parallel rank holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchtitan.config import JobConfig
    from torchtitan.distributed import ParallelDims


def shard_positions(length: int, rank: int, ulysses_degree: int, ring_degree: int) -> Tensor:
    """Positions of a rank's tokens, in the order in which it holds them.

    Ranks are ``rank = ring_index * ulysses_degree + ulysses_index``. Each ring index holds two chunks of the sequence
    (zigzag, for balanced causal work); they are split contiguously over its Ulysses ranks, so that the all-to-all,
    which puts shards side by side, yields rising positions again. With ``ring_degree = 1`` shards are contiguous.

    Args:
        length: ``S``, a multiple of ``C = ulysses_degree * ring_degree`` and, with a ring, of ``2 * ring_degree``.
        rank: rank within the context-parallel group.

    Returns:
        ``[S / C]`` int64.
    """
    ring_index, ulysses_index = divmod(rank, ulysses_degree)
    positions = torch.arange(length)
    if ring_degree > 1:
        chunks = positions.chunk(2 * ring_degree)
        positions = torch.cat([chunks[ring_index], chunks[2 * ring_degree - 1 - ring_index]])
    return positions.chunk(ulysses_degree)[ulysses_index]


def degrees(method: str, degree: int, ring_degree: int) -> tuple[int, int]:
    """``(ulysses_degree, ring_degree)`` of ``method`` over ``degree`` ranks; pure ring has all ranks in the ring."""
    return (1, degree) if method == "ring" else (degree // ring_degree, ring_degree)


def load_balancer(method: str, ring_degree: int) -> str | None:
    """What TorchTitan's trainer must be told of sharding: its name for it, or one that it refuses."""
    if method == "ring":
        return "headtail"
    return "hybrid" if ring_degree > 1 else None  # only this plugin's trainer shards for a hybrid


def shard_batch(
    inputs: Tensor, labels: Tensor, parallel_dims: ParallelDims, job_config: JobConfig
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """This rank's share of a batch.

    Args:
        inputs: token ids ``[B, S]``.
        labels: ``[B, S]``.

    Returns:
        ``inputs [B, N]``, ``labels [B, N]`` and, under context parallelism, ``{"positions": [B, N]}`` for the model.
    """
    mesh = parallel_dims.get_optional_mesh("cp")
    if mesh is None:
        return inputs, labels, {}
    cp = job_config.context_parallel
    layout = degrees(cp.method, mesh.size(), cp.ring_degree)
    positions = shard_positions(inputs.shape[1], mesh.get_local_rank(), *layout).to(inputs.device)
    return inputs[:, positions], labels[:, positions], {"positions": positions.expand(inputs.shape[0], -1)}
