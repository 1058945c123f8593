"""``python -m torchtitan_upipe.plan --job.config_file X --device h100-80gb --host-memory 2TiB [--world-size 8]``.

Says which settings train the job fastest, how long a context each method can train, and with which settings: memory by
the ledger, seconds by the model of time (``memory/``).
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console
from rich.table import Table

import torchtitan_upipe.titan.specs  # noqa: F401  (registers the models)
from torchtitan_upipe.device import SIMULATED
from torchtitan_upipe.job.load import config_file, split_options
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.job.shape import JobShape, job_shape, needed_ranks
from torchtitan_upipe.job.write import command_line_fields, job_text, put
from torchtitan_upipe.launch import refuse
from torchtitan_upipe.memory.axes import settings_of
from torchtitan_upipe.memory.planner import Budget, Plan, Planner, methods
from torchtitan_upipe.memory.prediction import GIB
from torchtitan_upipe.memory.rates import Rates, known_devices, measured_rates, rates_of
from torchtitan_upipe.memory.remedies import explain_nothing_fits, faster_batch
from torchtitan_upipe.memory.step_time import Machine

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    f"{letter}iB": 2 ** (10 * i) for i, letter in enumerate("KMGT", 1)
}


@dataclass(frozen=True)
class Options:
    """Longest contexts and best settings for given memory. All other options are the job's."""

    device: str = ""
    """The device, whose memory and rates are known: h100-80gb, h200, a100-40gb, a100-80gb or b200."""

    device_memory: str = ""
    """Memory of one device, e.g. 80GiB; with --device, where it has another than usual."""

    host_memory: str = "2TiB"
    """Memory of one host."""

    world_size: int = 0
    """Ranks of the job; 0 = as many as its degrees need."""

    ranks_per_host: int = 8
    """Ranks that share a host's memory, at most."""

    reserve: str = "4GiB"
    """Left free on each device: its context, buffers of the communication library, fragmentation."""

    rates: str = ""
    """Lines of `python -m benchmarks.gpu` on such a device, whose rates count in the place of the table's."""

    write: str = ""
    """Write the job file with the settings for the job's own context here."""


def main(args: Sequence[str] | None = None) -> int:
    """Print the table; return the exit code."""
    own_args, job_args = split_options(sys.argv[1:] if args is None else args)
    options = tyro.cli(Options, args=own_args, prog="torchtitan_upipe.plan")
    try:
        config = read_job(job_args, options.world_size, SIMULATED)
        world_size = options.world_size or needed_ranks(config)
        planner = _planner(options, config, world_size)
        job = job_shape(config, world_size)
        wanted = planner.fastest(job)
        if options.write:
            if wanted is None:
                raise ValueError(explain_nothing_fits(job, planner))
            _write(options.write, planned(job_args, config, wanted, world_size))
    except ValueError as error:
        return refuse(error)
    console = wide_console(220)
    table = _Table(config, world_size, planner)
    console.print(table.of(wanted, job, [planner.longest(shape) for shape in methods(job)]))
    if options.write:
        console.print(f"Wrote {options.write}")
    return 0


def wide_console(width: int) -> Console:
    """Standard output; in a file or a pipe, which have no width of their own, of ``width`` columns."""
    console = Console()
    if not console.is_terminal:
        console.width = width
    return console


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


def _planner(options: Options, config: JobConfig, world_size: int) -> Planner:
    if options.ranks_per_host < 1:
        raise ValueError(f"--ranks-per-host {options.ranks_per_host} must be at least 1.")
    rates = _rates(options)
    device = parse_bytes(options.device_memory) if options.device_memory else rates.memory
    if device <= parse_bytes(options.reserve):
        raise ValueError(
            f"--reserve {options.reserve} leaves nothing of the {device / GIB:.1f} GiB of a device; lower it."
        )
    host = parse_bytes(options.host_memory) / min(world_size, options.ranks_per_host)
    budget = Budget(device - parse_bytes(options.reserve), host)
    return Planner(budget, Machine(rates, options.ranks_per_host, config.context_parallel.attention_kernel))


def _rates(options: Options) -> Rates:
    devices = ", ".join(known_devices())
    if not options.device and not options.device_memory:
        raise ValueError(f"name the device with --device ({devices}), or its memory with --device-memory.")
    if options.device and options.device not in known_devices():
        raise ValueError(f"--device {options.device} is not in the table; choose one of {devices}, or --device-memory.")
    rates = rates_of(options.device or "unnamed device")
    return measured_rates(Path(options.rates), rates) if options.rates else rates


COLUMNS = (
    "", "method", "tokens", "chunk", "query tiles", "stash", "checkpoint", "tile size", "state on",
    "s a step", "tokens/s a device", "limited by", "device GiB", "host GiB", "most of it", "peak",
)  # fmt: skip


@dataclass(frozen=True)
class _Table:
    """What is printed."""

    config: JobConfig
    world_size: int
    planner: Planner

    def of(self, wanted: Plan | None, job: JobShape, longest: Sequence[Plan | None]) -> Table:
        """The settings for the job's own context, or why there are none, and the longest contexts."""
        config, budget = self.config, self.planner.budget
        table = Table(
            title=f"{config.model.name} {config.model.flavor} on {self.world_size} ranks, {budget.device / GIB:.1f} "
            f"GiB of each device and {budget.host / GIB:.0f} GiB of host memory a rank"
        )
        for name in COLUMNS:
            table.add_column(name)
        if wanted is None:
            table.add_row("this job", _method(job), f"{job.length:,}", "does not fit")
        else:
            table.add_row("this job", *self._cells(wanted))
        table.add_section()
        for plan in longest:
            if plan is not None:
                table.add_row("longest", *self._cells(plan))
        table.caption = "\n".join(self._notes(wanted, job))
        return table

    def _notes(self, wanted: Plan | None, job: JobShape) -> Iterator[str]:
        rates = self.planner.machine.rates
        if wanted is None:
            yield explain_nothing_fits(job, self.planner)
        elif (sentence := faster_batch(wanted, self.planner)) is not None:
            yield sentence
        who = f"{rates.stand_in}, since no --device is named" if rates.stand_in else rates.name
        yield f"Predicted, not measured: memory by the ledger, time by docs/time.md with the rates of {who}."

    def _cells(self, plan: Plan) -> list[str]:
        job, prediction, time = plan.job, plan.prediction, plan.time
        chunk = {"upipe": f"{job.head_chunk} heads", "fpdt": f"{job.sequence_chunk} tokens"}
        category = max(prediction.by_category, key=lambda name: prediction.by_category[name])
        return [
            _method(job),
            f"{job.length:,}",
            chunk.get(job.method, ""),
            str(job.query_tiles) if job.method == "upipe" else "",
            _stash(job),
            ("full, offload" if job.offload else "full") if job.checkpoint else "none",
            str(job.tile_size),
            "host" if job.state_on_host else "device",
            f"{time.seconds * self._micro_batches():,.1f}",
            f"{plan.tokens_per_second:,.1f}",
            f"{time.limit} {time.parts[time.limit] / time.seconds:.0%}",
            f"{prediction.device_bytes / GIB:.1f}",
            f"{prediction.host_bytes / GIB:.1f}",
            f"{category} {prediction.by_category[category] / GIB:.1f}",
            prediction.moment,
        ]

    def _micro_batches(self) -> int:
        """Of a step, one after the other."""
        training = self.config.training
        at_once = training.local_batch_size * self.world_size // self.config.parallelism.context_parallel_degree
        return max(training.global_batch_size // at_once, 1)


def _stash(job: JobShape) -> str:
    if not job.staged:
        return ""
    layers = sum(job.stash_of(layer) != "none" for layer in range(job.model.layers))
    return job.stash if layers in (0, job.model.layers) else f"{job.stash}, {layers} of {job.model.layers} layers"


def _method(job: JobShape) -> str:
    return job.method if job.ring == 1 or job.ulysses == 1 else f"{job.method} {job.ulysses} x ring {job.ring}"


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise ValueError(f"--write {path}: {error.strerror}; choose another file.") from error


def planned(job_args: Sequence[str], config: JobConfig, plan: Plan, world_size: int) -> str:
    """The text of a job file: the job of the command line, read to ``config``, with the plan's settings.

    Raises:
        ValueError: that file would not be read as the plan.
    """
    source = config_file(job_args)
    values: dict[str, Any] = tomllib.loads(Path(source).read_text()) if source else {}
    for name in command_line_fields(job_args):
        if name != "job.config_file":
            put(values, name, config)
    for section, settings in settings_of(plan.job).items():
        values.setdefault(section, {}).update(settings)
    values["context_parallel"].pop("settings", None)
    text = job_text(values)
    with TemporaryDirectory() as folder:
        path = Path(folder, "job.toml")
        path.write_text(text)
        read = job_shape(read_job(["--job.config_file", str(path)], world_size, SIMULATED), world_size)
    if read != plan.job:
        raise ValueError(f"the planned settings, written to a file, would be read as {read}; nothing was written.")
    return text


if __name__ == "__main__":
    sys.exit(main())
