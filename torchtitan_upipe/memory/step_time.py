"""A model of time: seconds of one training step, from what is counted (``work.py``) and how fast a device is.

attention FLOPs / attention rate + matrix products / their rate + bytes moved in device memory / its rate
+ all-to-alls / link + what of ring, FSDP2 and host copies is longer than the computation beside it
+ host copies that nothing hides + a fixed cost a kernel call and a step
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torchtitan_upipe.job.shape import JobShape
from torchtitan_upipe.memory.attention_work import hidden_work, layer_work
from torchtitan_upipe.memory.rates import CALL_SECONDS, Rates
from torchtitan_upipe.memory.work import (
    StepWork,
    Work,
    ends_work,
    feed_forward_work,
    offload_work,
    sharding_work,
)

ATTENTION, PRODUCTS, MOVED, EXCHANGE, HOST, FIXED = PARTS = (
    "attention",
    "products",
    "device memory",
    "exchange",
    "host link",
    "fixed costs",
)


@dataclass(frozen=True)
class Machine:
    """Devices, how many of them share a host, and the attention kernel that they run."""

    rates: Rates
    ranks_per_host: int = 8
    kernel: str = "auto"


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of one micro-batch's step of one rank, by :data:`PARTS`."""

    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        """Of the step."""
        return sum(self.parts.values())

    @property
    def limit(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=lambda part: self.parts[part])

    def tokens_per_second(self, job: JobShape) -> float:
        """Tokens of a rank."""
        return job.rows / self.seconds


def step_work(job: JobShape) -> StepWork:
    """All that a rank does in a step."""
    step, layers = StepWork(), job.model.layers
    for stash, count in Counter(job.stash_of(layer) for layer in range(layers)).items():
        step.add(layer_work(job, stash), count)
    step.add(feed_forward_work(job), layers)
    step.add(hidden_work(job), layers)
    for part in (ends_work(job), sharding_work(job), offload_work(job)):
        step.add(part)
    return step


def predict_time(job: JobShape, machine: Machine) -> StepTime:
    """The time of one micro-batch; one document a sequence."""
    return time_of(step_work(job), job, machine)


def time_of(work: StepWork, job: JobShape, machine: Machine) -> StepTime:
    """The time of counted work."""
    parts = dict.fromkeys(PARTS, 0.0) | {FIXED: machine.rates.fit.step_seconds}
    for one in (work.forward, work.backward):
        for part, seconds in _pass_seconds(one, job, machine).items():
            parts[part] += seconds
    return StepTime(parts)


def _pass_seconds(work: Work, job: JobShape, machine: Machine) -> dict[str, float]:
    rates, fit = machine.rates, machine.rates.fit
    forward, backward = rates.attention_rates(machine.kernel)
    seconds = {
        ATTENTION: (work.attention / forward + work.attention_backward / backward) / fit.attention,
        PRODUCTS: work.products / (rates.products * fit.products),
        MOVED: work.moved / rates.device_memory,
        EXCHANGE: work.exchanged * _exchange_seconds(machine, job.ulysses),
        HOST: work.host_waited / rates.host,
        FIXED: work.calls * CALL_SECONDS,
    }
    computing = seconds[ATTENTION] + seconds[PRODUCTS] + seconds[MOVED]
    hop = _hop_seconds(machine, job.ulysses * job.ring)
    seconds[EXCHANGE] += max(0.0, work.ringed * hop - seconds[ATTENTION]) + work.ring_waited * hop
    seconds[EXCHANGE] += max(0.0, work.sharded * _gather_seconds(machine, job.shards) - computing)
    seconds[HOST] += max(0.0, work.host / rates.host - computing)
    return seconds


def _exchange_seconds(machine: Machine, ranks: int) -> float:
    """Seconds a byte that a rank sends to all others of a group of neighbours."""
    near = min(ranks, machine.ranks_per_host) - 1
    far = ranks - 1 - near
    return (near / machine.rates.link + far / machine.rates.network) / max(ranks - 1, 1)


def _hop_seconds(machine: Machine, ranks: int) -> float:
    """Seconds a byte that a rank hands to the next one of a ring."""
    return 1 / (machine.rates.link if ranks <= machine.ranks_per_host else machine.rates.network)


def _gather_seconds(machine: Machine, ranks: int) -> float:
    """Seconds a byte that every rank gathers; each host's ranks share what comes from other hosts."""
    rates, hosts = machine.rates, ranks > machine.ranks_per_host
    return max(1 / rates.link, 1 / (machine.ranks_per_host * rates.network) if hosts else 0.0)
