"""The model of time: what it counts, what it says of published steps, what each setting costs."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import times
from benchmarks.times import Cell, deviation, fit_of, missing_of, published_cells
from tests.jobs import ROOT, job_args, read_log
from tests.ranks import run_ranks
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.job.shape import JobShape, job_shape
from torchtitan_upipe.kernels.rates import read_rates
from torchtitan_upipe.memory.__main__ import main as memory_main
from torchtitan_upipe.memory.axes import candidates
from torchtitan_upipe.memory.ledger import predict_shape
from torchtitan_upipe.memory.rates import FITTED, known_devices, measured_rates, rates_of
from torchtitan_upipe.memory.startup import Place
from torchtitan_upipe.memory.step_time import ATTENTION, EXCHANGE, HOST, Machine, predict_time, step_work

H100 = Machine(rates_of("h100-80gb"), kernel="flash3")
PAGE = ROOT / "docs/time.md"


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    return published_cells()


def worst(cells: list[Cell], method: str, **options: Any) -> float:
    return max(abs(deviation(cell, FITTED, **options)) for cell in cells if cell.figure.method == method)


# --- published steps --------------------------------------------------------------------------------------------------


def test_three_constants_are_fitted_on_one_column(cells: list[Cell]) -> None:
    seen = [cell for cell in cells if cell.fitted]
    assert len(seen) == 6
    found = fit_of(seen)
    assert found.attention == pytest.approx(FITTED.attention, abs=5e-4)
    assert found.products == pytest.approx(FITTED.products, abs=5e-4)
    assert found.step_seconds == pytest.approx(FITTED.step_seconds, abs=5e-4)


@pytest.mark.parametrize(
    ("method", "within", "count"), [("ulysses", 0.04, 11), ("upipe", 0.10, 15), ("ring", 0.07, 11)]
)
def test_they_give_the_other_columns(method: str, within: float, count: int, cells: list[Cell]) -> None:
    assert sum(cell.figure.method == method for cell in cells) == count
    assert worst(cells, method) < within


def test_what_they_do_not_give(cells: list[Cell]) -> None:
    """FPDT's short steps and a ring that hides its transfers: the page says so. One more constant gives all of FPDT."""
    fpdt = [cell for cell in cells if cell.figure.method == "fpdt"]
    long = [cell for cell in fpdt if cell.figure.seq_len >= 2**20]
    assert 0.4 < worst(fpdt, "fpdt") < 0.5
    assert worst(long, "fpdt") < 0.2
    missing = missing_of([cell for cell in fpdt if cell.figure.model == "Llama3-8B"], FITTED)
    assert worst(fpdt, "fpdt", missing=missing) < 0.05
    assert worst(cells, "ring", ring_waits=False) > 0.2


def test_the_page_shows_these_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "time.md"
    copy.write_text(PAGE.read_text())
    assert times.main([str(copy)]) == 0
    assert copy.read_text() == PAGE.read_text()
    copy.write_text("no marks")
    assert times.main([str(copy)]) == 1
    assert "has not the marks" in capsys.readouterr().err


# --- what is counted --------------------------------------------------------------------------------------------------


def llama(**options: Any) -> JobShape:
    """The shipped job of 1M tokens, Llama3-8B on 8 ranks."""
    args = ["--job.config_file", str(ROOT / "train_configs/llama3_8b_1m.toml")]
    job = job_shape(read_job(args, 0, "simulated"))
    return replace(job, **{"stash": "device", "stash_budget": 0.0, "head_chunk": 8, "query_tiles": 1} | options)


def attention_passes(job: JobShape) -> tuple[float, float]:
    """Attention FLOPs over those of one forward pass, forward and backward."""
    work, model = step_work(job), job.model
    once = 2 * job.length**2 * model.heads * model.head_dim * model.layers * job.batch / (job.ulysses * job.ring)
    forward = work.forward.attention + work.backward.attention
    return forward / once, (work.forward.attention_backward + work.backward.attention_backward) / once


@pytest.mark.parametrize(
    ("options", "forward"),
    [
        ({}, 1),
        ({"stash": "host"}, 1),
        ({"stash": "none"}, 2),
        ({"checkpoint": False}, 1),
        ({"checkpoint": False, "stash": "none"}, 2),
        ({"method": "ulysses"}, 2),
        ({"method": "ulysses", "checkpoint": False}, 1),
        ({"method": "ring", "ulysses": 1, "ring": 8}, 2),
        ({"method": "fpdt", "sequence_chunk": 65536}, 1),
        ({"query_tiles": 4}, 1),
        ({"head_chunk": 2}, 1),
        ({"head_chunk": 32}, 1),
        ({"ulysses": 4, "ring": 2}, 1),
    ],
)
def test_attention_is_counted_as_often_as_it_runs(options: dict[str, Any], forward: float) -> None:
    assert attention_passes(llama(**options)) == pytest.approx((forward, 2.5))


def test_a_stash_on_the_host_counts_layer_by_layer() -> None:
    job = llama(stash="host")
    half = replace(job, stash_budget=16.5 * job.stash_bytes)
    assert attention_passes(half)[0] == pytest.approx(1.5)
    slower, faster = predict_time(half, H100), predict_time(job, H100)
    assert slower.parts[ATTENTION] > faster.parts[ATTENTION]
    assert 0 < slower.parts[HOST] < faster.parts[HOST]


@pytest.mark.parametrize(
    ("slower", "faster"),
    [
        ({"stash": "none"}, {"stash": "host"}),
        ({"stash": "host"}, {"stash": "device"}),
        ({"head_chunk": 8}, {"head_chunk": 32}),
        ({"head_chunk": 2}, {"head_chunk": 8}),
        ({"query_tiles": 4}, {"query_tiles": 1}),
        ({"tile_size": 8192}, {"tile_size": 32768}),
        ({"checkpoint": True}, {"checkpoint": False, "offload": False}),
        ({"method": "fpdt", "sequence_chunk": 16384}, {"method": "fpdt", "sequence_chunk": 65536}),
    ],
)
def test_each_setting_has_its_price(slower: dict[str, Any], faster: dict[str, Any]) -> None:
    assert predict_time(llama(**slower), H100).seconds > predict_time(llama(**faster), H100).seconds


def test_exchanges_between_hosts_take_the_network() -> None:
    inside, across = (predict_time(llama(), replace(H100, ranks_per_host=ranks)) for ranks in (8, 4))
    assert across.parts[EXCHANGE] > 2 * inside.parts[EXCHANGE]
    assert across.parts[ATTENTION] == inside.parts[ATTENTION]


# --- rates ------------------------------------------------------------------------------------------------------------


def test_every_device_has_its_rates_and_sources() -> None:
    table = json.loads((ROOT / "torchtitan_upipe/assets/devices.json").read_text())
    assert known_devices() == tuple(table)
    for name, entry in table.items():
        numbers = set(entry) - {"names", "sources"}
        assert {word.strip() for key in entry["sources"] for word in key.split(",")} == numbers
        assert rates_of(name).name == name
    assert rates_of("NVIDIA H100 80GB HBM3").name == "h100-80gb"
    assert rates_of("NVIDIA A100-SXM4-40GB").name == "a100-40gb"
    stand_in = rates_of("CPU (x86_64)")
    assert (stand_in.known, stand_in.stand_in) == (False, "h100-80gb")
    assert H100.rates.attention_rates("sdpa") == H100.rates.attention_rates("flash2")
    assert H100.rates.attention_rates("auto") == H100.rates.attention_rates("flash3")


def test_published_kernel_rates_stand_in_both_tables_alike() -> None:
    for entry in read_rates():
        if entry.source.startswith("published"):
            ours = rates_of(entry.device).attention
            assert {k: (1e12 * r.forward, 1e12 * r.backward) for k, r in entry.rates.items()} == dict(ours)


def test_measured_rates_count_as_they_are(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [
        {
            "key": "attention flash3 1",
            "kernel": "flash3",
            "tokens": 65536,
            "forward_tflops": 500,
            "backward_tflops": 400,
        },
        {"key": "attention flash3 0", "kernel": "flash3", "tokens": 16384, "forward_tflops": 1, "backward_tflops": 1},
        {"key": "attention flash2 0", "kernel": "flash2", "tokens": 16384, "status": "failed"},
        {"key": "product 8x8x8", "tflops": 700},
        {"key": "copy device to host", "bytes_per_second": 40e9},
        {"key": "copy host to device", "bytes_per_second": 50e9},
        {"key": "copy both ways at once, summed", "bytes_per_second": 80e9},
        {"key": "copy within the device, read and written", "bytes_per_second": 2.5e12},
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps({"status": "ok"} | line) + "\n" for line in lines))
    rates = measured_rates(path, H100.rates)
    assert rates.attention == {"flash3": (500e12, 400e12)}
    assert (rates.products, rates.host, rates.device_memory) == (700e12, 40e9, 2.5e12)
    assert (rates.fit.attention, rates.fit.products) == (1.0, 1.0)
    assert rates.fit.step_seconds == FITTED.step_seconds
    assert rates.link == H100.rates.link
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="holds no rates"):
        measured_rates(path, H100.rates)


# --- a job that leaves its settings to the planner --------------------------------------------------------------------


def run_and_note(args: list[str], memory: int) -> tuple[int, list[str], dict[str, Any]]:
    """Train on ranks with ``memory`` bytes each; what was logged of the choice, and what came into the job."""
    from torchtitan_upipe import train
    from torchtitan_upipe.memory import startup

    lines: list[str] = []
    found: dict[str, Any] = {}
    startup.memory_of_rank = lambda device_type: memory
    run_job = train.run_job

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    def noting(config: Any) -> None:
        logging.getLogger().addHandler(Notes())
        run_job(config)
        found.update(vars(config.context_parallel), mode=config.activation_checkpoint.mode)

    train.run_job = noting
    return train.main(args), [line for line in lines if "Settings chosen" in line], found


def test_the_ledger_alone_does_not_guess_what_auto_chooses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = job_args(tmp_path, 2, activation_checkpoint__mode="selective", context_parallel__settings="auto")
    assert memory_main(args) == 1
    assert 'settings = "auto" is settled on the device' in capsys.readouterr().err


def test_a_job_with_settings_auto_trains_with_the_planners_choice(tmp_path: Path) -> None:
    free = {"activation_checkpoint__mode": "selective", "context_parallel__settings": "auto", "training__seq_len": 4096}
    args = job_args(tmp_path, 2, **free, training__steps=3)
    job = job_shape(read_job(args, 2), 2)
    needed = (predict_shape(candidate) for candidate in candidates(job))
    memory = int(1.05 * min(prediction.device_bytes + prediction.host_bytes for prediction in needed))
    results = run_ranks(run_and_note, 2, args, memory, init=False, timeout=240)
    assert results[0] == results[1]
    code, (line,), found = results[0]
    assert code == 0
    log = read_log(tmp_path)
    assert log.loss[-1] < log.loss[0]

    plan = Place("CPU (x86_64)", memory, 0.0, 2, shared=True).planner("auto").fastest(job)
    assert plan is not None
    assert plan.job.checkpoint  # there is no memory for faster settings
    for name in ("head_chunk", "query_tiles", "stash", "tile_size"):
        assert found[name] == getattr(plan.job, name)
        assert f"{name} = {found[name]}" in line
    assert (found["mode"], found["settings"]) == ("full", "manual")
