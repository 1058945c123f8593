"""Hugging Face weights for Llama3 on any number of ranks, with heads of any width and a shared embedding."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter

OUTPUT, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class AnyDegreeLlama3Adapter(Llama3StateDictAdapter):
    """TorchTitan's adapter, also where a weight's heads do not divide over the ranks that shard it.

    The adapter reorders the rows of each query and key head. TorchTitan 0.2.2 does so on the sharded weight, which
    fails where a head is cut: Llama3-8B's 8 KV heads on 16 ranks. Such a weight is gathered first.
    """

    @property
    def tied(self) -> bool:
        """Whether embedding and output share a weight, which Hugging Face's files then hold once."""
        return bool(getattr(self.model_args, "enable_weight_tying", False))

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """TorchTitan's names and rows to Hugging Face's."""
        weights = super().to_hf(state_dict)
        if self.tied:
            weights.pop(OUTPUT, None)
        return weights

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """Hugging Face's names and rows to TorchTitan's."""
        if self.tied and EMBEDDING in hf_state_dict:
            hf_state_dict = {**hf_state_dict, OUTPUT: hf_state_dict[EMBEDDING]}
        return super().from_hf(hf_state_dict)

    def _permute(self, w: Tensor, n_heads_arg: int, *_: int) -> Tensor:  # not the given shape: heads may be wider
        return super()._permute(_whole_heads(w, n_heads_arg), n_heads_arg)

    def _reverse_permute(self, w: Tensor, n_heads_arg: int, *_: int) -> Tensor:
        return super()._reverse_permute(_whole_heads(w, n_heads_arg), n_heads_arg)


def _whole_heads(weight: Tensor, heads: int) -> Tensor:
    if not isinstance(weight, DTensor):
        return weight
    mesh: Any = weight.device_mesh
    shards = 1
    for size, placement in zip(mesh.shape, weight.placements, strict=True):
        shards *= size if placement.is_shard(0) else 1
    return weight if heads % shards == 0 else weight.redistribute(placements=[Replicate()] * mesh.ndim)
