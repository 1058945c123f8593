"""FlashAttention-2's backward under ``torch.use_deterministic_algorithms``: sums always in one order, for memory.

It keeps one float32 sum of dq for each group of thread blocks that adds to it, ``ceil(processors / (B*h))`` of them
(``csrc/flash_attn/flash_api.cpp``, ``mha_bwd``: ``nsplits``), where it otherwise keeps one: for one head of 5M tokens
on an H100, 132 of 2.4 GiB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchtitan_upipe.kernels.launches import LONG

PROCESSORS = 132  # of an H100 or H200: what the ledger and dry runs count with


def sums_of_dq(batch: int, heads: int, processors: int, deterministic: bool) -> int:
    """Float32 sums ``[B, Sq, h, d]`` of dq that a backward call keeps."""
    return -(-processors // (batch * heads)) if deterministic else 1


def rows_of_a_call(batch: int, heads: int, rows: int, processors: int, deterministic: bool) -> int | None:
    """Query rows of a backward call, so that its sums take no more than one sum of all ``rows``; None for no limit.

    No fewer than ``LONG``, which keep the device busy.
    """
    sums = sums_of_dq(batch, heads, processors, deterministic)
    return None if sums == 1 else max(LONG, -(-rows // sums))


def backward_rows(q: Tensor, processors: int | None = None) -> int | None:
    """:func:`rows_of_a_call` for queries ``q [B, Sq, h, d]``, as torch is set now.

    Args:
        processors: of the device; asked of the device by default.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return None
    if processors is None:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    return rows_of_a_call(q.shape[0], q.shape[2], q.shape[1], processors, True)
