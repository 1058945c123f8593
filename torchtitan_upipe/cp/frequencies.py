"""Frequencies of RoPE, plain or scaled for a longer context; the angles made of them are in ``rope.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeParameters:
    """RoPE of a model, in the terms of a Hugging Face ``config.json``.

    Frequencies are those of ``transformers.modeling_rope_utils`` in float32, widened: a checkpoint was trained with
    these.

    Attributes:
        theta: base.
        type: ``"none"``; ``"linear"`` (arXiv 2306.15595); ``"llama3"``, which came with Llama 3.1; ``"yarn"`` (arXiv
            2309.00071).
        factor: by how much the context grows.
        original_length: tokens of the context before; 0 where it is not known.
        low_freq_factor: "llama3": wavelengths above ``original_length / low_freq_factor`` are stretched by ``factor``.
        high_freq_factor: "llama3": those below ``original_length / high_freq_factor`` are kept.
        beta_fast: "yarn": frequencies of more turns than this within ``original_length`` are kept.
        beta_slow: "yarn": those of fewer turns are divided by ``factor``.
        attention_factor: "yarn": what queries and keys are multiplied by; 0 = ``0.1 ln(factor) + 1``.
    """

    theta: float
    type: str = "none"
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0

    @property
    def scale(self) -> float:
        """What rotated queries and keys are multiplied by."""
        if self.type != "yarn":
            return 1.0
        return self.attention_factor or (0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0)

    def frequencies(self, head_dim: int) -> Tensor:
        """Radians per position: ``[head_dim / 2]`` float64."""
        plain = 1.0 / self.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
        match self.type:
            case "linear":
                plain = plain / self.factor
            case "llama3":
                plain = _mixed(plain, self.factor, self._kept_by_llama3(plain))
            case "yarn":
                plain = _mixed(plain, self.factor, self._kept_by_yarn(head_dim))
        return plain.double()

    def _kept_by_llama3(self, plain: Tensor) -> Tensor:
        turns = self.original_length * plain / (2 * math.pi)  # within the original context
        return ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)

    def _kept_by_yarn(self, head_dim: int) -> Tensor:
        def index(turns: float) -> float:  # of the frequency with so many turns within the original context
            return head_dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        first = max(math.floor(index(self.beta_fast)), 0)
        last = min(math.ceil(index(self.beta_slow)), head_dim - 1)
        ramp = (torch.arange(head_dim // 2).float() - first) / (last - first if last != first else 0.001)
        return 1 - ramp.clamp(0, 1)


def _mixed(plain: Tensor, factor: float, kept: Tensor) -> Tensor:
    return plain * ((1 - kept) / factor + kept)
