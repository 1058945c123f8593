"""What fits where: ``python -m benchmarks.fits README.md`` (about 10 minutes).

The longest context of UPipe that the planner finds on 1, 8 and 16 GPUs of each size, as predicted by the ledger and the
model of time. The command writes the table between the marks of the page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torchtitan_upipe.titan.specs  # noqa: F401  (registers the models)
from benchmarks.tables import markdown, write_between
from torchtitan_upipe.device import SIMULATED
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.job.shape import job_shape
from torchtitan_upipe.memory.planner import Budget, Plan, Planner
from torchtitan_upipe.memory.prediction import GIB
from torchtitan_upipe.memory.rates import rates_of
from torchtitan_upipe.memory.step_time import Machine

ROOT = Path(__file__).parent.parent
JOBS = {"Llama3-8B": "llama3_8b_5m", "Qwen3-32B": "qwen3_32b_4m"}
DEVICES = ("a100-40gb", "h100-80gb", "h200")
RANKS = (1, 8, 16)
HOST, HOST_OF_ONE, RESERVE = 256 * GIB, 1024 * GIB, 4 * GIB  # a rank's share; of one that has a host for itself
MILLION = 2**20


def longest(job: str, device: str, ranks: int) -> Plan | None:
    """The longest context of a model on ``ranks`` devices, and its fastest settings."""
    degrees = ["--parallelism.context_parallel_degree", str(ranks)]
    args = [
        "--job.config_file",
        str(ROOT / f"train_configs/{job}.toml"),
        *degrees,
        "--context_parallel.head_chunk",
        "0",
    ]
    if ranks == 1:
        args.append("--training.enable_cpu_offload")  # FSDP2 on a mesh of one
    shape = job_shape(read_job(args, ranks, SIMULATED), ranks)
    rates = rates_of(device)
    budget = Budget(rates.memory - RESERVE, HOST_OF_ONE if ranks == 1 else HOST)
    return Planner(budget, Machine(rates)).longest(shape)


def settings(plan: Plan) -> str:
    """The settings that matter most, as a job file has them."""
    job = plan.job
    words = [f"U = {job.head_chunk}"] if job.method == "upipe" else []
    words += [f"T = {job.query_tiles}"] if job.query_tiles > 1 else []
    stashed = sum(job.stash_of(layer) != "none" for layer in range(job.model.layers))
    words += [f"stash of {stashed} layers" if stashed else "no stash"]
    inputs = "hidden states" if job.hidden_on_host else "block inputs" if job.offload else ""
    words += [f"{inputs} on host"] if inputs else []
    words += ["state on host"] if job.state_on_host else []
    return ", ".join(words)


def rows() -> Iterator[list[str]]:
    """One for each model, size and number of devices."""
    for model, job in JOBS.items():
        for device in DEVICES:
            for ranks in RANKS:
                plan = longest(job, device, ranks)
                print(model, device, ranks, plan and plan.job.length, file=sys.stderr, flush=True)
                row = [model, f"{ranks} x {rates_of(device).memory / 1e9:.0f} GB"]
                if plan is None:
                    yield [*row, "none", "", "", "", ""]
                    continue
                used = plan.prediction
                yield [
                    *row,
                    f"{plan.job.length / MILLION:.2f}M",
                    f"{used.device_bytes / GIB:.1f}",
                    f"{used.host_bytes / GIB:.0f}",
                    f"{plan.time.seconds:,.0f}",
                    settings(plan),
                ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table into the page of the command line, or print it; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fits", description=__doc__, allow_abbrev=False)
    parser.add_argument("page", type=Path, nargs="?", help="a page with the two marks; without one, print")
    page = parser.parse_args(arguments).page
    table = markdown(["model", "GPUs", "tokens", "device GiB", "host GiB", "s a step", "settings"], rows())
    try:
        print(table) if page is None else write_between(page, "benchmarks.fits", table)
    except ValueError as error:
        print(f"ValueError: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
