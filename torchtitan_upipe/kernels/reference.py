"""Eager attention in float32: the plain formula, for tests and for a second opinion on any device."""

from __future__ import annotations

import torch
from torch import Tensor


class ReferenceKernel:
    """Softmax attention written out, in float32 (float64 for float64 inputs). Memory grows with ``Sq * Sk``."""

    name = "reference"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        scores = _scores(q, k, scale, causal)  # [B, g, h/g, Sq, Sk]
        lse = scores.logsumexp(dim=-1)
        out = torch.exp(scores - lse.unsqueeze(-1)) @ _kv(v)
        return _merge_heads(out).to(q.dtype), lse.flatten(1, 2)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        kv_heads = k.shape[2]
        scores = _scores(q, k, scale, causal)
        probs = torch.exp(scores - lse.unflatten(1, (kv_heads, -1)).unsqueeze(-1))
        grad = _group_heads(dout, kv_heads)  # [B, g, h/g, Sq, d]
        delta = (grad * _group_heads(out, kv_heads)).sum(dim=-1, keepdim=True)
        dv = (probs.transpose(-1, -2) @ grad).sum(dim=2)
        dscores = probs * (grad @ _kv(v).transpose(-1, -2) - delta) * scale
        dq = dscores @ _kv(k)
        dk = (dscores.transpose(-1, -2) @ _group_heads(q, kv_heads)).sum(dim=2)
        return _merge_heads(dq).to(q.dtype), dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype)

    def backward_rows(self, q: Tensor) -> int | None:
        return None


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _group_heads(t: Tensor, kv_heads: int) -> Tensor:
    return _wide(t).transpose(1, 2).unflatten(1, (kv_heads, -1))  # [B, S, h, d] -> [B, g, h/g, S, d]


def _merge_heads(t: Tensor) -> Tensor:
    return t.flatten(1, 2).transpose(1, 2).contiguous()  # [B, g, h/g, S, d] -> [B, S, h, d]


def _kv(t: Tensor) -> Tensor:
    return _wide(t).transpose(1, 2).unsqueeze(2)  # [B, S, g, d] -> [B, g, 1, S, d]


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    scores = _group_heads(q, k.shape[2]) @ _kv(k).transpose(-1, -2) * scale
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores
