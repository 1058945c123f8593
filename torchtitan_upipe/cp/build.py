"""From the job file's ``[context_parallel]`` section to the method object of one attention layer."""

from __future__ import annotations

import torch.distributed as dist

from torchtitan_upipe.cp.collectives import HeadExchange, RingExchange
from torchtitan_upipe.cp.head_schedule import build_head_schedule
from torchtitan_upipe.cp.ring import Ring
from torchtitan_upipe.cp.strategy import ContextParallelMethod
from torchtitan_upipe.cp.ulysses import Ulysses
from torchtitan_upipe.cp.upipe import UPipe
from torchtitan_upipe.kernels.contract import AttentionKernel


def build_method(
    method: str,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_chunk: int,
    stash: str,
    group: dist.ProcessGroup | None,
    kernel: AttentionKernel,
) -> ContextParallelMethod:
    """Build ``"ring"``, ``"ulysses"`` or ``"upipe"`` for one layer of ``num_heads`` query, ``num_kv_heads`` KV heads.

    Args:
        head_chunk: ``U``; 0 is the largest legal chunk, ``U = H``. UPipe only.
        stash: ``"none"`` or ``"device"``. UPipe only.
        group: the context-parallel group, or None for one rank.

    Raises:
        ValueError: no such method, or no schedule for these numbers.
    """
    match method:
        case "ring":
            return Ring(RingExchange(group), kernel)
        case "ulysses":
            return Ulysses(num_heads, num_kv_heads, HeadExchange(group), kernel)
        case "upipe":
            exchange = HeadExchange(group)
            schedule = build_head_schedule(num_heads, num_kv_heads, exchange.size, head_chunk or num_heads)
            return UPipe(schedule, exchange, kernel, keep_stash=stash == "device")
        case _:
            raise ValueError(f'method = {method!r} is unknown; choose "upipe", "ulysses" or "ring".')
