"""How TorchTitan's models rotate, and the tables that are not needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class RopeOfModel:
    """How one of TorchTitan's models rotates; with which frequencies says ``job/model.py``.

    Attributes:
        table: name of the model's buffer of angles for all positions.
        interleaved: see :class:`~torchtitan_upipe.cp.rope.Rope`.
    """

    table: str
    interleaved: bool

    def drop_table(self, model: nn.Module) -> None:
        """Let ``model``, on the meta device, have an empty table: at 5M positions it takes 2.7 GB and is not read."""
        setattr(model, f"_precompute_{self.table}", lambda: torch.empty(0))
        setattr(model, self.table, torch.empty(0, device="meta"))


LLAMA_ROPE = RopeOfModel("freqs_cis", interleaved=True)
QWEN_ROPE = RopeOfModel("rope_cache", interleaved=False)
