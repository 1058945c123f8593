"""TorchTitan's parallel dimensions, with what the plugin's trainer does and what is already attached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torchtitan.distributed import ParallelDims


@dataclass
class TrainerDims(ParallelDims):
    """The dimensions of this project's trainer.

    It pads what ranks do not divide, shards for hybrids, finds documents and gives the model its labels: a model that
    needs one of these asks whether it was given these dimensions.

    Attributes:
        shard_one: FSDP2 takes a single rank, too, on a mesh of one. TorchTitan asks for two; but what keeps a model's
            state in host memory, and gathers it a block at a time, is FSDP2.
    """

    shard_one: bool = False

    @property
    def fsdp_enabled(self) -> bool:
        """Whether parameters belong to FSDP2, its mixed precision in the place of autocast included."""
        return self.shard_one or super().fsdp_enabled

    def hybrid_groups(self, ulysses_degree: int, ring_degree: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """The groups of the all-to-alls (neighbouring ranks) and of the ring (across) of a hybrid.

        They are among this object's meshes from then on, so that TorchTitan sets their timeouts, too.
        """
        sizes = (self.world_size // self.cp, ring_degree, ulysses_degree)
        grid = self.world_mesh._unflatten(0, sizes, ("batch", "ring", "ulysses"))
        self._meshes |= {name: grid[name] for name in ("ring", "ulysses")}
        return grid["ulysses"].get_group(), grid["ring"].get_group()

    def _mesh_exist(self, name: str, degree: int) -> bool:
        return (name == "fsdp" and self.shard_one) or super()._mesh_exist(name, degree)


class AttachedDims:
    """TorchTitan's parallel dimensions once context parallelism is attached.

    TorchTitan's parallelize functions would attach their own and ask for twice the divisor of the sequence; everything
    else, FSDP over the context-parallel ranks included, goes on as before.
    """

    cp_enabled = False

    def __init__(self, dims: ParallelDims) -> None:
        self._dims = dims
        self.seq_len_divisor = 1  # asked already, or padded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dims, name)
