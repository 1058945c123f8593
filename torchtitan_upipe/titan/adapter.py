"""Hugging Face weights for Llama3 on any number of ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter


class AnyDegreeLlama3Adapter(Llama3StateDictAdapter):
    """TorchTitan's adapter, also where a weight's heads do not divide over the ranks that shard it.

    The adapter reorders the rows of each query and key head. TorchTitan 0.2.2 does so on the sharded weight, which
    fails where a head is cut: Llama3-8B's 8 KV heads on 16 ranks. Such a weight is gathered first.
    """

    def _permute(self, w: Tensor, n_heads_arg: int, *shape: int) -> Tensor:
        return super()._permute(_whole_heads(w, n_heads_arg), n_heads_arg, *shape)

    def _reverse_permute(self, w: Tensor, n_heads_arg: int, *shape: int) -> Tensor:
        return super()._reverse_permute(_whole_heads(w, n_heads_arg), n_heads_arg, *shape)


def _whole_heads(weight: Tensor, heads: int) -> Tensor:
    if not isinstance(weight, DTensor):
        return weight
    mesh: Any = weight.device_mesh
    shards = 1
    for size, placement in zip(mesh.shape, weight.placements, strict=True):
        shards *= size if placement.is_shard(0) else 1
    return weight if heads % shards == 0 else weight.redistribute(placements=[Replicate()] * mesh.ndim)
