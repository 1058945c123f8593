"""The planner's settings fit and the next step does not; jobs ask it with head_chunk = 0; out of memory it helps."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.jobs import ROOT, job_args
from torchtitan_upipe import train
from torchtitan_upipe.device import SIMULATED
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.job.shape import JobShape, job_shape
from torchtitan_upipe.memory import planner
from torchtitan_upipe.memory.__main__ import main as memory_main
from torchtitan_upipe.memory.ledger import predict, predict_shape
from torchtitan_upipe.memory.planner import Budget, candidates, explain_nothing_fits, fastest, fill_head_chunk, longest
from torchtitan_upipe.plan import main, parse_bytes, planned


def shape(folder: Path, method: str = "upipe", **options: object) -> JobShape:
    args = job_args(folder, 4, context_parallel__method=method, training__seq_len=4096, **options)
    return job_shape(read_job(args, 4), 4)


@pytest.mark.parametrize("method", ["upipe", "ulysses", "ring", "fpdt"])
def test_the_longest_context_fits_and_two_percent_more_does_not(tmp_path: Path, method: str) -> None:
    job, budget = shape(tmp_path, method), Budget(device=2**28, host=2**28)
    plan = longest(job, budget)
    assert plan is not None
    assert budget.holds(plan.prediction)
    assert plan.prediction == predict_shape(plan.job)
    more = replace(job, length=int(plan.job.length * 1.02) + 2 * 1024 * 8)
    assert fastest(more, budget) is None


def test_upipe_and_fpdt_go_further_than_ulysses(tmp_path: Path) -> None:
    budget = Budget(device=2**28, host=2**40)
    lengths = {}
    for method in ("upipe", "fpdt", "ulysses"):
        plan = longest(shape(tmp_path, method), budget)
        assert plan is not None
        lengths[method] = plan.job.length
    assert min(lengths["upipe"], lengths["fpdt"]) > lengths["ulysses"]


def test_less_memory_asks_for_later_candidates(tmp_path: Path) -> None:
    job = replace(shape(tmp_path), length=2**18)
    order = list(candidates(job))
    least = min(predict_shape(candidate).device_bytes for candidate in order)
    rich, poor = (fastest(job, Budget(device, 2**40)) for device in (2**40, least))
    assert fastest(job, Budget(least - 1, 2**40)) is None
    assert rich is not None
    assert rich.job == order[0]
    assert poor is not None
    assert order.index(poor.job) > 0


def test_the_written_job_is_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.toml"
    args = job_args(tmp_path, 4, training__seq_len=65536)
    assert main([*args, "--device-memory", "192MiB", "--reserve", "0", "--write", str(out)]) == 0
    written = tomllib.loads(out.read_text())
    budget = Budget(192 * 2**20, 2**41 / 4)
    wanted = fastest(replace(shape(tmp_path), length=65536), budget)
    assert wanted is not None
    for name in ("head_chunk", "query_tiles", "stash", "tile_size"):
        assert written["context_parallel"][name] == getattr(wanted.job, name)
    assert written["activation_checkpoint"] == {"mode": "full", "offload": wanted.job.offload}
    assert "longest" in capsys.readouterr().out


def test_refusals_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = job_args(tmp_path, 4, training__seq_len=2**22)
    assert main([*args, "--device-memory", "5GiB", "--reserve", "6GiB"]) == 1
    assert "--reserve 6GiB leaves nothing" in capsys.readouterr().err
    assert main([*args, "--device-memory", "12MiB", "--reserve", "0", "--write", str(tmp_path / "x")]) == 1
    assert "no settings train local_batch_size = 1 of 4194304 tokens" in capsys.readouterr().err
    roomy = [*job_args(tmp_path, 4), "--device-memory", "80GiB"]
    assert main([*roomy, "--write", str(tmp_path / "no/x")]) == 1
    assert "No such file or directory; choose another file" in capsys.readouterr().err
    assert main([*roomy, "--ranks-per-host", "0"]) == 1
    assert "--ranks-per-host 0 must be at least 1" in capsys.readouterr().err
    assert memory_main([*job_args(tmp_path, 4), "--rank", "4"]) == 1
    assert "--rank 4 must be between 0 and 3" in capsys.readouterr().err
    assert parse_bytes("80GiB") == 80 * 2**30
    assert parse_bytes("2 tb") == 2e12
    for text in ("lots", "."):
        with pytest.raises(ValueError, match="is no amount of memory"):
            parse_bytes(text)


def test_a_smaller_batch_is_the_remedy_where_it_fits(tmp_path: Path) -> None:
    job = replace(shape(tmp_path), length=65536)
    smallest = fastest(replace(job, batch=1), Budget(2**40, 2**40))
    assert smallest is not None
    job = replace(job, batch=8)
    least = min(planner.predict_shape(c).device_bytes for c in planner.candidates(replace(job, batch=2)))
    assert "set training.local_batch_size = 2 (" in explain_nothing_fits(job, Budget(least, 2**40))
    assert "shorten training.seq_len or use more ranks" in explain_nothing_fits(job, Budget(2**20, 2**40))


def test_a_state_on_the_host_is_the_remedy_where_it_fits(tmp_path: Path) -> None:
    """On one rank, unless the host is too small; plain data parallel has nothing that could move."""
    args = job_args(tmp_path, 1, training__seq_len=4096)
    job = job_shape(read_job(args, 1), 1)
    moved = job_shape(read_job([*args, "--training.enable_cpu_offload"], 1), 1)
    assert moved == replace(job, state_on_host=True)
    least = min((predict_shape(c) for c in candidates(moved)), key=lambda prediction: prediction.device_bytes)
    budget = Budget(least.device_bytes, least.host_bytes)
    assert fastest(job, budget) is None
    assert "; set training.enable_cpu_offload = true." in explain_nothing_fits(job, budget)
    assert "shorten training.seq_len" in explain_nothing_fits(job, replace(budget, host=2**20))
    assert "shorten training.seq_len" in explain_nothing_fits(replace(job, replicas=2), budget)
    assert fastest(moved, replace(budget, host=2**20)) is None
    stateful = replace(job, checkpoint=True, tile_size=8192, length=64, head_chunk=1)
    assert planner.advice(predict_shape(stateful), stateful) == "set training.enable_cpu_offload = true"


def test_head_chunk_0_takes_the_largest_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = job_args(tmp_path, 4, training__seq_len=65536, context_parallel__tile_size=512, model__flavor="debug")
    config = read_job(args, 4)
    assert config.context_parallel.head_chunk == 0  # the trainer fills it
    fill_head_chunk(config, 4, "simulated")
    assert config.context_parallel.head_chunk == 0
    fill_head_chunk(config, 4, "cpu")
    assert config.context_parallel.head_chunk == 16  # all heads
    config.context_parallel.head_chunk = 8
    needed = predict(config, 4).device_bytes
    config.context_parallel.head_chunk = 0
    monkeypatch.setattr(planner, "memory_of_rank", lambda device_type: needed // 10)
    with pytest.raises(ValueError, match=r"the smallest, 4, needs .* GiB that a rank has; set activation_checkpoint"):
        fill_head_chunk(config, 4, "cpu")
    monkeypatch.setattr(planner, "memory_of_rank", lambda device_type: needed)
    fill_head_chunk(config, 4, "cpu")
    assert config.context_parallel.head_chunk == 8


@pytest.mark.parametrize("path", sorted((ROOT / "train_configs").glob("*.toml")), ids=lambda p: p.stem)
def test_what_is_planned_for_a_shipped_job_can_be_read(path: Path, tmp_path: Path) -> None:
    """On a device that holds anything; the settings differ from the file's own."""
    args = ["--job.config_file", str(path), "--model.hf_assets_path", str(ROOT / "torchtitan_upipe/assets/tokenizer")]
    config = read_job(args, 0, SIMULATED)
    plan = fastest(job_shape(config), Budget(2**40, 2**40))
    assert plan is not None
    out = tmp_path / path.name
    out.write_text(planned(args, plan))
    written = read_job(["--job.config_file", str(out), *args[2:]], 0, SIMULATED)
    assert job_shape(written) == plan.job


def test_out_of_memory_names_category_and_knob(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error_file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error_file))

    def run_out(config: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(train, "run_job", run_out)
    assert train.main(job_args(tmp_path, 1, training__seq_len=4096)) == 1
    message = capsys.readouterr().err
    assert "OutOfMemoryError: CUDA out of memory; the ledger predicts a peak of" in message
    assert "most of it loss" in message
    assert "set context_parallel.tile_size = 32768" in message
    assert "the ledger predicts" in error_file.read_text()
