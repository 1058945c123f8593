"""Every pair of ranks that exchange anything: how fast one sends to the other, and who is slow."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist
from torchtitan.tools.utils import device_module, device_type

from torchtitan_upipe.checks.report import SLOW, Hosts, Verdict, slow_ones, usual

SIZE = {"cpu": 2**18, "cuda": 2**25}  # bytes
TIMES = 10  # of which the fastest counts
MANY = 64  # ranks from which on not every distance in the ring of all ranks is tried, but powers of two

Pairs = dict[tuple[int, int], float]  # (sender, receiver) -> seconds, as the receiver sees it


def measure_links(mark: Callable[[str], None]) -> Pairs:
    """What this rank receives from others, one after the other, all ranks at once."""
    rank, size = dist.get_rank(), dist.get_world_size()
    sent = torch.zeros(SIZE[device_type], dtype=torch.uint8, device=device_type)
    received, seconds = torch.empty_like(sent), {}
    every = range(1, size)
    for distance in every if size <= MANY else [d for d in every if d & (d - 1) == 0]:
        mark(f"links over a distance of {distance}")
        after, before = (rank + distance) % size, (rank - distance) % size
        seconds[before, rank] = min(_receive(sent, received, after, before) for _ in range(TIMES))
    return seconds


def _receive(sent: torch.Tensor, received: torch.Tensor, after: int, before: int) -> float:
    dist.barrier()
    device_module.synchronize()
    began = time.perf_counter()
    work = dist.batch_isend_irecv([dist.P2POp(dist.irecv, received, before), dist.P2POp(dist.isend, sent, after)])
    work[0].wait()
    device_module.synchronize()
    took = time.perf_counter() - began
    for rest in work[1:]:
        rest.wait()
    return took


def judge_links(findings: list[Pairs], hosts: Hosts) -> Verdict:
    """Name a rank most of whose pairs are slow, and the other slow pairs; within a host and across hosts apart."""
    seconds: Pairs = {pair: time for found in findings for pair, time in found.items()}
    kinds = {"within a host": True, "across hosts": False}
    said, failures = [], []
    for kind, together in kinds.items():
        pairs = {pair: time for pair, time in seconds.items() if hosts.together(pair) == together}
        if not pairs:
            continue
        often = usual(pairs.values())
        said.append(f"{len(pairs)} pairs {kind}: usually {_rate(often)}, slowest {_rate(max(pairs.values()))}")
        slow = slow_ones(pairs)
        ranks = [rank for rank in range(len(findings)) if _mostly(rank, slow, pairs)]
        failures += [
            f"{hosts.of([rank])} is slow to send and receive {kind}: {_rate(median(_of(rank, pairs)))}, and "
            f"others usually {_rate(often)}."
            for rank in ranks
        ]
        failures += [
            f"{hosts.of([a])} sends slowly to {hosts.of([b])}: {_rate(pairs[a, b])}, less than 1/{SLOW:.0f} of what "
            f"is usual {kind}, {_rate(often)}."
            for a, b in slow
            if a not in ranks and b not in ranks
        ]
    return Verdict("; ".join(said) or "one rank has no links", failures)


def _of(rank: int, pairs: Pairs) -> list[float]:
    return [time for pair, time in pairs.items() if rank in pair]


def _mostly(rank: int, slow: list[tuple[int, int]], pairs: Pairs) -> bool:
    """Whether more than half of a rank's pairs are slow."""
    return 2 * sum(rank in pair for pair in slow) > len(_of(rank, pairs)) > 0


def _rate(seconds: float) -> str:
    return f"{SIZE[device_type] / seconds / 1e9:.2f} GB/s"
