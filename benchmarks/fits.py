"""What fits where: ``python -m benchmarks.fits README.md docs/fits.md`` (some minutes).

The longest context of UPipe that the planner finds on 1, 8 and 16 GPUs of each size, as predicted by the ledger and the
model of time. The command writes a short table into one page and one with settings into the other, between their marks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torchtitan_upipe.titan.specs  # noqa: F401  (registers the models)
from benchmarks.tables import markdown, write_between
from torchtitan_upipe.device import SIMULATED
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.job.shape import job_shape
from torchtitan_upipe.launch import refuse
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


@dataclass(frozen=True)
class Fitting:
    """What fits on so many devices of a kind, if anything."""

    model: str
    ranks: int
    device: str
    plan: Plan | None

    @property
    def row(self) -> tuple[str, int]:
        """Of the short table."""
        return self.model, self.ranks

    @property
    def cell(self) -> str:
        """Of the short table."""
        return "nothing" if self.plan is None else "{}: {}, {}".format(*self.details[:3])

    @property
    def details(self) -> list[str]:
        """Of the long table."""
        if self.plan is None:
            return ["nothing", *[""] * 5]
        plan, used = self.plan, self.plan.prediction
        return [
            f"{plan.job.length / MILLION:.3g}M",
            f"{used.device_bytes / GIB:.1f}",
            f"{used.host_bytes / GIB:.0f}",
            f"{plan.time.seconds:,.0f}",
            f"{plan.tokens_per_second:,.1f}",
            settings(plan),
        ]


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


def plans() -> Iterator[Fitting]:
    """For each model, number and size of devices."""
    for model, job in JOBS.items():
        for ranks in RANKS:
            for device in DEVICES:
                plan = longest(job, device, ranks)
                print(model, ranks, device, plan and plan.job.length, file=sys.stderr, flush=True)
                yield Fitting(model, ranks, device, plan)


def short_table(found: Sequence[Fitting]) -> str:
    """Tokens, and GiB of device and host, with one row for each model and number of devices."""
    header = ["", *(f"{rates_of(device).memory / 1e9:.0f} GB" for device in DEVICES)]
    return markdown(
        header,
        (
            [f"{model}, {ranks} GPU{'s' * (ranks > 1)}", *(fit.cell for fit in found if fit.row == (model, ranks))]
            for model, ranks in dict.fromkeys(fit.row for fit in found)
        ),
    )


def long_table(found: Sequence[Fitting]) -> str:
    """The same with the settings, and the predicted time of a step."""
    header = ["model", "GPUs", "tokens", "device GiB", "host GiB a rank", "s a step", "tokens/s a GPU", "settings"]
    return markdown(header, ([fit.model, f"{fit.ranks} x {fit.device}", *fit.details] for fit in found))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tables into the pages of the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fits", description=__doc__, allow_abbrev=False)
    parser.add_argument("short", type=Path, help="a page with the two marks")
    parser.add_argument("long", type=Path, help="another one")
    options = parser.parse_args(arguments)
    found = list(plans())
    try:
        write_between(options.short, "benchmarks.fits", short_table(found))
        write_between(options.long, "benchmarks.fits", long_table(found))
    except ValueError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
