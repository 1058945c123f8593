"""SIGTERM and SIGUSR1: all ranks stop at one layer boundary, and the resumed run is the unbroken one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.faults import PHASES, Fault, run_with_faults
from tests.jobs import job_args, read_log
from tests.ranks import run_ranks

JOB: dict[str, Any] = {
    "checkpoint__enable": True,
    "checkpoint__interval": 5,
    "training__global_batch_size": 2,  # two micro-batches on the two ranks of a sequence
    "training__seq_len": 64,
    "training__steps": 6,
    "activation_checkpoint__mode": "full",
    "context_parallel__head_chunk": 4,
}


def steps_saved(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoint").iterdir()}


def test_stopped_in_every_phase_and_resumed(tmp_path: Path) -> None:
    """Each job goes on where the one before was stopped, by one signal to one rank."""
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    kinds = ("SIGUSR1", "SIGTERM")
    faults = [
        Fault(kinds[number % 2], number // 2 % 2, 5 if phase == "save" else 2, phase)
        for number, phase in enumerate(PHASES)
    ]
    args = job_args(broken, 2, **JOB)
    jobs = [(job_args(unbroken, 2, **JOB), None), *((args, fault) for fault in faults), (args, None)]
    for results in run_ranks(run_with_faults, 2, tmp_path, jobs, init=False):
        assert results == [(0, "")] * len(jobs)
    whole, pieces = read_log(unbroken), read_log(broken)
    assert len(whole.loss) == 6
    assert (pieces.loss, pieces.grad_norm) == (whole.loss, whole.grad_norm)
    assert steps_saved(broken) == {"step-1", "step-2", "step-5", "step-6"}  # of step 1 five times, the rest once
