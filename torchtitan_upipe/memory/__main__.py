"""``python -m torchtitan_upipe.memory --job.config_file X [--world-size N] [--rank R] [--dry-run]``.

Says what one rank of a job needs, without starting it and without its device.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.table import Table

import torchtitan_upipe.titan.specs  # noqa: F401  (registers the models)
from torchtitan_upipe.device import SIMULATED
from torchtitan_upipe.dry_run.dry_run import DryRun, dry_run
from torchtitan_upipe.job.load import split_options
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.job.shape import needed_ranks
from torchtitan_upipe.launch import refuse
from torchtitan_upipe.memory.ledger import predict
from torchtitan_upipe.memory.prediction import CATEGORIES, GIB, Prediction


@dataclass(frozen=True)
class Options:
    """Predict the peak memory of one rank. All other options are the job's, as for torchtitan_upipe.train."""

    world_size: int = 0
    """Ranks of the job; 0 = as many as its degrees need."""

    rank: int = 0
    """The rank to look at."""

    dry_run: bool = False
    """Run the real trainer on fake tensors, too (a minute or more for a large model), and show the difference."""


def main(args: Sequence[str] | None = None) -> int:
    """Print the table; return the exit code."""
    own_args, job_args = split_options(sys.argv[1:] if args is None else args)
    options = tyro.cli(Options, args=own_args, prog="torchtitan_upipe.memory")
    try:
        config = read_job(job_args, options.world_size, SIMULATED)
        world_size = options.world_size or needed_ranks(config)
        if config.context_parallel.settings == "auto":
            raise ValueError(
                'context_parallel.settings = "auto" is settled on the device; python -m torchtitan_upipe.plan shows '
                "and writes what would be chosen."
            )
        if not 0 <= options.rank < world_size:
            raise ValueError(f"--rank {options.rank} must be between 0 and {world_size - 1}.")
        predictions = [predict(config, world_size, options.rank)]
        bare = [predict(config, world_size, options.rank, workspace=False)]
        if options.dry_run:
            jobs = [DryRun(tuple(job_args), world_size, options.rank, workspace) for workspace in (True, False)]
            for found, legs in zip(dry_run(jobs), (predictions, bare), strict=True):
                legs.append(found)
    except ValueError as error:
        return refuse(error)
    title = f"{config.model.name} {config.model.flavor}, {config.training.seq_len} tokens, rank {options.rank}"
    console = Console()
    console.print(_table(f"{title} of {world_size}: peak memory in GiB", predictions, bare))
    for leg, prediction in zip(("ledger", "dry run"), predictions, strict=False):
        console.print(f"Peak of the {leg}: {prediction.moment}")
    console.print("Not counted: the device's context, buffers of the communication library, fragmentation.")
    return 0


def _table(title: str, legs: Sequence[Prediction], bare: Sequence[Prediction]) -> Table:
    """Rows of categories; columns of the ledger and, where there is one, the dry run and the difference."""
    table = Table(title=title)
    table.add_column("device, at its peak")
    for name in ("ledger", "dry run", "difference")[: 1 if len(legs) == 1 else 3]:
        table.add_column(name, justify="right")

    def row(name: str, sizes: Sequence[int], **style: bool) -> None:
        cells = [f"{size / GIB:.3f}" for size in sizes]
        if len(sizes) == 2:
            cells.append(f"{sizes[0] / sizes[1] - 1:+.1%}" if sizes[1] else "")
        table.add_row(name, *cells, **style)  # type: ignore[arg-type]

    for category in CATEGORIES:
        sizes = [leg.by_category.get(category, 0) for leg in legs]
        if any(sizes):
            row(category, sizes)
    table.add_section()
    row("device", [leg.device_bytes for leg in legs])
    row("device, attention workspace not counted", [leg.device_bytes for leg in bare])
    row("host", [leg.host_bytes for leg in legs])
    return table


if __name__ == "__main__":
    sys.exit(main())
