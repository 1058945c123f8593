"""``torchrun --nproc_per_node 4 -m torchtitan_upipe.check --job.config_file X [--json FILE] [--time-limit 24:00:00]``.

Tries a job on its own ranks before it starts: one line a check, one sentence a failure, and a verdict in JSON. The exit
code is 0 where all is well, and 1 where a check failed or the job is refused. Without torchrun one rank is checked.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
import tyro

import torchtitan_upipe.titan.specs  # noqa: F401  (registers the models)
from torchtitan_upipe.checks.limits import seconds_left
from torchtitan_upipe.checks.report import Result
from torchtitan_upipe.checks.run import Bench, end_process, join_ranks, names_of_hosts, run_checks
from torchtitan_upipe.device import leave, refuse_idle_gpus
from torchtitan_upipe.job.load import split_options
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.launch import fail, refuse, stand_alone
from torchtitan_upipe.titan.command import run_or_explain
from torchtitan_upipe.titan.console import init_console

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

FILE = "check.json"  # in job.dump_folder


@dataclass(frozen=True)
class Options:
    """Try a job on its own ranks before it starts. All other options are the job's."""

    json: str = ""
    """Where to write the verdict; by default check.json in job.dump_folder."""

    time_limit: str = ""
    """Until the job will be ended: seconds, HH:MM:SS or D-HH:MM:SS; by default SLURM_JOB_END_TIME, if it is set."""


def main(args: Sequence[str] | None = None) -> int:
    """Check the job of the command line; return the exit code."""
    stand_alone()
    init_console()
    own_args, job_args = split_options(sys.argv[1:] if args is None else args)
    options = tyro.cli(Options, args=own_args, prog="torchtitan_upipe.check")
    logging.disable(logging.WARNING)  # of the short job; what is wrong comes from the checks
    warnings.simplefilter("ignore")
    try:
        refuse_idle_gpus()
        config = read_job(job_args)
        check_options(options, config)
    except ValueError as error:
        return refuse(error)
    results: list[Result] = []
    if code := run_or_explain(config, lambda: results.extend(_check(config, options))):
        return code
    failed = [result.name for result in results if result.failures]
    return fail(f"The check failed: {', '.join(failed)}.") if failed else 0


def check_options(options: Options, config: JobConfig) -> None:
    """Refuse what cannot be checked.

    Raises:
        ValueError: a time that is none, a job of TorchTitan's own context parallelism, a seed checkpoint.
    """
    seconds_left(options.time_limit, {}, 0.0)
    if config.context_parallel.method == "torchtitan":
        raise ValueError('method = "torchtitan" is not checked, since its memory is not predicted; choose another.')
    if config.checkpoint.create_seed_checkpoint:
        raise ValueError("checkpoint.create_seed_checkpoint = true trains nothing that could be checked; remove it.")


def _check(config: JobConfig, options: Options) -> list[Result]:
    began = time.monotonic()
    board = join_ranks(config)
    path = Path(options.json or Path(config.job.dump_folder) / FILE)

    def show(result: Result) -> None:
        if board.rank == 0:
            print(spell(result), flush=True)

    def give_up(results: Sequence[Result]) -> None:
        show(results[-1])
        write_verdict(path, results, time.monotonic() - began)
        fail(f"The check did not end: {results[-1].name}.")
        end_process(1)

    results = run_checks(Bench(config, options.time_limit, board), names_of_hosts(board), show, give_up)
    if board.rank == 0:
        seconds = time.monotonic() - began
        write_verdict(path, results, seconds)
        print(f"Checked in {seconds:.0f} s; verdict: {path}", flush=True)
    board.part()
    if not any(result.failures for result in results):
        dist.destroy_process_group()
    return results


def spell(result: Result) -> str:
    """One line, and one more for each failure."""
    head = f"{'FAILED' if result.failures else 'ok':6} {result.name} ({result.seconds:.1f} s): {result.measured}"
    return "\n".join([head, *(f"       - {sentence}" for sentence in result.failures)])


def write_verdict(path: Path, results: Sequence[Result], seconds: float) -> None:
    """Write the JSON verdict.

    Raises:
        ValueError: that is not possible.
    """
    verdict = {
        "ok": not any(result.failures for result in results),
        "seconds": seconds,
        "ranks": dist.get_world_size(),
        "checks": [asdict(result) for result in results],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(verdict, indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be written to ({error.strerror}); choose another --json.") from error


if __name__ == "__main__":
    leave(main())
