"""How a model of Transformers rotates: frequencies and scale by its own configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from torchtitan_upipe.cp.rope import Rope


class RopeOfConfig:
    """The rotations of one model, for batches of any length.

    Two of Transformers' types depend on the length: ``"longrope"`` takes its long factors beyond the original context,
    ``"dynamic"`` frequencies for the length where it is beyond the model's. The length here is that of the batch at
    hand, on all ranks; Transformers lets ``"dynamic"`` frequencies of a longer batch stay for shorter ones after it.

    Args:
        rotary: the model's rotary embedding, whose configuration is read.
        head_dim: ``d``.

    Raises:
        ValueError: a type that Transformers does not give this model, or frequencies for a part of the head.
    """

    def __init__(self, rotary: Any, head_dim: int) -> None:
        self.config = rotary.config
        self.type = str(self.config.rope_parameters.get("rope_type"))
        self._plain = rotary.compute_default_rope_parameters
        if self.type != "default" and self.type not in ROPE_INIT_FUNCTIONS:
            raise ValueError(f"rope_type = {self.type!r} is unknown to Transformers; choose one of its own.")
        self._cache: dict[tuple[int, torch.device], tuple[Tensor, float]] = {}
        pairs = self._parameters(0)[0].numel()
        if 2 * pairs != head_dim:
            raise ValueError(
                f"rope_type = {self.type!r} rotates {2 * pairs} of {head_dim} dimensions of a head; models that rotate "
                "a part are not supported."
            )

    def rope(self, positions: Tensor, longest: int) -> Rope:
        """The rotation of tokens at ``positions [B or 1, N]`` of sequences of at most ``longest`` tokens."""
        key = self._length(longest), positions.device
        if key not in self._cache:
            frequencies, scale = self._parameters(key[0])
            self._cache.clear()  # one length at a time is in use
            self._cache[key] = frequencies.double().to(positions.device), scale
        frequencies, scale = self._cache[key]
        return Rope(frequencies, positions, interleaved=False, scale=scale)

    def _length(self, longest: int) -> int:
        """The length that the frequencies depend on, 0 where they are the model's usual ones."""
        match self.type:
            case "dynamic":
                return longest if longest > self.config.max_position_embeddings else 0
            case "longrope":
                original: int = self.config.rope_parameters["original_max_position_embeddings"]
                return original + 1 if longest > original else 0
        return 0

    def _parameters(self, length: int) -> tuple[Tensor, float]:
        """Frequencies ``[d/2]``, in float32 like the model's own: it was trained with these; and their scale."""
        with torch.device("cpu"):
            if self.type == "default":
                return self._plain(self.config)
            return ROPE_INIT_FUNCTIONS[self.type](
                self.config, torch.device("cpu"), **({"seq_len": length} if length else {})
            )


class NoTable(nn.Module):
    """The behaviour of a rotary embedding whose table nobody reads: angles are computed where heads are rotated."""

    def forward(self, *_: Any, **__: Any) -> None:
        """Compute nothing."""
