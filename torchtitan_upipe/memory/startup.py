"""What a job leaves to the planner when it starts: ``head_chunk = 0`` and ``settings = "auto"``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torchtitan_upipe.device import SIMULATED, host_memory_of_rank, memory_of_rank, name_of_device
from torchtitan_upipe.job.shape import JobShape, job_shape
from torchtitan_upipe.memory.axes import AT_START, Settings, all_head_chunks, settings_of
from torchtitan_upipe.memory.planner import Budget, Plan, Planner
from torchtitan_upipe.memory.prediction import GIB
from torchtitan_upipe.memory.rates import rates_of
from torchtitan_upipe.memory.remedies import advice, explain_nothing_fits
from torchtitan_upipe.memory.step_time import Machine

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

RESERVE = {"cuda": 4 * GIB, "cpu": 0}  # the device's context, buffers of the communication library, fragmentation
HOST_SHARE = 0.9  # of a host's memory that its ranks may pin


@dataclass(frozen=True)
class Place:
    """Where a rank runs.

    Attributes:
        name: of the device.
        device, host: bytes of device and host memory that the rank has to itself.
        ranks_per_host: ranks of its host.
        shared: device and host are one memory.
    """

    name: str
    device: float
    host: float
    ranks_per_host: int
    shared: bool

    def planner(self, kernel: str) -> Planner:
        """A planner for this place."""
        machine = Machine(rates_of(self.name), self.ranks_per_host, kernel)
        return Planner(Budget(self.device, self.host, self.shared), machine, AT_START)


def place_of(device_type: str, ranks_per_host: int) -> Place:
    """This process's place."""
    device = memory_of_rank(device_type) - RESERVE[device_type]
    host = HOST_SHARE * host_memory_of_rank()
    return Place(name_of_device(device_type), device, host, ranks_per_host, shared=device_type == "cpu")


def smallest(places: list[Place]) -> Place:
    """What every one of ``places`` has: ranks must agree on their settings."""
    return replace(places[0], device=min(p.device for p in places), host=min(p.host for p in places))


def leaves_settings(config: JobConfig, device_type: str) -> bool:
    """Whether there is something to choose; the simulated device, which has no end, chooses nothing."""
    cp = config.context_parallel
    chunk = cp.method == "upipe" and cp.head_chunk == 0
    return device_type != SIMULATED and (cp.settings == "auto" or chunk)


def fill_settings(config: JobConfig, world_size: int, place: Place) -> str:
    """Set what the job leaves to the planner, to the fastest settings that fit; ``settings`` is ``"manual"`` then.

    Returns:
        One line for the log.

    Raises:
        ValueError: nothing fits.
    """
    cp = config.context_parallel
    planner, job = place.planner(cp.attention_kernel), job_shape(config, world_size)
    everything = cp.settings == "auto"
    plan = planner.fastest(job) if everything else planner.first_that_fits(_with_chunks(job))
    if plan is None:
        raise ValueError(explain_nothing_fits(job, planner) if everything else _no_chunk_fits(job, planner))
    settings: Settings = (
        settings_of(plan.job, AT_START) if everything else {"context_parallel": {"head_chunk": plan.job.head_chunk}}
    )
    for section, fields in settings.items():
        for name, value in fields.items():
            setattr(getattr(config, section), name, value)
    cp.settings = "manual"
    return _describe(plan, settings, planner)


def _with_chunks(job: JobShape) -> Iterator[JobShape]:
    return (replace(job, head_chunk=chunk) for chunk in all_head_chunks(job))


def _no_chunk_fits(job: JobShape, planner: Planner) -> str:
    smallest_ = replace(job, head_chunk=all_head_chunks(job)[-1])
    prediction = planner.predict(smallest_)
    return (
        f"head_chunk = 0 asks for the fastest chunk that fits, and the smallest, {smallest_.head_chunk}, needs "
        f"{prediction.device_bytes / GIB:.1f} GiB of the {max(planner.budget.device, 0) / GIB:.1f} GiB that a rank "
        f"has; {advice(prediction, smallest_)}."
    )


def _describe(plan: Plan, settings: Settings, planner: Planner) -> str:
    fields = ", ".join(f"{name} = {value}" for section in settings.values() for name, value in section.items())
    rates = planner.machine.rates
    stand_in = "" if rates.known else f" (whose rates are unknown: those of {rates.stand_in} order the settings)"
    device, host = plan.prediction.device_bytes / GIB, plan.prediction.host_bytes / GIB
    seconds = f", {plan.time.seconds:.3g} s a micro-batch" if rates.known else ""
    return (
        f"Settings chosen for {rates.name}{stand_in}: {fields}; predicted {device:.2f} GiB of device and {host:.2f} "
        f"GiB of host memory a rank{seconds}"
    )
