"""``torchrun ... -m torchtitan_upipe.extend --recipe F``: a pretrained model's context grows, stage by stage.

F is a job with tables ``[[stage]]`` (docs/recipes.md). Each stage begins with the last one's weights and ends with an
evaluation, if it has a gate. Started again, the command goes on where it was; ``--dry-run`` only says what would be
done. The same command is started on every node; the dump folder is shared.

A stage runs in a process of its own: a rank whose stage has ended begins anew (``turns.py``).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from rich.table import Table

from torchtitan_upipe.device import SIMULATED, leave, refuse_idle_gpus
from torchtitan_upipe.job.load import split_options
from torchtitan_upipe.job.model import job_rope, model_args
from torchtitan_upipe.job.progress import Task, finish, finished, newest_step, next_task
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.job.recipe import Stage, named, read_recipe
from torchtitan_upipe.launch import fail, refuse, stand_alone
from torchtitan_upipe.memory.forecast import Forecast, forecast, named_place
from torchtitan_upipe.memory.prediction import GIB
from torchtitan_upipe.memory.rates import known_devices
from torchtitan_upipe.plan import parse_bytes, wide_console
from torchtitan_upipe.titan.command import run_or_explain
from torchtitan_upipe.titan.console import init_console
from torchtitan_upipe.titan.trainer import evaluate_job, run_job
from torchtitan_upipe.turns import Turn

logger = logging.getLogger()  # TorchTitan's


@dataclass(frozen=True)
class Options:
    """Extend a model's context by a recipe. All other options are the job's, and count for every stage."""

    recipe: str
    """A TOML file: a job, and tables [[stage]]."""

    dry_run: bool = False
    """Start nothing: show each stage's length, memory, predicted time and tokens. Needs no device."""

    device: str = "h100-80gb"
    """Dry run: the device, whose memory and rates are known: h100-80gb, h200, a100-40gb, a100-80gb or b200."""

    host_memory: str = "2TiB"
    """Dry run: memory of one host."""

    ranks_per_host: int = 8
    """Dry run: ranks that share it, at most."""

    world_size: int = 0
    """Dry run: ranks of the job; 0 = as many as each stage's degrees need."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the recipe's next stage, and those after it in further turns; return the exit code."""
    turn = Turn()
    own_args, job_args = split_options(sys.argv[1:] if args is None else args)
    options = tyro.cli(Options, args=own_args, prog="torchtitan_upipe.extend")
    if options.dry_run:
        return dry_run(options, job_args)
    stand_alone()
    init_console()
    try:
        refuse_idle_gpus()
        stages = read_recipe(options.recipe, job_args, int(os.environ["WORLD_SIZE"]))
        task: Task | None = turn.agree(lambda: next_task(stages))
        if task is None:
            logger.info(f"All {len(stages)} stages are finished; the last one's weights: {stages[-1].last_checkpoint}")
            return 0
        config = read_job(["--job.config_file", task["job_file"]])
    except ValueError as error:
        return refuse(error)
    logger.info(_beginning(stages, task))
    work, stage = task["work"], task["stage"]

    def do() -> None:
        if work == "train":
            run_job(config)
        elif work == "evaluate":
            evaluate_job(config)

    return run_or_explain(config, do) or _close(turn, stages, stage)


def _close(turn: Turn, stages: Sequence[Stage], index: int) -> int:
    """End a stage; go on with the next one."""
    try:
        if not turn.agree(lambda: finish(stages, index)):
            logger.info(f"{stages[index].place}: stopped before its last step; the same command goes on with it.")
            return 0
    except ValueError as error:
        return fail(f"ValueError: {error}")
    logger.info(f"{stages[index].place}: finished ({stages[index].last_checkpoint})")
    if index + 1 < len(stages):
        turn.next()
    return 0


def _beginning(stages: Sequence[Stage], task: Task) -> str:
    stage, training = stages[task["stage"]], stages[task["stage"]].config.training
    does = {"train": "trains", "evaluate": "has trained and is evaluated", "judge": "has trained and been evaluated"}
    return (
        f"{stage.place} ({stage.number} of {len(stages)}): {does[task['work']]}, {training.steps} steps of "
        f"{training.seq_len} tokens a sequence; {task['job_file']}"
    )


def dry_run(options: Options, job_args: Sequence[str]) -> int:
    """Print the table of stages; return the exit code, 1 if one of them does not fit."""
    forecasts: list[Forecast] = []
    try:
        if options.device not in known_devices():
            raise ValueError(f"--device {options.device} is not in the table; choose {', '.join(known_devices())}.")
        if options.ranks_per_host < 1 or options.world_size < 0:
            raise ValueError("--ranks-per-host must be at least 1, and --world-size at least 0.")
        place = named_place(options.device, parse_bytes(options.host_memory), options.ranks_per_host)
        stages = read_recipe(options.recipe, job_args, options.world_size, SIMULATED)
        for stage in stages:
            with named(stage.place):
                forecasts.append(forecast(stage.config, options.world_size, place))
    except ValueError as error:
        return refuse(error)
    wide_console(200).print(_table(options, stages, forecasts))
    lacking = [
        f"{stage.place}: {found.lacking}" for stage, found in zip(stages, forecasts, strict=True) if found.lacking
    ]
    print(*(f"ValueError: {sentence}" for sentence in lacking), sep="\n", end="\n" * bool(lacking), file=sys.stderr)
    return 1 if lacking else 0


COLUMNS = (
    "stage", "length", "RoPE", "lr", "optimizer", "data", "batch", "steps", "tokens", "method",
    "device GiB", "host GiB", "s a step", "hours", "now",
)  # fmt: skip


def _table(options: Options, stages: Sequence[Stage], forecasts: Sequence[Forecast]) -> Table:
    table = Table(title=f"{options.recipe}: {stages[0].config.model.name} {stages[0].config.model.flavor}")
    for name in COLUMNS:
        table.add_column(name)
    tokens, hours = 0, 0.0
    for stage, found in zip(stages, forecasts, strict=True):
        training = stage.config.training
        of_stage = training.steps * found.batch * training.seq_len
        tokens, hours = tokens + of_stage, hours + training.steps * found.step_seconds / 3600
        job, prediction = found.plan.job, found.plan.prediction
        table.add_row(
            stage.name,
            f"{training.seq_len:,}",
            _rope(stage),
            f"{stage.config.optimizer.lr:g}",
            stage.optimizer_state,
            training.dataset + (", masked" if training.document_mask else ""),
            str(found.batch),
            f"{training.steps:,}",
            f"{of_stage:,}",
            f"{job.method}, {job.head_chunk} heads" if job.method == "upipe" else job.method,
            f"{prediction.device_bytes / GIB:.1f}",
            f"{prediction.host_bytes / GIB:.1f}",
            f"{found.step_seconds:.3g}",
            f"{training.steps * found.step_seconds / 3600:.3g}",
            "finished" if finished(stage) else f"step {step}" if (step := newest_step(stage)) else "",
        )
    table.add_section()
    table.add_row("all", *[""] * 7, f"{tokens:,}", *[""] * 4, f"{hours:.3g}", "")
    table.caption = (
        f"Predicted, not measured, for {options.device}: memory of a rank by the ledger, time by docs/time.md, without "
        "evaluations and checkpoints."
    )
    return table


def _rope(stage: Stage) -> str:
    rope = job_rope(stage.config, model_args(stage.config))
    return f"theta {rope.theta:g}" + ("" if rope.type == "none" else f", {rope.type} x {rope.factor:g}")


if __name__ == "__main__":
    leave(main())
