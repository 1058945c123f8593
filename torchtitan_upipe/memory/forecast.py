"""What a job needs and how long it takes on a named device, with the settings that it would have there."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchtitan_upipe.job.shape import job_shape, needed_ranks
from torchtitan_upipe.memory.planner import Plan
from torchtitan_upipe.memory.prediction import GIB
from torchtitan_upipe.memory.rates import rates_of
from torchtitan_upipe.memory.remedies import advice
from torchtitan_upipe.memory.startup import RESERVE, Place, fill_settings, leaves_settings

if TYPE_CHECKING:
    from torchtitan.config import JobConfig


@dataclass(frozen=True)
class Forecast:
    """A job on a device.

    Attributes:
        plan: settings, memory of a rank, seconds of a micro-batch.
        batch: sequences of a step, of all ranks.
        step_seconds: of a step, without evaluation and checkpoints.
        lacking: one sentence where the job does not fit; else empty.
    """

    plan: Plan
    batch: int
    step_seconds: float
    lacking: str


def named_place(device: str, host_memory: float, ranks_per_host: int) -> Place:
    """A rank's place on a device of the table; ``host_memory`` in bytes."""
    rates = rates_of(device)
    return Place(rates.name, rates.memory - RESERVE["cuda"], host_memory / ranks_per_host, ranks_per_host, shared=False)


def forecast(config: JobConfig, world_size: int, place: Place) -> Forecast:
    """What a rank of ``config`` needs at ``place``; ``world_size`` 0 = as many ranks as its degrees need.

    Raises:
        ValueError: it leaves settings to the planner, and none fit.
    """
    config, world_size = deepcopy(config), world_size or needed_ranks(config)
    if leaves_settings(config, "cuda"):
        fill_settings(config, world_size, place)
    job = job_shape(config, world_size)
    planner = place.planner(config.context_parallel.attention_kernel)
    plan = planner.plan(job)
    at_once = job.batch * (world_size // config.parallelism.context_parallel_degree)
    batch = max(config.training.global_batch_size, at_once)
    prediction, budget = plan.prediction, planner.budget
    lacking = ""
    if not budget.holds(prediction):
        lacking = (
            f"it needs {prediction.device_bytes / GIB:.1f} GiB of device and {prediction.host_bytes / GIB:.1f} GiB of "
            f"host memory a rank, and there are {budget.device / GIB:.1f} and {budget.host / GIB:.1f}; "
            f"{advice(prediction, job)}."
        )
    return Forecast(plan, batch, plan.time.seconds * (batch // at_once), lacking)
