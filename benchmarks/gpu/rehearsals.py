"""Part 3: one rank's work of jobs on eight GPUs (``benchmarks.rehearse``), UPipe against Ulysses."""

from __future__ import annotations

import json
import sys
from functools import partial

from benchmarks.arms import Arm, parse_arm
from benchmarks.gpu.items import Item, Part, Setup
from benchmarks.gpu.rates import fastest_kernel
from benchmarks.processes import run_logged
from benchmarks.rehearse import ROOT
from benchmarks.results import Record

LAYERS = 2
MOST = 180.0  # seconds, beside three times the estimate, after which a rehearsal hangs
LONG = 2**21  # tokens from which a step takes minutes, and a warm-up step too long


def rehearsals_part(setup: Setup) -> Part:
    """From the shortest context to the longest."""
    return Part(
        "rehearsals",
        40,
        [
            Item(key_of(arm), partial(_rehearse, setup, file, arm), partial(_estimate, setup, arm), MOST)
            for file, tokens, text in setup.sizes.rehearsals
            for arm in [parse_arm(text, tokens, 0)]
        ],
    )


def key_of(arm: Arm) -> str:
    """The key of an arm's line."""
    return f"rehearsal {arm.name} {arm.seq_len} tokens"


def steps_of(tokens: int) -> tuple[int, int]:
    """Steps to warm up, and steps to time."""
    return (0 if tokens >= LONG else 1), 1


def _estimate(setup: Setup, arm: Arm) -> float:
    """By the longest shorter rehearsal of the same method: at most, time grows with the square."""
    lines = [line for line in setup.measured("rehearsal ") if line["tokens"] < arm.seq_len]
    alike = [line for line in lines if line["method"] == arm.method] or lines
    if not alike:
        return setup.sizes.startup
    line = max(alike, key=lambda line: line["tokens"])
    return setup.sizes.startup + sum(steps_of(arm.seq_len)) * LAYERS * (
        (line["forward_seconds"] + line["backward_seconds"]) * (arm.seq_len / line["tokens"]) ** 2
    )


def _rehearse(setup: Setup, file: str, arm: Arm, left: float) -> Record:
    kernel = fastest_kernel(setup)
    warmup, steps = steps_of(arm.seq_len)
    folder = setup.folder / "rehearsals"
    folder.mkdir(exist_ok=True)
    result = folder / f"{key_of(arm).replace(' ', '-')}.jsonl"
    result.unlink(missing_ok=True)
    options = {"--rank": 0, "--world-size": setup.sizes.ranks, "--layers": LAYERS, "--warmup": warmup, "--steps": steps}
    command = [sys.executable, "-m", "benchmarks.rehearse", *(str(word) for pair in options.items() for word in pair)]
    command += ["--result", str(result), "--job.config_file", str(ROOT / file), *arm.overrides]
    command += ["--context_parallel.attention_kernel", kernel]
    log = result.with_suffix(".log")
    broken_off = run_logged(command, log, left)
    about = {"method": arm.method, "arm": arm.name, "tokens": arm.seq_len, "attention_kernel": kernel, "log": str(log)}
    if broken_off is not None:
        return about | broken_off
    if not result.exists():
        return about | {"status": "failed", "reason": "it ended without a result; see its log"}
    record = json.loads(result.read_text())
    return about | (_figures(record, arm) if record["status"] == "ok" else record)


def _figures(record: Record, arm: Arm) -> Record:
    rehearsal = record["rehearsal"]
    layer = rehearsal["forward_seconds"] + rehearsal["backward_seconds"]
    seconds = rehearsal["step_seconds"] + (rehearsal["full_layers"] - rehearsal["layers"]) * layer
    return {
        "status": "ok",
        "warmup_steps": record["warmup_steps"],
        "layers": rehearsal["layers"],
        "forward_seconds": rehearsal["forward_seconds"],
        "backward_seconds": rehearsal["backward_seconds"],
        "step_seconds": rehearsal["step_seconds"],
        "tokens_per_second_extrapolated": rehearsal["tokens"] / seconds,
        "peak_device_bytes": rehearsal["peak_device"],
        "predicted_device_bytes": rehearsal["predicted"],
        "predicted_full_device_bytes": rehearsal["predicted_full"],
        "peak_host_bytes": rehearsal["peak_host"],
        "model": f"{record['config']['model']['name']} {record['config']['model']['flavor']}",
    }
