"""Merging attention over parts of the keys into attention over all of them."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_partial(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge attention over further keys into ``out`` and ``lse``, in place (online softmax, arXiv 1805.02867).

    Args:
        out: ``[B, S, h, d]``, float32 (or float64): attention over the keys so far.
        lse: ``[B, h, S]``, its log-sum-exp, in the same dtype.
        part: ``[B, S, h, d]``, any dtype: attention over the further keys.
        part_lse: ``[B, h, S]``, its log-sum-exp.
    """
    total = torch.logaddexp(lse, part_lse)
    out *= _per_row(lse - total)
    out += part * _per_row(part_lse - total)
    lse.copy_(total)


def _per_row(log_weight: Tensor) -> Tensor:
    return log_weight.exp().transpose(1, 2).unsqueeze(-1)  # [B, h, S] -> [B, S, h, 1]
