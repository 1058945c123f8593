"""Ranks that fail, die or stop for a while: the job ends or goes on, and never hangs."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults import Fault, run_apart, run_with_faults
from tests.jobs import job_args, read_log
from tests.ranks import run_ranks
from tests.test_failures import local, rows

JOB: dict[str, Any] = {"training__seq_len": 64, "training__steps": 4, "context_parallel__head_chunk": 4}


def test_a_rank_fails_dies_or_pauses(tmp_path: Path) -> None:
    """Of two ranks of a sequence, which wait for each other in every layer."""
    faults = {
        "error": Fault("error", 1, 2, "forward"),
        "memory": Fault("memory", 1, 2, "backward"),
        "killed": Fault("SIGKILL", 1, 2, "forward"),
        "paused": Fault("pause", 1, 2, "backward"),
        "undisturbed": None,
    }
    options = {**JOB, **local(tmp_path / "x.jsonl", rows(40))}
    jobs = [(job_args(tmp_path / name, 2, **options), fault) for name, fault in faults.items()]
    first, second = run_ranks(run_apart, 2, tmp_path, jobs, init=False)
    assert all(seconds < 60 for _, seconds, _ in first + second)  # of which most are the start
    error, memory, killed, paused, undisturbed = second
    assert error[0] == 1
    assert error[2].endswith("RuntimeError: a collective of this rank fails\n")
    assert memory[0] == 1
    assert memory[2].startswith("OutOfMemoryError: CUDA out of memory; the ledger predicts a peak of ")
    assert killed[0] == -signal.SIGKILL
    assert all(code != 0 for code, _, _ in first[:3])
    ended = first[2][0] == -signal.SIGTERM  # before it came to its own words
    assert ended or first[2][2].startswith("ConnectionError: another rank ended")

    assert [code for code, _, _ in (*first[3:], paused, undisturbed)] == [0] * 4
    assert read_log(tmp_path / "paused") == read_log(tmp_path / "undisturbed")
    assert len(read_log(tmp_path / "paused").loss) == 4


@pytest.mark.slow
def test_a_rank_that_pauses_for_twenty_seconds_is_waited_for(tmp_path: Path) -> None:
    options = {**JOB, **local(tmp_path / "x.jsonl", rows(40))}
    jobs = [
        (job_args(tmp_path / "undisturbed", 2, **options), None),
        *(
            (job_args(tmp_path / phase, 2, **options), Fault("long pause", rank, 2, phase))
            for rank, phase in enumerate(("forward", "backward"))
        ),
    ]
    for results in run_ranks(run_with_faults, 2, tmp_path, jobs, init=False):
        assert results == [(0, "")] * 3
    assert read_log(tmp_path / "forward") == read_log(tmp_path / "backward") == read_log(tmp_path / "undisturbed")
