"""Compare methods over contexts, each in a real training job.

    python -m benchmarks.ab --job.config_file train_configs/llama3_debug.toml \
        --methods upipe,ulysses,ring --seq_lens 2k,4k --steps 5 --out outputs/ab [--section.field value ...]

``--arms`` instead of ``--methods`` compares jobs that differ in more than method and head chunk:

    --arms ulysses "upipe head_chunk=4" "upipe head_chunk=4 stash=none query_tiles=4"

An arm is a method and fields of the job, those of ``[context_parallel]`` by their bare name, others as section.field.

Writes ``results.jsonl`` (one line per run), ``table.md``, plots and TensorBoard scalars below ``--out``. Started again
with the same arguments it goes on where it was. For a job of several nodes run it on each, as ``scripts/launch.sh``,
with an ``--out`` that all of them see.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import cuda
from torchtitan.config import JobConfig

from benchmarks.arms import (
    Arm,
    Run,
    check_overrides,
    node_rank,
    parse_count,
    plan,
    spell_arms,
    torchrun,
    world_size,
)
from benchmarks.prediction import Prediction, predict
from benchmarks.processes import run_logged
from benchmarks.publish import publish
from benchmarks.results import Record, ResultsFile
from torchtitan_upipe.device import refuse_idle_gpus
from torchtitan_upipe.job.load import load_config
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.launch import refuse

Predict = Callable[[JobConfig], Prediction | None]


@dataclass(frozen=True)
class Sweep:
    """A sweep's own options; ``job`` is the rest of the command line, the same for every arm."""

    runs: list[Run]
    job: list[str]
    warmup: int
    steps: int
    timeout: float
    out: Path

    @property
    def fingerprint(self) -> str:
        """Changes with all that makes figures incomparable: the job file's text, overrides, steps."""
        path = load_config(self.job).job.config_file
        text = Path(path).read_text() if path else ""
        content = json.dumps([text, self.job, self.warmup, self.steps])
        return hashlib.sha256(content.encode()).hexdigest()[:12]


def parse(arguments: Sequence[str]) -> Sweep:
    """Read the command line.

    Raises:
        ValueError: with one sentence, as for any job.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ab",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    compared = parser.add_mutually_exclusive_group(required=True)
    compared.add_argument("--methods", help="e.g. upipe,ulysses,ring; ratios are to the first")
    compared.add_argument("--arms", nargs="+", help='e.g. ulysses "upipe head_chunk=4 stash=none"; likewise')
    parser.add_argument("--seq_lens", required=True, help="e.g. 8k,16k or 1m; k = 1024, m = 1024 k")
    parser.add_argument("--head_chunks", default="", help="with --methods: one UPipe arm each; default: the job file's")
    parser.add_argument("--rounds", type=int, default=2, help="how often the whole sequence of arms is run (2)")
    parser.add_argument("--warmup", type=int, default=2, help="first steps of a run, not timed (2)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a run (5)")
    parser.add_argument("--timeout", type=float, default=86400, help="seconds after which a run counts as failed")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; an existing one is continued")
    options, job = parser.parse_known_args(arguments)
    check_overrides(job)
    config = load_config(job)
    if options.steps < 1 or options.warmup < 0:
        raise ValueError(f"--steps {options.steps} must be at least 1 and --warmup {options.warmup} at least 0.")
    chunks = [parse_count(chunk) for chunk in _split(options.head_chunks)]
    if chunks and options.arms:
        raise ValueError("--head_chunks belongs to --methods; beside --arms write head_chunk=... into each arm.")
    runs = plan(
        options.arms or spell_arms(_split(options.methods), chunks),
        [parse_count(length) for length in _split(options.seq_lens)],
        options.rounds,
        default_chunk=config.context_parallel.head_chunk,
    )
    for arm in dict.fromkeys(run.arm for run in runs):
        _check_fields(job, arm)
    return Sweep(runs, job, options.warmup, options.steps, options.timeout, options.out)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _check_fields(job: Sequence[str], arm: Arm) -> None:
    """Refuse an arm with a field that the job does not have, or a value of the wrong type."""
    try:
        load_config([*job, *arm.overrides])
    except ValueError as error:
        raise ValueError(f"the arm {arm.name!r} cannot run: {error}") from error


def predict_here(config: JobConfig) -> Prediction | None:
    """The ledger's prediction for this machine: CPU kernels have no workspace that counts."""
    return predict(config, workspace=cuda.is_available())


def run_sweep(sweep: Sweep, predict: Predict = predict_here) -> list[Record]:
    """Run what is missing of the sweep; return the records of all its runs.

    Raises:
        ValueError: the folder holds another job's results.
    """
    sweep.out.mkdir(parents=True, exist_ok=True)
    results, fingerprint = ResultsFile(sweep.out), sweep.fingerprint
    done = {record["run"]: record for record in results.load()}
    others = {record["job"] for record in done.values()} - {fingerprint}
    if others:
        raise ValueError(f"{results.path} holds results of another job file, overrides or steps; choose another --out.")
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with results.writing() if node_rank() == 0 else nullcontext(), Progress(*columns, console=console) as progress:
        missing = [run for run in sweep.runs if run.key not in done]
        task = progress.add_task("", total=len(missing))
        started = time.monotonic()
        for number, run in enumerate(missing, start=1):
            progress.update(task, description=f"{run.arm.name}, {run.arm.seq_len} tokens, round {run.round + 1}")
            record = {"run": run.key, "job": fingerprint, **execute(sweep, run, predict)}
            done[run.key] = record
            if node_rank() == 0:  # of several nodes, the first keeps the results
                results.append(record)
            progress.advance(task)
            left = len(missing) - number
            remaining = f"; {left} to go, about {left * (time.monotonic() - started) / number / 60:.0f} min left"
            console.print(f"{run.key}: {_outcome(record)}{remaining if left else ''}", highlight=False, soft_wrap=True)
    return [done[run.key] for run in sweep.runs]


def _outcome(record: Record) -> str:
    if record["status"] != "ok":
        return f"{record['status']}: {record['reason']}"
    return f"{record['tokens_per_second_per_rank']:,.1f} tokens/s/rank, {record['wall_seconds']:.0f} s in all"


def execute(sweep: Sweep, run: Run, predict: Predict) -> Record:
    """Run one arm as a job of its own, or read what a killed sweep's job has still written; return its record."""
    folder = sweep.out / "runs" / run.key
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / f"result-{sweep.fingerprint}.json"
    job = [*sweep.job, *run.arm.overrides]
    started = time.monotonic()
    record: Record = {"arm": asdict(run.arm), "round": run.round, "arguments": job}
    try:
        config = read_job(job, world_size=0)  # the child finds the same; here it also makes the job's model known
        options = ["--result", str(result), "--warmup", str(sweep.warmup), "--steps", str(sweep.steps)]
        command = torchrun(
            world_size(config), "benchmarks.measured", [*options, *job, "--job.dump_folder", str(folder)]
        )
        prediction = predict(config)
    except ValueError as error:
        outcome: Record = {"status": "failed", "reason": str(error)}
    else:
        if prediction is not None:
            record["predicted"] = asdict(prediction)
        outcome = _finished(result)
        if outcome.get("status") != "ok":  # what a killed sweep has left of a job that was ended with it
            result.unlink(missing_ok=True)
            log = folder / f"log-node{node_rank()}.txt"
            broken_off = run_logged(command, log, sweep.timeout)
            outcome = {**broken_off, "log": str(log)} if broken_off else _finished(result)
    times = {"wall_seconds": time.monotonic() - started, "finished": datetime.now(UTC).isoformat(timespec="seconds")}
    return record | outcome | times


def _finished(result: Path) -> Record:
    if not result.exists():
        return {"status": "failed", "reason": "the job ended without a result; see its log"}
    return dict(json.loads(result.read_text()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep of the command line and write what it shows; return the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a job under way is ended too
    try:
        refuse_idle_gpus()
        sweep = parse(sys.argv[1:] if arguments is None else arguments)
        records = run_sweep(sweep)
    except ValueError as error:
        return refuse(error)
    if node_rank() == 0:
        print(publish(records, sweep.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
