"""The comparison commands: plan, sweep, resume, tables, plots, report."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import ab, arms, measured, processes, report, results
from benchmarks.arms import Arm, Run
from benchmarks.prediction import Prediction
from benchmarks.publish import publish
from tests.jobs import ROOT, job_args
from torchtitan_upipe.titan.specs import SPECS

MIB = 2**20
LABELS = ("measured", "predicted", "published", "no prediction", "failed", "killed")


# ---- the sweep, with jobs that a stand-in "runs"


def record_of(run: Run, **changes: Any) -> results.Record:
    """The line of a run that went well, with figures that tell runs apart."""
    scale = run.arm.seq_len / 1024
    about = {
        "ranks": 2,
        "config": {"model": {"name": "llama3_upipe", "flavor": "8B"}},
        "hardware": {"device": "CPU", "processor": "some", "cores": 2},
        "versions": {"torch": "2"},
        "commit": "abc",
    }
    figures = {
        "warmup_steps": 1,
        "step_seconds": [0.5, 0.25],
        "tokens_per_second_per_rank": 1000.0 / scale + run.round,
        "peak_device_bytes": round(100 * MIB * scale),
        "peak_host_bytes": 300 * MIB,
        "held_bytes": {"parameters": 10 * MIB, "optimizer": 20 * MIB},
        "loss": [8.0, 7.0, 6.0],
    }
    return {"run": run.key, "job": "j", "arm": asdict(run.arm), "status": "ok", **about, **figures, **changes}


def sweep_arguments(out: Path, *more: str) -> list[str]:
    job = job_args(out, 2, parallelism__data_parallel_shard_degree=1, training__steps=1, training__seq_len=256)
    kept = zip(job[::2], job[1::2], strict=True)
    words = [word for pair in kept if pair[0].removeprefix("--") not in arms.SET_BY_SWEEP for word in pair]
    return [*more, "--out", str(out), *words]


def test_a_sweep_goes_on_after_failures_and_repeats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executed: list[str] = []

    def stand_in(sweep: ab.Sweep, run: Run, predict: ab.Predict) -> results.Record:
        executed.append(run.key)
        if len(executed) == 3:
            raise KeyboardInterrupt
        failed = {"status": "OOM", "reason": "too little"} if run.arm.method == "ring" else {}
        return {**record_of(run, job=sweep.fingerprint), **failed, "wall_seconds": 1.0}

    monkeypatch.setattr(ab, "execute", stand_in)
    arguments = sweep_arguments(tmp_path, "--methods", "upipe,ring,ulysses", "--seq_lens", "256", "--rounds", "2")
    sweep = ab.parse(arguments)
    with pytest.raises(KeyboardInterrupt):
        ab.run_sweep(sweep)
    keys = [run.key for run in sweep.runs]
    assert [record["run"] for record in results.ResultsFile(tmp_path).load()] == keys[:2]
    records = ab.run_sweep(sweep)
    assert executed == keys[:3] + keys[2:]  # the one that was broken off, then the rest
    assert [record["run"] for record in records] == keys
    assert [record["status"] for record in records] == ["ok", "OOM", "ok"] * 2

    with pytest.raises(ValueError, match="holds results of another job file, overrides or steps"):
        ab.run_sweep(ab.parse([*arguments, "--steps", "7"]))
    with results.ResultsFile(tmp_path).writing(), pytest.raises(ValueError, match="another sweep is writing"):
        ab.run_sweep(sweep)


def test_a_torn_line_is_no_result(tmp_path: Path) -> None:
    file = results.ResultsFile(tmp_path)
    file.append({"run": "a"})
    with file.path.open("a") as tail:
        tail.write('{"run": "b')
    assert file.load() == [{"run": "a"}]
    with file.writing():
        file.append({"run": "c"})
    assert file.load() == [{"run": "a"}, {"run": "c"}]
    file.path.write_text("no json\n")
    with pytest.raises(ValueError, match="line 1 is not a result"):
        file.load()


def test_how_a_job_ended(tmp_path: Path) -> None:
    def run(code: str, timeout: float = 60) -> results.Record | None:
        return processes.run_logged([sys.executable, "-c", code], tmp_path / "log", timeout)

    assert run("pass") is None
    assert run("raise SystemExit(1)") is None  # its ranks have told why
    killed = run("print('traceback : Signal 9 (SIGKILL) received by PID 7'); raise SystemExit(1)")
    assert killed is not None
    assert killed["status"] == "killed"
    late = run("import time; time.sleep(60)", timeout=0.2)
    assert late == {"status": "failed", "reason": "stopped after 0 s"}

    assert measured.failure(torch.OutOfMemoryError("CUDA out of memory.\nTried")) == {
        "status": "OOM",
        "reason": "OutOfMemoryError: CUDA out of memory.",
    }
    assert measured.failure(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))["status"] == "OOM"
    assert measured.failure(ValueError("so.")) == {"status": "failed", "reason": "so."}


# ---- a real sweep, killed in the middle


def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    options = ("--methods", "upipe,ring", "--seq_lens", "256", "--rounds", "1", "--warmup", "1", "--steps", "2")
    arguments = sweep_arguments(tmp_path, *options)
    sweep, file = ab.parse(arguments), results.ResultsFile(tmp_path)
    second = tmp_path / "runs" / sweep.runs[1].key / "log-node0.txt"
    command = [sys.executable, "-m", "benchmarks.ab", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: second.exists() or process.poll() is not None, 200)
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        wait_for(lambda: bool(processes_with(str(tmp_path / "runs"))), 60)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    first = file.load()
    assert [record["run"] for record in first] == [sweep.runs[0].key]
    wait_for(lambda: not processes_with(str(tmp_path / "runs")), 60)  # the job under way has ended with the sweep

    records = ab.run_sweep(sweep)
    assert file.load() == records
    assert records[0] == first[0]
    upipe, ring = records
    assert [upipe["status"], ring["status"]] == ["ok", "ok"], records
    assert upipe["loss"] == pytest.approx(ring["loss"], rel=1e-5)
    assert len(upipe["loss"]) == 4  # warm-up, timed steps, the step watched for memory
    assert len(upipe["step_seconds"]) == 2
    model = SPECS["llama3_upipe"]().model_args["debug_kv2"]
    head = 128 * (model.dim // model.n_heads) * 4  # N = 128, float32
    layer = (2 * model.n_heads + 2 * model.n_kv_heads) * head // 2  # q, k, v, o: half of each to the other rank
    assert set(upipe["sent_per_step"]) == {"all_to_all"}
    assert upipe["sent_per_step"]["all_to_all"]["bytes"] == model.n_layers * 3 * layer  # forward, again, gradients
    hops = 4  # k and v in forward and again in backward, their gradients twice
    assert ring["sent_per_step"]["ring"] == {
        "calls": model.n_layers * hops,
        "bytes": model.n_layers * hops * 2 * model.n_kv_heads * head,
    }
    assert upipe["config"]["context_parallel"]["method"] == "upipe"
    assert {"torch", "torchtitan"} <= set(upipe["versions"])
    assert upipe["ranks"] == 2
    assert upipe["peak_host_bytes"] > upipe["peak_device_bytes"] > sum(upipe["held_bytes"].values()) > 0

    page = publish(records, tmp_path)
    assert (tmp_path / "table.md").read_text() == page
    assert re.search(r"MiB measured \(1.00x\), [0-9.]+ MiB predicted", page)


def wait_for(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def processes_with(word: str) -> list[int]:
    """Processes other than this one with ``word`` in an argument."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if any(w.startswith(word) for w in words) and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


# ---- tables, plots, scalars


def cells(page: str) -> list[str]:
    """All cells of the tables of a page but first rows and columns, line by line within a cell."""
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
    body = [row[1:] for row in rows if row[0] != "---" and row[0] != "method"]
    return [line for row in body for cell in row for line in cell.split("<br>")]


def example(predicted: bool = False, methods: tuple[str, ...] = ("upipe", "ulysses", "ring")) -> list[results.Record]:
    runs = arms.plan(methods, [1024, 4096], 2, default_chunk=8)
    records = [record_of(run) for run in runs]
    for record in records:
        if record["arm"]["method"] == "ring" and record["arm"]["seq_len"] == 4096:
            record |= {"status": "OOM", "reason": "no memory left"}
        if predicted:
            record["predicted"] = {"by_category": {"parameters": 10 * MIB, "loss": 100 * MIB}}
    return records


def test_the_page_of_a_sweep(tmp_path: Path) -> None:
    page = publish(example(), tmp_path)
    assert "| ulysses | 1,000 measured (1.00x) | 250.5 measured (1.00x) |" in page
    assert "| ring | 100.0 MiB measured (1.00x), no prediction | OOM measured, no prediction |" in page
    assert "- ring, 4K: no memory left" in page
    assert "Runs of the same arm were up to 0% apart." in page  # 1000 and 1001 tokens/s
    assert all(any(label in cell for label in LABELS) for cell in cells(page))
    assert "100.0 MiB measured (1.00x), 110.0 MiB predicted (+10%)" in publish(example(predicted=True), tmp_path)

    for name in ("throughput", "memory", "memory_by_category"):
        content = (tmp_path / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000
    scalars = {path.parent.name: EventAccumulator(str(path)).Reload() for path in tmp_path.glob("tb/*/events*")}
    over_context = scalars["upipe-U=8"].Scalars("over_context/tokens_per_second_per_rank")
    assert [(e.step, e.value) for e in over_context] == [(1024, 1000.5), (4096, 250.5)]
    assert [e.value for e in scalars["ulysses-U0-S1024-r1"].Scalars("run/loss")] == [8.0, 7.0, 6.0]
    assert [e.step for e in scalars["ulysses-U0-S1024-r1"].Scalars("run/step_seconds")] == [2, 3]


def test_a_plot_gives_every_method_its_colour() -> None:
    from benchmarks.plots import COLOURS

    assert set(COLOURS) >= {"upipe", "ulysses", "ring", "torchtitan"}
    assert len(set(COLOURS.values())) == len(COLOURS)


# ---- the report


def test_arms_of_one_method_stay_apart(tmp_path: Path) -> None:
    few = "upipe head_chunk=2 stash=none"
    records = [record_of(run) for run in arms.plan(["ulysses", "upipe", few], [1024], 1, default_chunk=8)]
    old = {"arm": {"method": "ring", "head_chunk": 0, "seq_len": 1024}}  # as written before arms had fields
    records.append(record_of(Run(Arm("ring", 0, 1024), 0), **old))
    assert [arm.name for arm in results.summarise(records)] == ["ulysses", "upipe U=8", "upipe U=2 stash=none", "ring"]
    assert "| upipe U=2 stash=none | 1,000 measured (1.00x) |" in publish(records, tmp_path)
    assert (tmp_path / "tb" / "upipe-U=2-stash=none").is_dir()
    page = report.page(report.sections([records], [])[0])
    assert "| upipe | 1,000 measured, U=8<br>1,000 measured, U=2 stash=none |" in page
    assert "no prediction, U=2 stash=none" in page


def test_every_figure_of_the_report_says_whose_it_is() -> None:
    def predicted(config: Any) -> Prediction:
        return Prediction(config.training.seq_len * 1000, 0, {})

    h100 = [
        record | {"ranks": 8, "hardware": {"device": "NVIDIA H100 80GB HBM3", "processor": "some", "cores": 9}}
        for record in example(methods=("upipe",))
    ]
    paper = [figure for figure in report.read_paper() if figure.seq_len in (2**20, 5 * 2**20)]
    found = {s.title: s for s in report.sections([example(), h100], paper, predicted)}
    assert set(found) == {"Llama3-8B, 2xCPU", "Llama3-8B, 8xH100", "Qwen3-32B, 16xH100"}
    for section in found.values():
        page = report.page(section)
        for cell in cells(page):
            assert any(label in cell for label in LABELS), cell
            assert len([label for label in ("measured", "published") if label in cell]) <= 1
    own, beside = report.page(found["Llama3-8B, 2xCPU"]), report.page(found["Llama3-8B, 8xH100"])
    assert "published" not in own
    assert "1,000 measured, U=8" in beside  # 1K, only run here
    upipe = next(line for line in beside.splitlines() if line.startswith("| upipe"))
    assert upipe.endswith("| not measured<br>98.25 published |")
    assert beside.count("measured, U=8") == 4  # two contexts, two tables: nothing else looks measured
    assert f"{5 * 2**20 * 1000 / 2**30:.2f} GiB predicted" in beside


def test_a_report_without_predictions_says_so() -> None:
    section = report.sections([], report.read_paper()[:3], lambda config: None)[0]
    memory = report.page(section).split("Peak device memory")[1]
    assert set(cells(memory)) == {"not measured", "no prediction"}
    with pytest.raises(ValueError, match="two of the results hold upipe U=8 at 1K for Llama3-8B, 2xCPU"):
        report.sections([example(), example()], [])
    with pytest.raises(ValueError, match=r"holds no results.jsonl"):
        report.report([Path("nowhere")], paper=False)
