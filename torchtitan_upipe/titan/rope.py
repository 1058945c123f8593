"""How TorchTitan's models rotate: their frequencies, and the tables that are not needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RopeOfModel:
    """How one of TorchTitan's models rotates.

    Attributes:
        table: name of the model's buffer of angles for all positions.
        frequencies: from the model's arguments to ``[d/2]`` float64.
        interleaved: see :class:`~torchtitan_upipe.cp.rope.Rope`.
    """

    table: str
    frequencies: Callable[[Any], Tensor]
    interleaved: bool

    def drop_table(self, model: nn.Module) -> None:
        """Let ``model``, on the meta device, have an empty table: at 5M positions it takes 2.7 GB and is not read."""
        setattr(model, f"_precompute_{self.table}", lambda: torch.empty(0))
        setattr(model, self.table, torch.empty(0, device="meta"))


def llama_frequencies(model_args: Any) -> Tensor:
    """Frequencies of TorchTitan's Llama3, with the scaling of long wavelengths that came with Llama 3.1."""
    scaling = model_args.rope_scaling_args
    plain = _frequencies(model_args.dim // model_args.n_heads, model_args.rope_theta)
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)  # within the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return plain * ((1 - kept) / scaling.scaling_factor + kept)


def qwen_frequencies(model_args: Any) -> Tensor:
    """Frequencies of TorchTitan's Qwen3."""
    return _frequencies(model_args.head_dim, model_args.rope_theta)


def _frequencies(head_dim: int, theta: float) -> Tensor:
    """``theta^(-2i/d)``, in float32 like the models' own and then widened: a checkpoint was trained with these."""
    exponents = torch.arange(0, head_dim, 2).float() / head_dim
    return (1.0 / theta**exponents).double()


LLAMA_ROPE = RopeOfModel("freqs_cis", llama_frequencies, interleaved=True)
QWEN_ROPE = RopeOfModel("rope_cache", qwen_frequencies, interleaved=False)
