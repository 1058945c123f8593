"""The job's limits of time against the step and the save that are predicted."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil

from torchtitan.config import JobConfig
from torchtitan.tools.utils import device_type

from torchtitan_upipe.checks.report import Hosts, Verdict, spell_seconds
from torchtitan_upipe.device import name_of_device
from torchtitan_upipe.job.shape import JobShape
from torchtitan_upipe.memory.rates import rates_of
from torchtitan_upipe.memory.step_time import FIXED, Machine, predict_time

MARGIN = 2  # times the predicted step that a timeout should leave: the model misses some steps by a half
END = "SLURM_JOB_END_TIME"


@dataclass(frozen=True)
class LimitsFound:
    """Seconds of one rank's job.

    Attributes:
        step: predicted.
        how: by what.
        save: extrapolated by the check of the disk.
        timeout: ``comm.train_timeout_seconds``.
        left: until the job is ended, or None.
        steps: of the job.
        first_save: steps until the first save, or None where there is none.
        saves: of the job.
    """

    step: float
    how: str
    save: float
    timeout: float
    left: float | None
    steps: int
    first_save: int | None
    saves: int

    @property
    def whole(self) -> float:
        """Of all steps and saves."""
        return self.steps * self.step + self.saves * self.save


def measure_limits(
    config: JobConfig,
    job: JobShape,
    short: JobShape,
    short_seconds: float,
    save_seconds: float,
    time_limit: str,
    mark: Callable[[str], None],
) -> LimitsFound:
    """Predict the step.

    Args:
        short: a job of which a step was measured.
        short_seconds: what a micro-batch of that step took.
        save_seconds: of one save.
        time_limit: ``--time-limit``, see :func:`seconds_left`.
    """
    mark("limits of time")
    step, how = step_seconds(config, job, short, short_seconds)
    checkpoint, steps = config.checkpoint, config.training.steps
    saving = checkpoint.enable and not checkpoint.load_only
    return LimitsFound(
        step,
        how,
        save_seconds,
        config.comm.train_timeout_seconds,
        seconds_left(time_limit, os.environ, time.time()),
        steps,
        min(checkpoint.interval, steps) if saving else None,
        ceil(steps / checkpoint.interval) if saving else 0,
    )


def step_seconds(config: JobConfig, job: JobShape, short: JobShape, short_seconds: float) -> tuple[float, str]:
    """Seconds of the job's step and by what they are predicted.

    By the rates of the device; where they are unknown, by a measured short step and the work of both.
    """
    rates = rates_of(name_of_device(device_type))
    machine = Machine(rates, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), job.kernel)
    batches = job.replicas * job.shards // (job.ulysses * job.ring) * job.batch
    passes = max(config.training.global_batch_size // batches, 1)
    if rates.known:
        return passes * predict_time(job, machine).seconds, f"by the rates of {rates.name}"
    work, of_short = (_without_fixed(shape, machine) for shape in (job, short))
    how = (
        f"from a micro-batch of {short.length:,} tokens and {short.model.layers} layers that took {short_seconds:.2g} s"
    )
    return passes * short_seconds * work / of_short, how


def _without_fixed(job: JobShape, machine: Machine) -> float:
    parts = predict_time(job, machine).parts
    return sum(seconds for part, seconds in parts.items() if part != FIXED)


def seconds_left(time_limit: str, environment: Mapping[str, str], now: float) -> float | None:
    """Until the job is ended, by the option or by SLURM; None where nobody says.

    Args:
        time_limit: seconds, or as SLURM writes it: ``"MM:SS"``, ``"HH:MM:SS"`` or ``"D-HH:MM:SS"``; "" = not given.
        environment: of the process.
        now: seconds since 1970.

    Raises:
        ValueError: neither.
    """
    if time_limit:
        match = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", time_limit)
        if match is None:
            raise ValueError(f"--time-limit {time_limit} is no time; write seconds, HH:MM:SS or D-HH:MM:SS.")
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    end = environment.get(END, "")
    return float(end) - now if end.isdigit() else None


def judge_limits(findings: list[LimitsFound], hosts: Hosts) -> Verdict:
    """The slowest rank's prediction against every limit."""
    found = max(findings, key=lambda f: f.step)
    failures = []
    for what, seconds in (("step", found.step), ("save", found.save)):
        if found.timeout < MARGIN * seconds:
            failures.append(
                f"comm.train_timeout_seconds = {found.timeout:g} is less than {MARGIN} predicted {what}s of "
                f"{spell_seconds(seconds)}, and would end the job on all ranks; set it "
                f"to {ceil(MARGIN * seconds):,d} or more."
            )
    lefts = [f.left for f in findings if f.left is not None]
    left = min(lefts) if lefts else None
    if left is not None:
        failures += _too_late(found, left)
    until = "no limit of the job's time is known" if left is None else f"{left:,.0f} s are left"
    return Verdict(
        f"a step is predicted to take {spell_seconds(found.step)} ({found.how}), all {found.steps:,} steps and "
        f"{found.saves} saves {found.whole:,.0f} s; comm.train_timeout_seconds = {found.timeout:g}; {until}",
        failures,
    )


def _too_late(found: LimitsFound, left: float) -> list[str]:
    if found.first_save is None:
        if found.whole <= left:
            return []
        return [
            f"the job is ended in {left:,.0f} s, needs {found.whole:,.0f} s and saves nothing; set checkpoint.enable = "
            "true, or ask for more time."
        ]
    first = found.first_save * found.step + found.save
    if first <= left:
        return []
    return [
        f"the job is ended in {left:,.0f} s and its first save, after step {found.first_save:,}, is done after "
        f"{first:,.0f} s; lower checkpoint.interval, or ask for more time."
    ]
