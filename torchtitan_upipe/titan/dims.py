"""TorchTitan's parallel dimensions, with what the plugin's trainer does and what is already attached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
