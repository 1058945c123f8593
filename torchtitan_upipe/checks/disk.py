"""Room for the job's checkpoints, and the seconds that writing one takes."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.tools.utils import device_type

from torchtitan_upipe.checks.report import Hosts, Verdict, spell_seconds
from torchtitan_upipe.job.shape import JobShape, own_elements
from torchtitan_upipe.memory.prediction import GIB

SAMPLE = {"cpu": 2**23, "cuda": 2**28}  # bytes that every rank writes on trial
STATES = 3  # a weight and Adam's two moments


@dataclass(frozen=True)
class DiskFound:
    """What one rank found.

    Attributes:
        folder: where it wrote on trial: the nearest folder to that of the checkpoints that exists.
        free: bytes there.
        need: bytes of all checkpoints that stand there at once.
        saves: how many these are.
        seconds: of this rank's part of one save: what the trial took, times what there is to write.
        refused: why nothing could be written.
    """

    folder: str
    free: int
    need: int
    saves: int
    seconds: float
    refused: str = ""


def measure_disk(config: JobConfig, job: JobShape, mark: Callable[[str], None]) -> DiskFound:
    """Write a little, as all other ranks do now, to the disk and not to its cache."""
    mark("a trial of the disk")
    checkpoint = config.checkpoint
    wanted = Path(config.job.dump_folder) / (checkpoint.folder if checkpoint.enable else "")
    folder = next(place for place in (wanted.absolute(), *wanted.absolute().parents) if place.is_dir())
    saves, need = checkpoint_bytes(config, job)
    try:
        seconds = _write(folder, SAMPLE[device_type])
    except OSError as error:
        return DiskFound(str(folder), 0, need, saves, 0.0, error.strerror or str(error))
    own = STATES * job.own_elements * job.stored if saves else 0
    return DiskFound(str(folder), shutil.disk_usage(folder).free, need, saves, seconds * own / SAMPLE[device_type])


def checkpoint_bytes(config: JobConfig, job: JobShape) -> tuple[int, int]:
    """Checkpoints that stand there at once, one that is being written among them, and their bytes."""
    checkpoint, steps = config.checkpoint, config.training.steps
    if not checkpoint.enable or checkpoint.load_only:
        return 0, 0
    elements = own_elements(job.weights, 1)
    whole = STATES * elements * job.stored
    last = elements * TORCH_DTYPE_MAP[checkpoint.export_dtype].itemsize if checkpoint.last_save_model_only else whole
    before = (steps - 1) // checkpoint.interval
    kept = min(before, checkpoint.keep_latest_k) if checkpoint.keep_latest_k else before
    return kept + 1, kept * whole + last


def _write(folder: Path, size: int) -> float:
    part = os.urandom(2**20)  # what a file system could not press together
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for _ in range(size // len(part)):
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - began


def judge_disk(findings: list[DiskFound], hosts: Hosts) -> Verdict:
    """Name ranks that cannot write, or whose disk is too small."""
    failures = []
    for reason in sorted({found.refused for found in findings if found.refused}):
        ranks = [rank for rank, found in enumerate(findings) if found.refused == reason]
        failures.append(f"{findings[ranks[0]].folder} cannot be written to ({reason}) on {hosts.of(ranks)}.")
    small = [rank for rank, found in enumerate(findings) if not found.refused and found.free < found.need]
    if small:
        found = findings[small[0]]
        failures.append(
            f"{found.folder} has {found.free / GIB:.2f} GiB free and the job's {found.saves} checkpoints take "
            f"{found.need / GIB:.2f} GiB, on {hosts.of(small)}; lower checkpoint.keep_latest_k, or choose another "
            "job.dump_folder."
        )
    first, free = findings[0], min(found.free for found in findings)
    if not first.saves:
        return Verdict(f"no checkpoints are asked for; {first.folder} has {free / GIB:.1f} GiB free", failures)
    seconds = max(found.seconds for found in findings)
    return Verdict(
        f"{first.saves} checkpoint{'s' if first.saves > 1 else ''} of {first.need / GIB:.2f} GiB in all, "
        f"{free / GIB:.1f} GiB free; one save takes "
        f"{spell_seconds(seconds)} "
        f"(extrapolated from {SAMPLE[device_type] / 2**20:.0f} MiB that each rank wrote at once)",
        failures,
    )
