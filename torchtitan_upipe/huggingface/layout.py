"""How a group of ranks holds a sequence, and what attention must know of the whole of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from torchtitan_upipe.data.sharding import chunk_of, degrees
from torchtitan_upipe.kernels.visibility import Documents


@dataclass(frozen=True)
class Layout:
    """Which tokens of a sequence each rank of the context-parallel group holds.

    Attributes:
        ulysses_degree: ranks of an all-to-all.
        ring_degree: ranks of a ring.
        sequence_chunk: see :func:`~torchtitan_upipe.data.sharding.shard_positions`.
    """

    ulysses_degree: int
    ring_degree: int
    sequence_chunk: int = 0

    @property
    def degree(self) -> int:
        """Ranks of the context-parallel group."""
        return self.ulysses_degree * self.ring_degree


@dataclass(frozen=True)
class WholeSequences:
    """What attention of a share must know of the whole sequences.

    Attributes:
        layout: of the shares.
        documents: of the padded sequences, or None for one document each.
        longest: one more than the largest position of the batch, before it is sharded.
    """

    layout: Layout
    documents: Documents | None
    longest: int


def layout_of(mesh: DeviceMesh | None, method: str, ring_degree: int, sequence_chunk: int) -> Layout:
    """The layout of ``method`` over ``mesh``.

    Raises:
        ValueError: the ranks cannot be split so.
    """
    degree = 1 if mesh is None else mesh.size()
    if ring_degree < 1 or degree % ring_degree:
        raise ValueError(
            f"ring_degree = {ring_degree} does not divide the {degree} ranks of the mesh; choose a divisor."
        )
    if sequence_chunk < 0 or (sequence_chunk and method != "fpdt"):
        raise ValueError(
            f'sequence_chunk = {sequence_chunk} has no meaning for method = "{method}"; '
            'leave it at 0, or choose "fpdt" and a positive number of tokens.'
        )
    if method == "ring" and ring_degree not in (1, degree):
        raise ValueError(
            f'ring_degree = {ring_degree} has no meaning for method = "ring", whose {degree} ranks make one ring; '
            'leave it at 1, or choose "ulysses" or "upipe" for a hybrid.'
        )
    if ring_degree > 1 and method == "fpdt":
        raise ValueError(f'ring_degree = {ring_degree} has no meaning for method = "fpdt"; leave it at 1.')
    if 0 < sequence_chunk < degree:
        raise ValueError(
            f"sequence_chunk = {sequence_chunk} is less than a token for each of {degree} ranks; raise it."
        )
    return Layout(*degrees(method, degree, ring_degree), chunk_of(method, degree, sequence_chunk))


def groups_of(mesh: DeviceMesh | None, layout: Layout) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """The groups of the all-to-alls (neighbouring ranks) and of the ring (across), None where there is one rank."""
    if mesh is None or layout.degree == 1:
        return None, None
    if layout.ring_degree == 1:
        return mesh.get_group(), None
    if layout.ulysses_degree == 1:
        return None, mesh.get_group()
    grid = mesh._unflatten(0, (layout.ring_degree, layout.ulysses_degree), ("ring", "ulysses"))
    return grid["ulysses"].get_group(), grid["ring"].get_group()
