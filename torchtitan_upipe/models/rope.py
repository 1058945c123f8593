"""Rotary position embedding of head shards, with its inverse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """Rotation of ``[B, N, h, d]`` by each token's position (RoFormer, arXiv 2104.09864).

    Attributes:
        cos: ``[B or 1, N, 1, d/2]``, float32.
        sin: like ``cos``.
        interleaved: pairs are ``(0, 1), (2, 3), ..`` (Llama in TorchTitan's layout); else ``(i, i + d/2)`` (Qwen).
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def __call__(self, heads: Tensor) -> Tensor:
        """Rotate, in float32 (float64 for float64 heads); shape and dtype stay."""
        return self._rotate(heads, self.sin)

    def inverse(self, heads: Tensor) -> Tensor:
        """Rotate back: the inverse and, a rotation being orthogonal, also the transpose."""
        return self._rotate(heads, -self.sin)

    def _rotate(self, heads: Tensor, sin: Tensor) -> Tensor:
        wide = heads.to(torch.promote_types(heads.dtype, torch.float32))
        a, b = wide.unflatten(-1, (-1, 2)).unbind(-1) if self.interleaved else wide.chunk(2, dim=-1)
        rotated = (a * self.cos - b * sin, a * sin + b * self.cos)
        out = torch.stack(rotated, dim=-1).flatten(-2) if self.interleaved else torch.cat(rotated, dim=-1)
        return out.to(heads.dtype)


def llama_rope(freqs_cis: Tensor, positions: Tensor) -> Rope:
    """From TorchTitan's Llama table ``[max_seq_len, d/2]`` complex64 and ``positions [B or 1, N]``."""
    angles = torch.view_as_real(freqs_cis)[positions].unsqueeze(2)  # [B, N, 1, d/2, 2]
    return Rope(angles[..., 0], angles[..., 1], interleaved=True)


def qwen_rope(rope_cache: Tensor, positions: Tensor) -> Rope:
    """From TorchTitan's Qwen table ``[max_seq_len, 2*d]`` (cos twice, sin twice) and ``positions [B or 1, N]``."""
    half = rope_cache.shape[-1] // 4
    angles = rope_cache[positions].unsqueeze(2)  # [B, N, 1, 2*d]
    return Rope(angles[..., :half], angles[..., 2 * half : 3 * half], interleaved=False)
