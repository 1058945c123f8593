"""``python -m torchtitan_upipe.plan --job.config_file X --device-memory 80GiB --host-memory 2TiB [--world-size 8]``.

Says how long a context each method can train, and with which settings, by the ledger (``memory/``).
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console
from rich.table import Table

import torchtitan_upipe.titan.specs  # noqa: F401  (registers the models)
from torchtitan_upipe.device import SIMULATED
from torchtitan_upipe.job.load import config_file, split_options
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.job.shape import STASHING, JobShape, job_shape, needed_ranks
from torchtitan_upipe.job.write import job_text
from torchtitan_upipe.memory.planner import Budget, Plan, explain_nothing_fits, fastest, longest, methods, settings_of
from torchtitan_upipe.memory.prediction import GIB

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    f"{letter}iB": 2 ** (10 * i) for i, letter in enumerate("KMGT", 1)
}


@dataclass(frozen=True)
class Options:
    """Longest contexts and best settings for given memory. All other options are the job's."""

    device_memory: str
    """Memory of one device, e.g. 80GiB."""

    host_memory: str = "2TiB"
    """Memory of one host."""

    world_size: int = 0
    """Ranks of the job; 0 = as many as its degrees need."""

    ranks_per_host: int = 8
    """Ranks that share a host's memory, at most."""

    reserve: str = "4GiB"
    """Left free on each device: its context, buffers of the communication library, fragmentation."""

    write: str = ""
    """Write the job file with the settings for the job's own context here."""


def main(args: Sequence[str] | None = None) -> int:
    """Print the table; return the exit code."""
    own_args, job_args = split_options(sys.argv[1:] if args is None else args)
    options = tyro.cli(Options, args=own_args, prog="torchtitan_upipe.plan")
    try:
        config = read_job(job_args, options.world_size, SIMULATED)
        world_size = options.world_size or needed_ranks(config)
        budget = _budget(options, world_size)
        job = job_shape(config, world_size)
        wanted = fastest(job, budget)
        if options.write:
            if wanted is None:
                raise ValueError(explain_nothing_fits(job, budget))
            _write(options.write, planned(job_args, wanted))
    except ValueError as error:
        print(f"ValueError: {error}", file=sys.stderr)
        return 1
    console = Console()
    if not console.is_terminal:
        console.width = 180
    console.print(_table(config, world_size, budget, wanted, [longest(shape, budget) for shape in methods(job)], job))
    if options.write:
        console.print(f"Wrote {options.write}")
    return 0


def parse_bytes(text: str) -> float:
    """``"80GiB"``, ``"2 TiB"``, ``"80GB"`` or a plain number of bytes.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    unit = next((u for u in UNITS if match and u.lower() == match[2].lower()), None)
    if match is None or unit is None or not re.fullmatch(r"\d+\.?\d*|\.\d+", match[1]):
        raise ValueError(f"{text!r} is no amount of memory; write a number and a unit, for example 80GiB.")
    return float(match[1]) * UNITS[unit]


def _budget(options: Options, world_size: int) -> Budget:
    if options.ranks_per_host < 1:
        raise ValueError(f"--ranks-per-host {options.ranks_per_host} must be at least 1.")
    device = parse_bytes(options.device_memory) - parse_bytes(options.reserve)
    if device <= 0:
        raise ValueError(
            f"--reserve {options.reserve} leaves nothing of --device-memory {options.device_memory}; lower it."
        )
    return Budget(device, parse_bytes(options.host_memory) / min(world_size, options.ranks_per_host))


def _table(
    config: JobConfig,
    world_size: int,
    budget: Budget,
    wanted: Plan | None,
    longest_: Sequence[Plan | None],
    job: JobShape,
) -> Table:
    table = Table(
        title=f"{config.model.name} {config.model.flavor} on {world_size} ranks, {budget.device / GIB:.1f} GiB of each "
        f"device and {budget.host / GIB:.0f} GiB of host memory a rank"
    )
    for name in ("", "method", "tokens", "chunk", "query tiles", "stash", "offload", "tile size"):
        table.add_column(name)
    for name in ("device GiB", "host GiB"):
        table.add_column(name, justify="right")
    table.add_column("peak")
    if wanted is None:
        table.add_row("this job", _method(job), f"{job.length:,}", "does not fit")
        table.caption = explain_nothing_fits(job, budget)
    else:
        table.add_row("this job", *_cells(wanted))
    table.add_section()
    for plan in longest_:
        if plan is not None:
            table.add_row("longest", *_cells(plan))
    return table


def _cells(plan: Plan) -> list[str]:
    job, prediction = plan.job, plan.prediction
    upipe = job.method == "upipe"
    chunk = {"upipe": f"{job.head_chunk} heads", "fpdt": f"{job.sequence_chunk} tokens"}
    return [
        _method(job),
        f"{job.length:,}",
        chunk.get(job.method, ""),
        str(job.query_tiles) if upipe else "",
        job.stash if job.method in STASHING else "",
        "yes" if job.offload else "no",
        str(job.tile_size),
        f"{prediction.device_bytes / GIB:.1f}",
        f"{prediction.host_bytes / GIB:.1f}",
        prediction.moment,
    ]


def _method(job: JobShape) -> str:
    return job.method if job.ring == 1 or job.ulysses == 1 else f"{job.method} {job.ulysses} x ring {job.ring}"


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise ValueError(f"--write {path}: {error.strerror}; choose another file.") from error


def planned(job_args: Sequence[str], plan: Plan) -> str:
    """The text of the job's file with the plan's settings; what else the command line says does not go there."""
    source = config_file(job_args)
    values: dict[str, Any] = tomllib.loads(Path(source).read_text()) if source else {}
    for section, settings in settings_of(plan).items():
        values.setdefault(section, {}).update(settings)
    return job_text(values)


if __name__ == "__main__":
    sys.exit(main())
