"""What fits, and how fast it is: the fastest settings for a context, the longest context of each method.

Settings are tried in the order of their predicted time (``step_time.py``, cheap) until the ledger says that one fits.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from math import ceil, lcm

from torchtitan_upipe.data.sharding import chunk_of
from torchtitan_upipe.job.shape import JobShape
from torchtitan_upipe.memory.axes import AXES, SEQUENCE_CHUNKS, Axis, candidates, sparing
from torchtitan_upipe.memory.block_bytes import Walks
from torchtitan_upipe.memory.ledger import predict_shape
from torchtitan_upipe.memory.prediction import GIB, Prediction
from torchtitan_upipe.memory.step_time import Machine, StepTime, predict_time

LONGEST = 2**28  # tokens; no search goes beyond


@dataclass(frozen=True)
class Budget:
    """Bytes that one rank may use.

    Attributes:
        device: of the device.
        host: of the host, beside those.
        shared: host and device are one memory, of ``device`` bytes.
    """

    device: float
    host: float
    shared: bool = False

    def host_left(self, prediction: Prediction) -> float:
        """Host bytes that may be used beside the prediction's device bytes."""
        return self.device - prediction.device_bytes if self.shared else self.host

    def holds(self, prediction: Prediction) -> bool:
        """Whether the prediction fits."""
        return prediction.device_bytes <= self.device and prediction.host_bytes <= self.host_left(prediction)


@dataclass(frozen=True)
class Plan:
    """Settings of a job, what they need, and how long a micro-batch takes."""

    job: JobShape
    prediction: Prediction
    time: StepTime

    @property
    def tokens_per_second(self) -> float:
        """Tokens of a rank."""
        return self.time.tokens_per_second(self.job)


@dataclass
class Planner:
    """Searches settings for one machine, along ``axes``."""

    budget: Budget
    machine: Machine
    axes: Sequence[Axis] = AXES
    _walks: Walks = field(default_factory=dict)

    def predict(self, job: JobShape) -> Prediction:
        """The ledger's answer."""
        return predict_shape(job, self._walks)

    def plan(self, job: JobShape) -> Plan:
        """``job`` with the settings it has, whether it fits or not."""
        return Plan(job, self.predict(job), predict_time(job, self.machine))

    def fastest(self, job: JobShape) -> Plan | None:
        """The fastest settings of ``job``'s method that fit, or None."""
        return self.first_that_fits(candidates(job, self.axes))

    def first_that_fits(self, jobs: Iterator[JobShape]) -> Plan | None:
        """The fastest of ``jobs`` that fits; where only host memory lacks, with a stash for fewer layers; or None."""
        order = count()
        queue = [(predict_time(job, self.machine).seconds, next(order), job) for job in jobs]
        heapq.heapify(queue)
        while queue:
            _, _, job = heapq.heappop(queue)
            if least_bytes(job) > self.budget.device:
                continue
            lacking = least_host_bytes(job) - (self.budget.device if self.budget.shared else self.budget.host)
            if lacking <= 0:
                prediction = self.predict(job)
                if self.budget.holds(prediction):
                    return Plan(job, prediction, predict_time(job, self.machine))
                if prediction.device_bytes > self.budget.device:
                    continue
                lacking = prediction.host_bytes - self.budget.host_left(prediction)
            fewer = self._with_fewer_stashes(job, lacking)
            if fewer is not None:
                heapq.heappush(queue, (predict_time(fewer, self.machine).seconds, next(order), fewer))
        return None

    def _with_fewer_stashes(self, job: JobShape, lacking: float) -> JobShape | None:
        if not job.staged or job.stash != "host":
            return None
        now = sum(job.stash_of(layer) == "host" for layer in range(job.model.layers))
        layers = now - max(ceil(lacking / job.stash_bytes), 1)
        return replace(job, stash_budget=stash_budget(job, layers)) if layers > 0 else None

    def longest(self, job: JobShape) -> Plan | None:
        """The longest context that fits under any settings, to 1% or one step, and its fastest settings.

        None where not even one step of 1024 tokens a rank fits.
        """
        step = 1024 * lcm(job.ulysses * job.ring, 2 * job.ring)
        steps = 0
        for least in reversed(list(sparing(replace(job, length=step), self.axes))):  # the most thrifty first
            steps = self._longer(least, step, steps)
        return self.fastest(replace(job, length=steps * step)) if steps else None

    def _longer(self, job: JobShape, step: int, low: int) -> int:
        """The most steps with these settings; ``low``, which others reach, where these do not go further."""

        def use(steps: int) -> float:
            return self._share(self.predict(replace(job, length=steps * step)))

        high, last, share = LONGEST // step + 1, low, 0.0
        guess = low + max(1, low // 100)  # one prediction tells that these do not go further
        while guess < high:
            (before, less), (last, share) = (last, share), (guess, use(guess))
            low, high = (guess, high) if share <= 1 else (low, guess)
            if high - low <= max(1, low // 100):
                break
            slope = (share - less) / (last - before) if less else share / last
            aim = last + int((1 - share) / slope) if slope > 0 else 2 * last
            margin = max(1, low // 400)  # past the crossing, so that the other side is found as well
            guess = min(max(aim + (margin if share > 1 else -margin), low + 1), high - 1)
        return low

    def _share(self, prediction: Prediction) -> float:
        used = prediction.device_bytes, prediction.host_bytes
        if self.budget.shared:
            return sum(used) / self.budget.device
        return max(used[0] / self.budget.device, used[1] / self.budget.host)


def stash_budget(job: JobShape, layers: int) -> float:
    """A budget, short to write in GiB, that gives ``layers`` layers a stash."""
    return float(f"{(layers + 0.5) * job.stash_bytes / GIB:.4g}") * GIB


def least_bytes(job: JobShape) -> float:
    """Device bytes surely needed at the end of the forward pass: cheap, and never more than the ledger says."""
    layers = job.model.layers
    state = 0 if job.state_on_host else 3 * job.stored * job.own_elements
    kept = 1 if job.checkpoint else 3  # each block's input; its normed input and its middle
    inputs = 0 if job.offload or job.hidden_on_host else kept * layers * job.hidden
    stashes = sum(job.staged and job.stash_of(layer) == "device" for layer in range(layers))
    return state + inputs + stashes * job.stash_bytes


def least_host_bytes(job: JobShape) -> float:
    """The same of host memory: block inputs and stashes."""
    layers = job.model.layers
    inputs = layers * job.hidden if job.offload or job.hidden_on_host else 0
    stashes = sum(job.staged and job.stash_of(layer) == "host" for layer in range(layers))
    return inputs + stashes * job.stash_bytes


def methods(job: JobShape) -> Iterator[JobShape]:
    """The job under each method, on the same ranks; hybrids if the job is one."""
    degree = job.ulysses * job.ring
    chunk, job = chunk_of("fpdt", degree, SEQUENCE_CHUNKS[0]), replace(job, sequence_chunk=0)
    for method in ("upipe", "ulysses"):
        yield replace(job, method=method, ulysses=degree, ring=1)
        if job.ring > 1 and job.method != "ring":
            yield replace(job, method=method)
    if degree > 1:
        yield replace(job, method="ring", ulysses=1, ring=degree)
    yield replace(job, method="fpdt", ulysses=degree, ring=1, sequence_chunk=chunk)
