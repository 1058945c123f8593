"""SIGTERM and SIGUSR1: all ranks stop at one layer boundary, and the resumed run is the unbroken one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.faults import PHASES, Fault, run_with_faults
from tests.jobs import ROOT, job_args, read_log
from tests.ranks import run_ranks
from tests.test_failures import local, rows
from torchtitan_upipe.job.results import read_results
from torchtitan_upipe.titan.stop import Stop, Stopped

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
    options = {**JOB, **local(tmp_path / "x.jsonl", rows(40))}
    args = job_args(broken, 2, **options)
    jobs = [(job_args(unbroken, 2, **options), None), *((args, fault) for fault in faults), (args, None)]
    for results in run_ranks(run_with_faults, 2, tmp_path, jobs, init=False):
        assert results == [(0, "")] * len(jobs)
    whole, pieces = read_log(unbroken), read_log(broken)
    assert len(whole.loss) == 6
    assert (pieces.loss, pieces.grad_norm) == (whole.loss, whole.grad_norm)
    assert steps_saved(broken) == {"step-1", "step-2", "step-5", "step-6"}  # of step 1 five times, the rest once


def test_without_checkpoints_a_stopped_job_says_that_nothing_was_saved(tmp_path: Path) -> None:
    """Hidden states on the host, whose blocks are no modules of TorchTitan's."""
    options = {
        **{f"context_parallel__{k}": v for k, v in {"hidden_states": "host", "stash": "host", "tile_size": 16}.items()},
        **JOB,
        **local(tmp_path / "x.jsonl", rows(40)),
        "checkpoint__enable": False,
    }
    jobs = [(job_args(tmp_path, 2, **options), Fault("SIGTERM", 1, 2, phase)) for phase in ("forward", "backward")]
    for results in run_ranks(run_with_faults, 2, tmp_path, jobs, init=False):
        assert results == [(0, "")] * 2
    assert len(read_log(tmp_path).loss) == 1
    assert not (tmp_path / "checkpoint").exists()


def test_stopped_in_evaluations_and_while_a_save_is_in_flight(tmp_path: Path) -> None:
    """Steps 2 and 4 are evaluated, step 3 is validated; step 5 is saved beside step 6."""
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    options = {
        **JOB,
        **local(tmp_path / "x.jsonl", rows(40)),
        "checkpoint__async_mode": "async",
        **{f"evaluation__{k}": v for k, v in {"freq": 2, "needle_trials": 0, "loss_sequences": 1}.items()},
        **{"validation__dataset": "stdlib", "validation__seq_len": 64, "validation__local_batch_size": 1},
        **{"validation__steps": 1, "validation__freq": 3},
    }
    flags = ["--evaluation.enable", "--evaluation.no-plots", "--validation.enable"]
    args = job_args(broken, 2, *flags, **options)
    faults = [Fault("SIGUSR1", 1, 2, "evaluation"), Fault("SIGTERM", 0, 3, "evaluation")]
    faults.append(Fault("SIGUSR1", 0, 5, "in flight"))
    jobs = [(job_args(unbroken, 2, *flags, **options), None), *((args, fault) for fault in faults), (args, None)]
    for results in run_ranks(run_with_faults, 2, tmp_path, jobs, init=False):
        assert results == [(0, "")] * len(jobs)
    whole, pieces = read_log(unbroken), read_log(broken)
    assert (pieces.loss, pieces.grad_norm) == (whole.loss, whole.grad_norm)
    assert len(whole.loss) == 6
    assert steps_saved(broken) == {"step-2", "step-3", "step-5", "step-6"}
    for step in (2, 4, 6):  # that of step 2 by the job that went on from there
        name = f"evaluation/step-{step}.json"
        assert read_results(broken / name) == read_results(unbroken / name)


LAYOUTS: dict[str, dict[str, Any]] = {
    "replicas": {"parallelism__context_parallel_degree": 1, "parallelism__data_parallel_replicate_degree": 2},
    "fpdt": {"context_parallel__method": "fpdt", "context_parallel__sequence_chunk": 32},
    "ring": {"context_parallel__method": "ring"},
    "no checkpointing": {"activation_checkpoint__mode": "none", "context_parallel__method": "ulysses"},
    "offload": {"activation_checkpoint__offload": True, "context_parallel__stash": "host"},
    "hidden": {
        "context_parallel__hidden_states": "host",
        "context_parallel__stash": "host",
        "context_parallel__tile_size": 16,
    },
    "first fit": {"training__packing": "first_fit", "training__document_mask": True},
    "mixture": {"training__dataset": "mixture", "training__dataset_path": "mixture.toml"},
    "worker": {"training__dataloader__num_workers": 1, "checkpoint__async_mode": "async"},
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stopped_under_other_layouts(layout: str, tmp_path: Path) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    options = {**JOB, **local(tmp_path / "x.jsonl", rows(40)), "context_parallel__head_chunk": 0, **LAYOUTS[layout]}
    if layout == "mixture":
        options["training__dataset_path"] = mixture(tmp_path)
    args = job_args(broken, 2, **options)
    jobs: list[tuple[list[str], Fault | None]] = [
        (job_args(unbroken, 2, **options), None),
        (args, Fault("SIGUSR1", 1, 2, "forward")),
        (args, Fault("SIGTERM", 0, 3, "backward")),
        (args, None),
    ]
    for results in run_ranks(run_with_faults, 2, tmp_path, jobs, init=False):
        assert results == [(0, "")] * len(jobs)
    whole, pieces = read_log(unbroken), read_log(broken)
    assert (pieces.loss, pieces.grad_norm) == (whole.loss, whole.grad_norm)
    assert len(whole.loss) == 6


def mixture(folder: Path) -> Path:
    """The job's documents, and others, three to one."""
    (folder / "y.jsonl").write_text(rows(30, start=100))
    file = folder / "mixture.toml"
    file.write_text("".join(
        f"[[source]]\ndataset = 'local'\ndataset_path = '{folder / name}'\nweight = {weight}\n"
        for name, weight in (("x.jsonl", 3), ("y.jsonl", 1))
    ))  # fmt: skip
    return file


def pass_boundaries(number: int, signals: dict[int, int], patience: float) -> str:
    """Pass ``number`` boundaries, each rank in its own time and bound to no other; where and why it stopped."""
    rank = dist.get_rank()
    with Stop() as stop:
        if patience:
            stop.watch(patience)
        for passed in range(number):
            time.sleep((rank + 1) * 1e-3)
            if signals.get(rank) == passed:
                os.kill(os.getpid(), signal.SIGUSR1)
            try:
                stop.boundary()
            except Stopped as stopped:
                return f"{passed}: {stopped}"
            except TimeoutError as error:
                return str(error)
        time.sleep(0 if patience else 4)
    return "to the end"


def test_ranks_that_do_not_wait_for_each_other_stop_at_the_same_boundary() -> None:
    """The fastest is ahead by hundreds when the slowest is asked; two ranks are asked at about the same time."""
    stopped = run_ranks(pass_boundaries, 3, 4000, {2: 100, 1: 150}, 20.0)
    assert len(set(stopped)) == 1
    assert "SIGUSR1 on rank" in stopped[0]


def test_a_rank_that_is_through_holds_nobody_up() -> None:
    """It has passed its last boundary; nobody stops short of theirs."""
    assert run_ranks(pass_boundaries, 2, 30, {1: 29}, 20.0) == ["to the end"] * 2


def test_a_rank_that_never_answers_is_waited_for_in_vain() -> None:
    first, _ = run_ranks(one_listens, 2)
    assert first == "not all ranks answered after SIGUSR1 on rank 0"


def one_listens() -> str:
    return pass_boundaries(1000, {0: 0}, 2.0 if dist.get_rank() == 0 else 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_a_signal_to_the_launch_script_ends_the_job_well(name: str, tmp_path: Path) -> None:
    args = job_args(tmp_path, 2, **{**JOB, "training__steps": 10000})
    del args[args.index("--job.config_file") : args.index("--job.config_file") + 2]
    process = subprocess.Popen(
        ["bash", "scripts/launch.sh", "train_configs/llama3_debug.toml", *args],
        cwd=ROOT,
        env={**os.environ, "NGPU": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "step 3/10000" in line:
            process.send_signal(getattr(signal, f"SIG{name}"))
            break
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "Stopped after SIGUSR1 on rank" in output
