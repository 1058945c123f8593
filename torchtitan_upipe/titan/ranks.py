"""How the ranks of a job fare beside each other: whom the others wait for, and whose memory runs short."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchtitan.config import JobConfig
from torchtitan.tools.utils import device_module, device_type

from torchtitan_upipe.cp.collectives import HeadExchange, RingExchange
from torchtitan_upipe.device import host_memory_of_rank, memory_of_rank
from torchtitan_upipe.job.shape import job_shape
from torchtitan_upipe.memory.ledger import predict_shape
from torchtitan_upipe.memory.prediction import GIB
from torchtitan_upipe.memory.remedies import advice
from torchtitan_upipe.titan.attention import ContextParallelAttention

FULL = 0.9  # of a device's memory
GROWN = 0.1  # of a rank's share of host memory
SLOWER = 1.2  # times the median
IN_A_ROW = 3  # looks


@dataclass(frozen=True)
class Spent:
    """By one rank, since the last time it was asked.

    Attributes:
        waiting: seconds in exchanges of attention.
        stage: seconds from one exchange to the next, median: in most methods a stage of attention.
    """

    waiting: float
    stage: float


class Stopwatch:
    """Measures this rank's exchanges of attention, and what it does between them: on a GPU the time of its stream."""

    def __init__(self) -> None:
        self._spans: list[tuple[Any, Any]] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Around what may wait."""
        begin = self._now()
        yield
        self._spans.append((begin, self._now()))

    def attach(self, model: nn.Module) -> None:
        """Watch the exchanges of ``model``."""
        for layer in (m for m in model.modules() if isinstance(m, ContextParallelAttention)):
            for owner in (layer.method, layer.method.attention):
                exchange = getattr(owner, "exchange", None)
                if isinstance(exchange, (HeadExchange, RingExchange)):
                    exchange.watch = self

    def read(self) -> Spent:
        """What was spent since the last call; the device must be through with its work."""
        spans, self._spans = self._spans, []
        between = [self._seconds(end, begin) for (_, end), (begin, _) in pairwise(spans)]
        waiting = sum(self._seconds(begin, end) for begin, end in spans)
        return Spent(waiting, statistics.median(between) if between else 0.0)

    @staticmethod
    def _seconds(begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1000 if device_type == "cuda" else end - begin

    def _now(self) -> Any:
        if device_type != "cuda":
            return time.perf_counter()
        event = device_module.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class RankState:
    """Of one rank.

    Attributes:
        own: seconds of a step in which it did not wait for others in an exchange of attention.
        stage: seconds between two exchanges, median; see :class:`Spent`.
        device: peak bytes of device memory.
        host: bytes of its resident set.
        retries: of the device's allocator, which has had to give its cache back, so far.
    """

    own: float
    stage: float
    device: float
    host: float
    retries: float


def of_all_ranks(state: RankState) -> list[RankState]:
    """The states of all ranks; a collective."""
    mine = torch.tensor(astuple(state), dtype=torch.float64, device=device_type)
    everyones = [mine.clone() for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, mine)
    return [RankState(*values) for values in torch.stack(everyones).tolist()]


def spread(states: Sequence[RankState]) -> tuple[int, float]:
    """The slowest rank, and its own time as a multiple of the median."""
    own = [state.own for state in states]
    slowest = max(range(len(own)), key=own.__getitem__)
    return slowest, own[slowest] / max(statistics.median_low(own), 1e-9)


class Lookout:
    """Says what is about to go wrong, in sentences, and each thing once.

    Args:
        config: the job.
        device, host: bytes of memory that a rank has to itself.
    """

    def __init__(self, config: JobConfig, device: float | None = None, host: float | None = None) -> None:
        self.config = config
        self.device = memory_of_rank(device_type) if device is None else device
        self.host = host_memory_of_rank() if host is None else host
        self._looks = 0
        self._host_before: list[float] = []
        self._retries = 0.0
        self._full = False
        self._slow: list[int] = []  # the slowest rank of the last looks, -1 where none was
        self._named: set[int] = set()

    def look(self, states: Sequence[RankState]) -> Iterator[str]:
        """What is new since the last look."""
        self._looks += 1
        rank, device = max(enumerate(state.device for state in states), key=lambda item: item[1])
        if device > FULL * self.device and not self._full:
            self._full = True
            yield (
                f"rank {rank} has used {device / GIB:.2f} of its {self.device / GIB:.2f} GiB of memory "
                f"({device / self.device:.0%}); {self._advice()}"
            )
        rank, retries = max(enumerate(state.retries for state in states), key=lambda item: item[1])
        if retries > self._retries:
            self._retries = retries
            yield (
                f"rank {rank}'s allocator has given back its cache {retries:.0f} times to find room, which makes steps "
                f"slow; set PYTORCH_ALLOC_CONF=expandable_segments:True where it is not set, or {self._advice()}"
            )
        yield from self._growth(states)
        yield from self._slowness(states)

    def _growth(self, states: Sequence[RankState]) -> Iterator[str]:
        if self._looks == IN_A_ROW:  # buffers that are used again have been made
            self._host_before = [state.host for state in states]
        if self._looks <= IN_A_ROW:
            return
        grown = [state.host - before for state, before in zip(states, self._host_before, strict=True)]
        rank = max(range(len(grown)), key=grown.__getitem__)
        if grown[rank] > GROWN * self.host:
            self._host_before = [state.host for state in states]
            yield (
                f"rank {rank} holds {grown[rank] / GIB:.2f} GiB more of host memory than before, of the "
                f"{self.host / GIB:.2f} GiB that are its share"
            )

    def _slowness(self, states: Sequence[RankState]) -> Iterator[str]:
        rank, times = spread(states)
        self._slow = [*self._slow, rank if times > SLOWER else -1][-IN_A_ROW:]
        if self._slow == [rank] * IN_A_ROW and rank not in self._named:
            self._named.add(rank)
            yield f"the others wait for rank {rank}, whose part of a step takes {times:.2f} times the median"

    def _advice(self) -> str:
        if self.config.context_parallel.method == "torchtitan":
            return 'use method = "upipe"'
        job = job_shape(self.config)
        return advice(predict_shape(job), job)
