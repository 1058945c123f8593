"""From the job file's ``[context_parallel]`` section to the method object of one attention layer."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from torchtitan_upipe.cp.attention import LocalAttention, SequenceAttention
from torchtitan_upipe.cp.collectives import HeadExchange, RingExchange
from torchtitan_upipe.cp.fpdt import FPDT
from torchtitan_upipe.cp.head_schedule import build_head_schedule
from torchtitan_upipe.cp.ring import RingAttention
from torchtitan_upipe.cp.strategy import ContextParallelMethod
from torchtitan_upipe.cp.ulysses import Ulysses
from torchtitan_upipe.cp.upipe import UPipe
from torchtitan_upipe.kernels.contract import AttentionKernel
from torchtitan_upipe.stash.stash import KeptOnDevice, PutAway, Stash


def build_method(
    method: str,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_chunk: int,
    new_stash: Callable[[], Stash] | None,
    query_tiles: int = 1,
    put_away: PutAway = KeptOnDevice,
    sequence_chunk: int = 0,
    staged: bool = False,
    ulysses_group: dist.ProcessGroup | None,
    ring_group: dist.ProcessGroup | None,
    kernel: AttentionKernel,
) -> ContextParallelMethod:
    """Build the method of one layer with ``num_heads`` query and ``num_kv_heads`` KV heads.

    Pure ring is the layer with all heads at once whose all-to-all has one rank and whose attention is a ring; a hybrid
    has both.

    Args:
        method: ``"ulysses"`` or ``"ring"`` (all heads at once), ``"upipe"``, or ``"fpdt"``.
        head_chunk: ``U``; 0 is all heads. UPipe only.
        new_stash: makes what keeps the outputs of stages or chunks for the backward pass; None to compute them again.
            UPipe and FPDT only.
        query_tiles: slices of the queries in each stage. UPipe only.
        put_away: where sequence chunks wait for one another. FPDT only.
        sequence_chunk: tokens of a chunk of the whole sequence, a multiple of the ranks; 0 is all. FPDT only.
        staged: let ``"ulysses"`` and ``"ring"`` walk through the stage loop, too, all heads in one stage: it has a
            stash, and what :class:`~torchtitan_upipe.cp.host_block.HostBlock` needs.
        ulysses_group: the group of the all-to-alls, or None for one rank.
        ring_group: the group of the ring, or None for one rank.

    Raises:
        ValueError: no such method, or no schedule for these numbers.
    """
    exchange = HeadExchange(ulysses_group)
    attention: SequenceAttention = LocalAttention(kernel, key_tiles=query_tiles)
    if ring_group is not None:
        attention = RingAttention(RingExchange(ring_group), kernel)
    match method:
        case "ulysses" | "ring" if not staged:
            return Ulysses(num_heads, num_kv_heads, exchange, attention)
        case "upipe" | "ulysses" | "ring":
            schedule = build_head_schedule(num_heads, num_kv_heads, exchange.size, head_chunk or num_heads)
            return UPipe(schedule, exchange, attention, new_stash, query_tiles)
        case "fpdt":
            local = LocalAttention(kernel)
            return FPDT(num_heads, num_kv_heads, exchange, local, new_stash, put_away, sequence_chunk)
        case _:
            raise ValueError(f'method = {method!r} is unknown; choose "upipe", "ulysses", "ring" or "fpdt".')
