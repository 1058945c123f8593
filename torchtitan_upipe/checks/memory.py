"""The ledger against a measured step, and what the job needs against what devices and hosts have."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torchtitan.tools.utils import device_module, device_type

from torchtitan_upipe.checks.host import host_memory_left, process_memory_left
from torchtitan_upipe.checks.report import Hosts, Verdict
from torchtitan_upipe.checks.short import STEPS, ShortTrainer
from torchtitan_upipe.device import is_out_of_memory, memory_of_rank
from torchtitan_upipe.dry_run.peak import CpuMeter, CudaMeter, PeakMeter
from torchtitan_upipe.job.shape import JobShape, job_shape
from torchtitan_upipe.memory.ledger import predict_shape
from torchtitan_upipe.memory.prediction import GIB
from torchtitan_upipe.memory.remedies import advice
from torchtitan_upipe.memory.startup import RESERVE
from torchtitan_upipe.stash.transfers import Transfers

MORE, MIB = 0.1, 2**20  # share of the predicted peak that a step may take beyond it
SMALL = 4 * MIB  # and bytes, for short jobs
SAMPLE = GIB  # of host memory is asked for on trial


@dataclass
class MemoryFound:
    """Bytes of one rank: a short step's and the job's, predicted; and what there is.

    Attributes:
        predicted, measured: peak of a step of the short job at its longer length.
        device, host: predicted for the job.
        has: device memory that the rank may use.
        advice: what to change if the device has too little.
        left, own_left: host memory that there is, by what limits it: for all ranks of a host, for this process.
        refused: what the system said to a trial of host memory; empty where it gave it.
        seconds: of a micro-batch in the step before the one measured.
    """

    predicted: int
    measured: int
    device: int
    host: int
    has: float
    advice: str
    left: dict[str, int] = field(default_factory=dict)
    own_left: dict[str, int] = field(default_factory=dict)
    refused: str = ""
    seconds: float = 0.0


def longer_shape(trainer: ShortTrainer) -> JobShape:
    """The short job at the length at which memory and time are measured."""
    short = job_shape(
        trainer.job_config, trainer.parallel_dims.world_size, trainer.rank, workspace=device_type != "cpu"
    )
    return replace(short, length=trainer.short.longer)


def measure_memory(trainer: ShortTrainer, job: JobShape, mark: Callable[[str], None]) -> MemoryFound:
    """Two steps at the longer length, of which the second is watched; the job's needs, and what this rank has."""
    mark("a step whose memory is measured")
    batch = trainer.draw(STEPS + 1, trainer.short.longer)
    device_module.synchronize()
    began = time.perf_counter()
    trainer.step_on(batch)
    device_module.synchronize()
    seconds = (time.perf_counter() - began) / trainer.gradient_accumulation_steps
    meter: PeakMeter = CpuMeter() if device_type == "cpu" else CudaMeter()
    with meter.watch():
        trainer.step_on(batch)
        meter.before_log()
    prediction = predict_shape(job)
    need = prediction.host_bytes + (prediction.device_bytes if device_type == "cpu" else 0)
    return MemoryFound(
        predict_shape(longer_shape(trainer)).device_bytes,
        meter.peak,
        prediction.device_bytes,
        need,
        memory_of_rank(device_type) - RESERVE[device_type],
        advice(prediction, job),
        host_memory_left(),
        process_memory_left(),
        _try(trainer, min(need, SAMPLE)),
        seconds,
    )


def _try(trainer: ShortTrainer, size: int) -> str:
    """Ask for host memory as a stash does, page-locked on CUDA; what the system says if it gives none."""
    try:
        Transfers(trainer.device).host_memory(size).fill_(0)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return str(error).partition("\n")[0]
    return ""


def judge_memory(findings: list[MemoryFound], hosts: Hosts) -> Verdict:
    """Name ranks that take more than predicted or have too little, and hosts whose ranks need too much together."""
    failures = []
    over = [rank for rank, f in enumerate(findings) if f.measured > (1 + MORE) * f.predicted + SMALL]
    if over:
        found = findings[over[0]]
        failures.append(
            f"a short step takes {found.measured / MIB:,.0f} MiB, and by the ledger {found.predicted / MIB:,.0f}, on "
            f"{hosts.of(over)}: do not trust what it predicts for this job."
        )
    small = [rank for rank, f in enumerate(findings) if device_type != "cpu" and f.device > f.has]
    if small:
        found = findings[small[0]]
        failures.append(
            f"the job needs {found.device / GIB:.1f} GiB of device memory and {found.has / GIB:.1f} GiB are there, on "
            f"{hosts.of(small)}; {found.advice}."
        )
    failures += _short_hosts(findings, hosts)
    refused: defaultdict[str, list[int]] = defaultdict(list)
    for rank, f in enumerate(findings):
        if f.refused:
            refused[f.refused].append(rank)
    failures += [f"host memory cannot be had on {hosts.of(ranks)}: {said}." for said, ranks in refused.items()]
    worst = max(findings, key=lambda f: f.measured / f.predicted)
    left = min(min(f.left.values(), default=0) for f in findings)
    return Verdict(
        f"a short step takes {worst.measured / MIB:,.1f} MiB (predicted {worst.predicted / MIB:,.1f}); the job is "
        f"predicted to take {max(f.device for f in findings) / GIB:.2f} GiB of a device and "
        f"{max(f.host for f in findings) / GIB:.2f} GiB of host memory a rank, of a host's {left / GIB:.1f} GiB",
        failures,
    )


def _short_hosts(findings: list[MemoryFound], hosts: Hosts) -> list[str]:
    on_host: defaultdict[str, list[int]] = defaultdict(list)
    for rank, host in enumerate(hosts.names):
        on_host[host].append(rank)
    failures = []
    remedy = findings[0].advice if device_type == "cpu" else "set context_parallel.stash_budget_gib, or use more hosts"
    for ranks in on_host.values():
        need = sum(findings[rank].host for rank in ranks)
        for limit in findings[ranks[0]].left:
            left = min(findings[rank].left.get(limit, need) for rank in ranks)
            if need > left:
                failures.append(
                    f"{hosts.of(ranks)} need {need / GIB:.3g} GiB of host memory together and {limit} leaves "
                    f"{left / GIB:.3g} GiB; {remedy}."
                )
    for limit in sorted({name for f in findings for name in f.own_left}):
        ranks = [rank for rank, f in enumerate(findings) if f.host > f.own_left.get(limit, f.host)]
        if ranks:
            found = findings[ranks[0]]
            failures.append(
                f"{hosts.of(ranks)} may take {found.own_left[limit] / GIB:.2f} GiB by {limit} and need "
                f"{found.host / GIB:.2f} GiB of host memory each; raise the limit."
            )
    return failures
