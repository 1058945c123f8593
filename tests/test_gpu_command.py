"""The command for one GPU at toy sizes on CPU: a whole run, killed and started again; and what it is made of."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.items import Item, Part, Setup, Sizes, run_parts, skip
from benchmarks.gpu.rates import fastest_kernel, rates_of_run
from benchmarks.gpu.rehearsals import rehearsals_part
from benchmarks.gpu.sizes import REAL, TOY
from benchmarks.gpu.suite import lines_of_tests, run_suite
from benchmarks.gpu.trace import overlap
from benchmarks.gpu.training import Choice, choose
from benchmarks.processes import Worker
from benchmarks.results import Record, ResultsFile
from tests.jobs import ROOT
from torchtitan_upipe.kernels.rates import read_rates
from torchtitan_upipe.memory.prediction import GIB

# --- a whole run ------------------------------------------------------------------------------------------------------


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", "benchmarks.gpu", "--out", str(folder), "--toy", "--minutes", "10", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_toy_run_killed_and_started_again(tmp_path: Path) -> None:
    first = start(tmp_path)
    while first.poll() is None and "tests" not in {line["key"] for line in ResultsFile(tmp_path).load()}:
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = ResultsFile(tmp_path).load()
    assert before, first.communicate()[0]

    output, _ = (second := start(tmp_path)).communicate(timeout=280)
    assert second.returncode == 0, output
    assert "A toy run" in output
    lines = ResultsFile(tmp_path).load()
    assert lines[: len(before)] == before
    runs = Counter(line["key"] for line in lines if line["status"] != "skipped")
    assert set(runs.values()) == {1}  # nothing was run twice
    status = {line["key"]: line["status"] for line in lines}
    skipped = {key for key, value in status.items() if value == "skipped"}
    assert {key.split()[0] for key in skipped} == {"test", "attention", "rehearsal"}
    assert set(status.values()) == {"ok", "skipped"}, [line for line in lines if line["status"] == "failed"]
    ok = {key.split()[0] for key in runs}
    assert ok == {"test", "tests", "product", "copy", "attention", "rehearsal", "training", "trace"}
    assert all(line["toy"] and line["hardware"]["device"] == "CPU" for line in lines if line["status"] == "ok")

    by_key = {line["key"]: line for line in lines}
    (rehearsal,) = (line for key, line in by_key.items() if key.startswith("rehearsal upipe"))
    assert rehearsal["attention_kernel"] == "sdpa"  # the fastest, and the only one here
    assert rehearsal["predicted_device_bytes"] == pytest.approx(rehearsal["peak_device_bytes"], rel=0.1)
    (long,) = (line for key, line in by_key.items() if key.startswith("rehearsal ulysses"))
    assert "are left" in long["reason"]
    training = by_key["training on one GPU"]
    assert (training["tokens"], len(training["loss"])) == (256, 4)  # three, and one for the meter of CPUs
    assert training["predicted"]["device_bytes"] == pytest.approx(training["peak_device_bytes"], rel=0.1)
    assert (tmp_path / "layer.trace.json.gz").stat().st_size > 1000

    report, rates = tmp_path / "gpu.md", tmp_path / "rates.json"
    arguments = ["--out", str(tmp_path), "--toy", "--report", str(report), "--write-rates", str(rates)]
    assert command.main(arguments) == 0
    text = report.read_text()
    assert "A toy run on CPU" in text
    assert f"{training['loss'][0]:.3f}" in text
    assert '`"auto"` should be `"sdpa"` here' in text
    (entry,) = read_rates(rates)
    assert (entry.device, entry.tokens, list(entry.rates)) == ("CPU", 128, ["sdpa"])
    assert ResultsFile(tmp_path).load() == lines


def test_toy_lines_are_not_taken_for_real_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ResultsFile(tmp_path).append({"key": "x", "toy": True, "status": "ok"})
    assert command.main(["--out", str(tmp_path), "--report", str(tmp_path / "x.md")]) == 1
    assert "holds lines of a toy run; choose another --out, or start with --toy" in capsys.readouterr().err
    assert command.main(["--out", str(tmp_path / "none"), "--write-rates", str(tmp_path / "rates.json")]) == 1
    assert "holds no rates of attention kernels" in capsys.readouterr().err
    assert command.main(["--out", str(tmp_path), "--toy", "--parts", "rates,tets"]) == 1
    assert "'tets' is none of tests, rates" in capsys.readouterr().err


def test_the_committed_page_is_what_no_lines_give(tmp_path: Path) -> None:
    """Until someone has run the command on a GPU and committed its page."""
    page = (ROOT / "docs/gpu.md").read_text()
    if "Measured on\n\nnot run" in page:
        target = tmp_path / "gpu.md"
        assert command.main(["--out", str(tmp_path / "none"), "--report", str(target)]) == 0
        assert target.read_text().replace(str(target), "docs/gpu.md") == page
    assert page.count("\n## ") >= 7


# --- items, lines and time --------------------------------------------------------------------------------------------


def setup(folder: Path, sizes: Sizes = TOY) -> Setup:
    return Setup(folder, sizes, "cpu")


def run(made: Setup, *parts: Part, seconds: float = 100) -> dict[str, str]:
    run_parts(made, parts, seconds, lambda line: None)
    return {key: line["status"] for key, line in made.lines.items()}


def fails(left: float) -> Record:
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to")


def test_every_outcome_has_a_line_and_is_not_run_again(tmp_path: Path) -> None:
    calls: list[str] = []

    def counted(key: str) -> Item:
        return Item(key, lambda left: calls.append(key) or {"status": "ok"})  # type: ignore[func-returns-value]

    parts = Part("a", 1, [counted("one"), Item("two", fails)]), Part("b", 1, [Item("three", lambda left: skip("no"))])
    expected = {"one": "ok", "two": "OOM", "three": "skipped"}
    assert run(setup(tmp_path), *parts) == expected
    again = setup(tmp_path)
    again.read()
    assert again.lines["two"]["reason"] == "OutOfMemoryError: CUDA out of memory."
    assert run(again, *parts, Part("c", 1, [counted("four")])) == {**expected, "four": "ok"}
    assert calls == ["one", "four"]
    retry = Setup(tmp_path, TOY, "cpu", retry_before=len(ResultsFile(tmp_path).load()))
    retry.read()
    assert set(retry.lines) == {"one", "three", "four"}
    assert (
        run(retry, Part("a", 1, [Item("two", lambda left: {"status": "failed", "reason": "again"})]))["two"] == "failed"
    )
    retry.read()
    assert retry.lines["two"]["reason"] == "again"


def test_time_is_shared_and_what_does_not_fit_is_skipped(tmp_path: Path) -> None:
    given: dict[str, float] = {}

    def note(key: str, estimate: float = 0) -> Item:
        return Item(key, lambda left: given.update({key: left}) or {"status": "ok"}, lambda: estimate)  # type: ignore[func-returns-value]

    status = run(
        setup(tmp_path),
        Part("a", 1, [note("first", 49), note("long", 51)]),
        Part("b", 1, [note("rest", 95)]),
        seconds=100,
    )
    assert status == {"first": "ok", "long": "skipped", "rest": "ok"}
    assert given["first"] == pytest.approx(50, abs=2)
    assert given["rest"] == pytest.approx(100, abs=3)  # what the first part has left over


def stops(left: float) -> Record:
    return {"status": "failed", "reason": f"stopped after {left:.0f} s"}


def test_what_runs_out_of_time_comes_last_next_time_and_what_hangs_has_failed(tmp_path: Path) -> None:
    order: list[str] = []

    def item(key: str, most: float = 1000) -> Item:
        return Item(key, lambda left: order.append(key) or stops(left), most=most)  # type: ignore[func-returns-value]

    part = Part("a", 1, [item("slow"), item("hanging", most=1), Item("other", lambda left: skip("why not"))])
    assert run(setup(tmp_path), part) == {"slow": "skipped", "hanging": "failed", "other": "skipped"}
    again = setup(tmp_path)
    again.read()
    order.clear()
    run(again, Part("a", 1, [*part.items, item("new")]))
    assert order == ["new", "slow"]


# --- processes --------------------------------------------------------------------------------------------------------


def behave(how: str) -> Record:
    if how == "exit":
        os._exit(3)
    if how == "sleep":
        time.sleep(60)
    if how == "fail":
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
    return {"process": os.getpid()}


def test_a_worker_outlives_what_its_calls_do() -> None:
    worker = Worker()
    first = worker.call(60, behave, ("well",))
    assert worker.call(60, behave, ("well",)) == first != {"status": "ok", "process": os.getpid()}
    failed = worker.call(60, behave, ("fail",))
    assert failed == {
        "status": "failed",
        "reason": "RuntimeError: CUDA error: an illegal memory access was encountered",
    }
    assert worker.call(0.5, behave, ("sleep",))["reason"] == "stopped after 0 s"
    assert worker.call(60, behave, ("exit",)) == {"status": "failed", "reason": "its process ended with code 3"}
    worker.end()


def test_the_suite_goes_on_behind_a_test_that_takes_its_process_along(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import os\ndef test_a(record_property): record_property('kernel', 'cudnn'); assert 1 == 2\n"
        "def test_b(): os._exit(139)\ndef test_c(): pass\n"
    )
    made = setup(tmp_path, replace(TOY, tests=(str(tmp_path / "test_it.py"), "--rootdir", str(tmp_path))))
    made.add("tests", {"part": "tests", **skip("earlier")})
    counts = {"passed": 1, "failed": 2, "skipped": 0}
    assert run_suite(made, 120) == {"status": "failed", "reason": "2 of 3 tests failed", "counts": counts}
    lines = {line["key"].rpartition("::")[2]: line for line in lines_of_tests(made)}
    assert {name: line["status"] for name, line in lines.items()} == {
        "test_a": "failed",
        "test_b": "failed",
        "test_c": "ok",
    }
    assert "assert 1 == 2" in lines["test_a"]["reason"]
    assert lines["test_a"]["kernel"] == "cudnn"
    assert lines["test_b"]["reason"] == "its process died"


# --- what lines say ---------------------------------------------------------------------------------------------------


def attention_line(kernel: str, tokens: int, forward: float, backward: float, heads: int = 1) -> Record:
    hardware = {"device": "NVIDIA H100 80GB HBM3", "capability": [9, 0]}
    return {
        "status": "ok",
        "part": "rates",
        **{"kernel": kernel, "tokens": tokens, "heads": heads, "head_dim": 128},
        **{"forward_tflops": forward, "backward_tflops": backward, "seconds_of_both": 1.0},
        **{"commit": "c", "versions": {"torch": "2.11"}, "hardware": hardware},
    }


def test_which_kernel_the_lines_choose(tmp_path: Path) -> None:
    made = setup(tmp_path)
    assert fastest_kernel(made) == "auto"
    for tokens in (16, 64):
        made.lines[f"sdpa{tokens}"] = attention_line("sdpa", tokens, 330, 280)
        made.lines[f"cudnn{tokens}"] = attention_line("cudnn", tokens, 560, 500.123456)
    made.lines["long"] = attention_line("sdpa", 256, 900, 900)  # alone there: compared with nothing
    made.lines["heads"] = attention_line("sdpa", 64, 900, 900, heads=4)
    entry = rates_of_run(made.lines.values())
    assert entry is not None
    assert (entry.tokens, entry.capability, entry.rates["cudnn"].backward) == (64, (9, 0), 500.1)
    assert fastest_kernel(made) == "cudnn"
    made.lines["test x"] = {"status": "failed", "kernel": "cudnn"}  # wrong numbers, however fast
    assert fastest_kernel(made) == "sdpa"


def test_longer_rehearsals_are_estimated_by_shorter_ones(tmp_path: Path) -> None:
    made = setup(tmp_path, REAL)
    items = {item.key: item for item in rehearsals_part(made).items}
    assert len(items) == 20
    key = "rehearsal upipe U=8 stash=host {} tokens"
    assert items[key.format(2**19)].estimate() == REAL.startup
    figures = {"status": "ok", "method": "upipe", "tokens": 2**17, "forward_seconds": 1.0, "backward_seconds": 2.0}
    made.lines[key.format(2**17)] = figures
    assert items[key.format(2**19)].estimate() == REAL.startup + 2 * 2 * 3 * 16
    assert items[key.format(3 * 2**20)].estimate() == REAL.startup + 2 * 3 * 24**2  # without a warm-up step


def test_the_job_on_one_gpu_fits_into_memory_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = replace(TOY, flavors=("8B", "8B_8layers"), lengths=(2**19, 2**16))
    made = Setup(tmp_path, sizes, "cpu")
    monkeypatch.setattr("benchmarks.gpu.training.ASSUMED", {"cpu": 3e14})

    def chosen(device: float, seconds: float) -> Any:
        monkeypatch.setattr("benchmarks.gpu.training.memory_of", lambda _: (device * GIB, device * GIB))
        found = choose(made, seconds)
        return (found.flavor, found.tokens) if isinstance(found, Choice) else found

    assert chosen(1e6, 1e6) == ("8B", 2**19)
    assert chosen(1e6, 300) == ("8B", 2**16)
    assert chosen(150, 300) == ("8B_8layers", 2**16)
    assert chosen(10, 300).startswith("8B_8layers at 65536 tokens needs ")


def test_the_share_of_copies_beside_kernels() -> None:
    def event(category: str, name: str, start: float, length: float) -> dict[str, Any]:
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length}

    events = [
        event("kernel", "a", 0, 10),
        event("kernel", "b", 5, 10),  # beside a, on another stream
        event("kernel", "c", 30, 10),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 10, 10),  # half of it beside b
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 32, 5),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 0, 40),
        event("cpu_op", "aten::mm", 0, 40),
        {"ph": "M", "name": "process_name"},
    ]
    found = overlap(events)
    assert found["copies"] == 2
    assert found["kernel_seconds"] == pytest.approx(25e-6)
    assert found["copy_seconds"] == pytest.approx(15e-6)
    assert found["hidden_share"] == pytest.approx(10 / 15)
    assert overlap([])["hidden_share"] is None
    assert json.dumps(found)
