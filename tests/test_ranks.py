"""What the console and TensorBoard say of a job's ranks while it runs."""

from __future__ import annotations

import os
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.faults import Fault, run_with_faults
from tests.jobs import job_args
from tests.ranks import run_ranks
from tests.test_failures import local, rows
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.memory.prediction import GIB
from torchtitan_upipe.titan.ranks import Lookout, RankState, Spent, Stopwatch

CALM = RankState(own=1.0, stage=0.1, device=5 * GIB, host=2 * GIB, retries=0)


def states(**of_rank_1: float) -> list[RankState]:
    return [CALM, RankState(**{**vars(CALM), **of_rank_1}), CALM]


def lookout(folder: Path) -> Lookout:
    config = read_job(job_args(folder, 1, context_parallel__method="ulysses"))
    return Lookout(config, device=10 * GIB, host=100 * GIB)


def test_little_headroom_is_said_once_with_advice(tmp_path: Path) -> None:
    out = lookout(tmp_path)
    assert not list(out.look(states()))
    (said,) = out.look(states(device=9.1 * GIB))
    assert said.startswith("rank 1 has used 9.10 of its 10.00 GiB of memory (91%); set ")
    assert not list(out.look(states(device=9.2 * GIB)))


def test_retries_are_said_when_there_are_more(tmp_path: Path) -> None:
    out = lookout(tmp_path)
    (said,) = out.look(states(retries=2))
    assert "rank 1's allocator has given back its cache 2 times" in said
    assert not list(out.look(states(retries=2)))
    assert len(list(out.look(states(retries=3)))) == 1


def test_growth_of_host_memory(tmp_path: Path) -> None:
    out = lookout(tmp_path)
    assert not [said for host in (2, 20, 30, 39) for said in out.look(states(host=host * GIB))]  # still filling up
    (said,) = out.look(states(host=41 * GIB))
    assert said.startswith("rank 1 holds 11.00 GiB more of host memory than before")
    assert not list(out.look(states(host=42 * GIB)))


def test_a_rank_that_is_slow_again_and_again(tmp_path: Path) -> None:
    out = lookout(tmp_path)
    said = [list(out.look(states(own=own))) for own in (1.5, 1.5, 1.0, 1.5, 1.5, 1.5, 1.5)]
    assert [len(lines) for lines in said] == [0, 0, 0, 0, 0, 1, 0]
    assert said[5] == ["the others wait for rank 1, whose part of a step takes 1.50 times the median"]


def test_a_stage_lies_between_two_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 4.0, 9.0, 10.0, 12.0, 12.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    watch = Stopwatch()
    for _ in range(4):
        with watch():
            pass
    assert watch.read() == Spent(waiting=3.5, stage=2.0)
    assert watch.read() == Spent(waiting=0.0, stage=0.0)


def run_with_console(folder: Path, args: list[str], fault: Fault) -> None:
    with (folder / f"console-{os.environ['RANK']}").open("w") as console, redirect_stdout(console):
        assert run_with_faults(folder, [(args, fault)]) == [(0, "")]


def test_progress_and_the_slowest_rank(tmp_path: Path) -> None:
    options = {
        **local(tmp_path / "x.jsonl", rows(40)),
        "training__seq_len": 64,
        "training__steps": 5,
        "context_parallel__head_chunk": 4,
    }
    run_ranks(
        run_with_console, 2, tmp_path, job_args(tmp_path, 2, **options), Fault("slow", 1, 1, "attention"), init=False
    )
    console = (tmp_path / "console-0").read_text()
    line = r"step \d/5  loss [\d.]+  grad_norm [\d.]+  [\d.]+ s/step  [\d,]+ tokens/s  memory [\d.]+ GiB \(\d+%\)  "
    assert len(re.findall(line, console)) == 5
    assert len(re.findall(r"step 5/5 .* 0:00:00 left", console)) == 1
    assert console.count("the others wait for rank 1, whose part of a step takes") == 1
    assert not re.search("mfu|lspci|set_vital|DTensor|step:", console)
    (events,) = tmp_path.glob("tb/*/events*")
    scalars = EventAccumulator(str(events)).Reload()
    assert scalars.Scalars("ranks/slowest_over_median")[-1].value > 1.2
    least, most = (scalars.Scalars(f"ranks/stage_time_{which}(s)")[-1].value for which in ("min", "max"))
    assert 0 < least <= most
    assert "mfu(%)" not in scalars.Tags()["scalars"]
