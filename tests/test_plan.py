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
from torchtitan_upipe.job.shape import JobShape, job_shape, needed_ranks
from torchtitan_upipe.memory.__main__ import main as memory_main
from torchtitan_upipe.memory.axes import AT_START, candidates, settings_of, sparing
from torchtitan_upipe.memory.ledger import predict, predict_shape
from torchtitan_upipe.memory.planner import Budget, Planner, least_bytes, least_host_bytes
from torchtitan_upipe.memory.prediction import GIB
from torchtitan_upipe.memory.rates import rates_of
from torchtitan_upipe.memory.remedies import advice, explain_nothing_fits, faster_batch
from torchtitan_upipe.memory.startup import Place, fill_settings, leaves_settings, smallest
from torchtitan_upipe.memory.step_time import Machine, predict_time
from torchtitan_upipe.plan import main, parse_bytes, planned


def shape(folder: Path, method: str = "upipe", **options: object) -> JobShape:
    args = job_args(folder, 4, context_parallel__method=method, training__seq_len=4096, **options)
    return job_shape(read_job(args, 4), 4)


H100 = Machine(rates_of("h100-80gb"))
TOKENIZER = ("--model.hf_assets_path", str(ROOT / "torchtitan_upipe/assets/tokenizer"))


def planner(device: float, host: float = 2**40) -> Planner:
    return Planner(Budget(device, host), H100)


def shipped(name: str) -> JobShape:
    return job_shape(read_job(["--job.config_file", str(ROOT / "train_configs" / name), *TOKENIZER], 0, SIMULATED))


@pytest.mark.parametrize("method", ["upipe", "ulysses", "ring", "fpdt"])
def test_the_longest_context_fits_and_two_percent_more_does_not(tmp_path: Path, method: str) -> None:
    job, search = shape(tmp_path, method), planner(device=2**28, host=2**28)
    plan = search.longest(job)
    assert plan is not None
    assert search.budget.holds(plan.prediction)
    assert plan.prediction == predict_shape(plan.job)
    more = replace(job, length=int(plan.job.length * 1.02) + 2 * 1024 * 8)
    assert search.fastest(more) is None


def test_upipe_and_fpdt_go_further_than_ulysses(tmp_path: Path) -> None:
    lengths = {}
    for method in ("upipe", "fpdt", "ulysses"):
        plan = planner(2**28).longest(shape(tmp_path, method))
        assert plan is not None
        lengths[method] = plan.job.length
    assert min(lengths["upipe"], lengths["fpdt"]) > lengths["ulysses"]


def test_less_memory_asks_for_slower_settings(tmp_path: Path) -> None:
    job = replace(shape(tmp_path), length=2**18)
    everything, ask = list(candidates(job)), planner(1)
    needed = {candidate: ask.predict(candidate).device_bytes for candidate in everything}
    least = min(needed.values())
    rich, poor = (planner(device).fastest(job) for device in (2**40, least))
    assert planner(least - 1).fastest(job) is None
    assert rich is not None
    assert poor is not None
    assert rich.time.seconds == min(predict_time(candidate, H100).seconds for candidate in everything)
    assert poor.time.seconds > rich.time.seconds
    halfway = (least + needed[rich.job]) // 2
    found = planner(halfway).fastest(job)
    fits = [candidate for candidate, size in needed.items() if size <= halfway]
    assert found is not None
    assert found.time.seconds == min(predict_time(candidate, H100).seconds for candidate in fits)


@pytest.mark.parametrize("method", ["upipe", "ulysses", "ring", "fpdt"])
def test_what_the_searches_take_for_granted(tmp_path: Path, method: str) -> None:
    """The bound is one, and no setting needs less than those called sparing."""
    job = replace(shape(tmp_path, method), length=2**17)
    ask = planner(1)
    predicted = {candidate: ask.predict(candidate) for candidate in candidates(job)}
    needed = {candidate: prediction.device_bytes for candidate, prediction in predicted.items()}
    assert all(least_bytes(candidate) <= size for candidate, size in needed.items())
    assert all(least_host_bytes(candidate) <= found.host_bytes for candidate, found in predicted.items())
    assert min(needed[candidate] for candidate in sparing(job)) == min(needed.values())
    short = replace(job, length=2**13)
    assert [replace(candidate, length=job.length) for candidate in sparing(short)] == list(sparing(job))


@pytest.mark.parametrize("method", ["upipe", "ulysses", "ring", "fpdt"])
def test_a_search_asks_the_ledger_a_few_times(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most settings are given up after one question: whether they go 1% further than those before."""
    job, search, asked = shape(tmp_path, method), planner(device=2**28, host=2**28), []
    monkeypatch.setattr(Planner, "fastest", lambda self, job: self.plan(job))
    monkeypatch.setattr(Planner, "predict", lambda self, job: asked.append(job) or predict_shape(job))
    assert search.longest(job) is not None
    assert len(asked) <= len(list(sparing(job))) + 20


def test_the_long_job_keeps_its_stash() -> None:
    """256 GiB of a host for each rank hold stashes of some layers, which spare a forward pass of attention each."""
    job, search = shipped("llama3_8b_5m.toml"), planner(76 * GIB, 256 * GIB)
    own, found = search.plan(job), search.fastest(job)
    assert found is not None
    assert search.budget.holds(own.prediction)
    assert found.job.stash == "host"
    stashes = [sum(j.stash_of(layer) == "host" for layer in range(32)) for j in (job, found.job)]
    assert 0 < stashes[0] < stashes[1] < 32
    assert found.time.seconds < own.time.seconds
    ulysses = search.fastest(replace(job, method="ulysses", head_chunk=32))
    assert ulysses is not None
    assert ulysses.job.hidden_on_host  # else it does not fit
    more = search.plan(replace(found.job, stash_budget=found.job.stash_budget + found.job.stash_bytes))
    assert not search.budget.holds(more.prediction)


def test_the_written_job_is_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.toml"
    args = job_args(tmp_path, 4, training__seq_len=65536)
    assert main([*args, "--device-memory", "192MiB", "--reserve", "0", "--write", str(out)]) == 0
    written = tomllib.loads(out.read_text())
    wanted = planner(192 * 2**20, 2**41 / 4).fastest(replace(shape(tmp_path), length=65536))
    assert wanted is not None
    assert job_shape(read_job(["--job.config_file", str(out)], 4), 4) == wanted.job
    for name in ("head_chunk", "query_tiles", "stash", "tile_size"):
        assert written["context_parallel"][name] == getattr(wanted.job, name)
    mode = "full" if wanted.job.checkpoint else "none"
    assert written["activation_checkpoint"] == {"mode": mode, "offload": wanted.job.offload}
    said = capsys.readouterr().out
    assert "longest" in said
    assert f"{wanted.tokens_per_second:,.1f}" in said
    assert f"{wanted.time.limit} " in said


def test_refusals_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = job_args(tmp_path, 4, training__seq_len=2**22)
    assert main([*args, "--device-memory", "5GiB", "--reserve", "6GiB"]) == 1
    assert "--reserve 6GiB leaves nothing" in capsys.readouterr().err
    assert main(args) == 1
    assert "name the device with --device (h100-80gb, " in capsys.readouterr().err
    assert main([*args, "--device", "h1000"]) == 1
    assert "--device h1000 is not in the table; choose one of h100-80gb" in capsys.readouterr().err
    assert main([*args, "--device", "h200", "--rates", str(tmp_path / "no.jsonl")]) == 1
    assert "no.jsonl cannot be read" in capsys.readouterr().err
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
    job = replace(job, batch=8)
    least = min(predicted.device_bytes for predicted in map(planner(1).predict, sparing(replace(job, batch=2))))
    assert "set training.local_batch_size = 2 (" in explain_nothing_fits(job, planner(least))
    assert "shorten training.seq_len or use more ranks" in explain_nothing_fits(job, planner(2**20))


def test_a_state_on_the_host_is_planned_or_named_where_it_fits(tmp_path: Path) -> None:
    """On one rank, unless the host is too small; plain data parallel has nothing that could move."""
    args = job_args(tmp_path, 1, training__seq_len=4096)
    job = job_shape(read_job(args, 1), 1)
    moved = job_shape(read_job([*args, "--training.enable_cpu_offload"], 1), 1)
    assert moved == replace(job, state_on_host=True)
    least = min(map(planner(1).predict, candidates(moved)), key=lambda prediction: prediction.device_bytes)
    plan = planner(least.device_bytes, least.host_bytes).fastest(job)
    assert plan is not None
    assert plan.job.state_on_host
    assert settings_of(plan.job)["training"] == {"enable_cpu_offload": True}
    roomy = planner(2**40).fastest(moved)
    assert roomy is not None
    assert not roomy.job.state_on_host

    def at_start(host: float) -> Planner:
        return Planner(Budget(least.device_bytes, host), H100, AT_START)

    assert at_start(least.host_bytes).fastest(job) is None
    assert "; set training.enable_cpu_offload = true." in explain_nothing_fits(job, at_start(least.host_bytes))
    assert "shorten training.seq_len" in explain_nothing_fits(job, at_start(2**20))
    assert "shorten training.seq_len" in explain_nothing_fits(replace(job, replicas=2), at_start(least.host_bytes))
    assert at_start(least.host_bytes).fastest(moved) is not None
    stateful = replace(job, checkpoint=True, tile_size=8192, length=64, head_chunk=1)
    assert advice(predict_shape(stateful), stateful) == "set training.enable_cpu_offload = true"


def test_a_smaller_batch_is_named_where_it_is_faster() -> None:
    """Two sequences of 2M tokens leave no host memory for stashes of all layers; one does."""
    job = replace(shipped("llama3_8b_2m.toml"), batch=2)
    search = planner(76 * GIB, 200 * GIB)
    plan = search.fastest(job)
    assert plan is not None
    assert "training.local_batch_size = 1 leaves memory for faster settings" in str(faster_batch(plan, search))
    rich = planner(76 * GIB, 2**50)
    roomy = rich.fastest(job)
    assert roomy is not None
    assert faster_batch(roomy, rich) is None


def place(device: float) -> Place:
    return Place("CPU (x86_64)", device, device, ranks_per_host=4, shared=True)


def test_head_chunk_0_takes_the_fastest_that_fits(tmp_path: Path) -> None:
    args = job_args(tmp_path, 4, training__seq_len=65536, context_parallel__tile_size=512, model__flavor="debug")
    config = read_job(args, 4)
    cp = config.context_parallel
    assert cp.head_chunk == 0  # the trainer fills it
    assert leaves_settings(config, "cpu")
    assert not leaves_settings(config, SIMULATED)
    line = fill_settings(config, 4, place(2**40))
    assert cp.head_chunk == 16  # all heads
    assert "Settings chosen for CPU (x86_64) (whose rates are unknown: those of h100-80gb" in line
    assert "head_chunk = 16; predicted" in line
    assert not leaves_settings(config, "cpu")
    cp.head_chunk = 8
    needed = predict(config, 4)
    cp.head_chunk = 0
    with pytest.raises(ValueError, match=r"the smallest, 1, needs .* GiB that a rank has; set activation_checkpoint"):
        fill_settings(config, 4, place(needed.device_bytes // 10))
    fill_settings(config, 4, place(needed.device_bytes + needed.host_bytes))
    assert cp.head_chunk == 8


def test_auto_sets_everything(tmp_path: Path) -> None:
    free = {"activation_checkpoint__mode": "selective", "context_parallel__settings": "auto"}
    config = read_job(job_args(tmp_path, 4, training__seq_len=65536, **free), 4)
    job = job_shape(config, 4)
    line = fill_settings(config, 4, place(2**28))
    plan = place(2**28).planner("auto").fastest(job)
    assert plan is not None
    assert job_shape(config, 4) == plan.job != job
    for name in ("head_chunk", "query_tiles", "stash", "tile_size", "mode", "offload"):
        assert f"{name} = " in line
    assert smallest([place(2.0), place(1.0)]) == place(1.0)
    config = read_job(job_args(tmp_path, 4, training__seq_len=65536, **free), 4)
    with pytest.raises(ValueError, match="no settings train local_batch_size = 1 of 65536 tokens"):
        fill_settings(config, 4, place(2**20))


SHIPPED = ("llama3_debug", "llama3_8b_5m", "llama3_8b_5m_40gb", "llama3_8b_1gpu_1m", "qwen3_32b_4m")  # of each kind


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_planned_for_a_shipped_job_can_be_read(name: str, tmp_path: Path) -> None:
    """On a device that holds anything, and on one that has just enough, where a stash may have a budget or be gone."""
    path = ROOT / f"train_configs/{name}.toml"
    args = ["--job.config_file", str(path), *TOKENIZER]
    config = read_job(args, 0, SIMULATED)
    ranks, job = needed_ranks(config), job_shape(config)
    needed = min((predict_shape(c) for c in sparing(job)), key=lambda p: p.device_bytes)
    for search in (planner(2**50), planner(needed.device_bytes, needed.host_bytes)):
        plan = search.fastest(job)
        assert plan is not None
        out = tmp_path / path.name
        out.write_text(planned(args, config, plan, ranks))
        assert job_shape(read_job(["--job.config_file", str(out)], 0, SIMULATED)) == plan.job


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
