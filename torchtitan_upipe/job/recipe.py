"""A recipe: one TOML file with a job and tables ``[[stage]]``, in which its model's context grows.

Beside :data:`OWN` fields a stage holds sections of a job, which count for this stage alone: ``[stage.optimizer]`` with
``lr = 1e-5``, or ``optimizer.lr = 1e-5``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from torchtitan.config import JobConfig
from torchtitan.tools.utils import device_type

from torchtitan_upipe.job.gate import Gate, read_gate
from torchtitan_upipe.job.load import load_config, read_toml
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.job.shape import needed_ranks
from torchtitan_upipe.job.write import command_line_fields, job_text, put

OWN = ("name", "tokens", "optimizer_state", "gate")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# what the recipe says of every stage itself
ALWAYS = {"enable": True, "load_only": False, "load_step": -1, "create_seed_checkpoint": False}
BY_RECIPE = (*(f"checkpoint.{name}" for name in ALWAYS), "checkpoint.exclude_from_loading")
OF_THE_BASE = ("job", "model.name", "model.flavor", "model.hf_assets_path", "checkpoint.folder")
START = ("initial_load_path", "initial_load_in_hf", "initial_load_in_hf_quantized", "initial_load_model_only")
Values = dict[str, Any]  # of a job file, by section


@dataclass(frozen=True)
class Stage:
    """One stage, as its job will be.

    Attributes:
        number: from 1.
        name: unlike any other stage's.
        place: how a sentence names it: file and stage.
        values: its job file, but for what it loads and, where ``tokens`` says it, ``training.steps``.
        tokens: that it trains on; 0 = ``training.steps`` says it.
        optimizer_state: whether the optimizer goes on with the moments of the stage before.
        gate: what its evaluation must reach.
        config: its job, checked.
    """

    number: int
    name: str
    place: str
    values: Values
    tokens: int = 0
    optimizer_state: Literal["fresh", "carried"] = "fresh"
    gate: Gate = field(default_factory=Gate)
    config: JobConfig = field(default_factory=JobConfig)

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return Path(self.values["job"]["dump_folder"])

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint that it ends with."""
        return self.folder / self.config.checkpoint.folder / f"step-{self.config.training.steps}"


@contextmanager
def named(place: str) -> Iterator[None]:
    """Within, a ValueError begins with ``place``."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {str(error).removeprefix(f'{place}: ')}") from error


def read_recipe(path: str, job_args: Sequence[str], world_size: int, device: str = device_type) -> list[Stage]:
    """The stages of a file, each with a job that can run.

    Args:
        job_args: fields of the job on the command line, which count for every stage.
        world_size: ranks; 0 = as many as each stage's degrees need.
        device: type of the device that the jobs are meant for.

    Raises:
        ValueError: one sentence with the file, the stage, the field, and what to do.
    """
    values = read_toml(path)
    tables, from_scratch = values.pop("stage", None), values.pop("from_scratch", False)
    with named(path):
        if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
            raise ValueError("a recipe has tables [[stage]], one after another, and this file has none.")
        on_top = _command_line(values, job_args)
        _check_base(_merged(values, on_top), from_scratch)
    stages: list[Stage] = []
    for stage in [_read_stage(path, number, table, values, on_top) for number, table in enumerate(tables, 1)]:
        with named(stage.place):
            ready = replace(stage, config=_job_of(stage, world_size, device))
            ready.values["training"]["steps"] = ready.config.training.steps
            _check_order(ready, stages)
            ready.gate.check(ready.config, stages[0].config if stages else None)
        stages.append(ready)
    return stages


def start_of(stage: Stage, before: Stage | None, begun: int) -> Values:
    """The job file of ``stage`` as it starts.

    Args:
        before: the stage before, which has left its last checkpoint.
        begun: the step of the stage's own newest checkpoint; 0 = it has none.
    """
    values = deepcopy(stage.values)
    checkpoint = values["checkpoint"]
    if begun:
        for key in START:
            checkpoint.pop(key, None)
        checkpoint["load_step"] = begun
    elif before is not None:
        checkpoint["initial_load_path"] = str(before.last_checkpoint)
        checkpoint["initial_load_in_hf"] = before.config.checkpoint.last_save_in_hf
        if stage.optimizer_state == "carried":
            checkpoint["initial_load_model_only"] = False
            checkpoint["exclude_from_loading"] = ["train_state", "lr_scheduler", "dataloader"]
    return values


def _command_line(values: Values, job_args: Sequence[str]) -> Values:
    """The fields of the command line, of the types that the job has."""
    fields, on_top = list(command_line_fields(job_args)), Values()
    if "job.config_file" in fields:
        raise ValueError("--job.config_file has no meaning here, since the recipe is the job file; remove it.")
    if not fields:
        return on_top
    with _job_file(values) as file:
        config = load_config(["--job.config_file", file, *job_args])
    for name in fields:
        put(on_top, name, config)
    return on_top


def _check_base(base: Values, from_scratch: object) -> None:
    checkpoint = base.get("checkpoint", {})
    for name in BY_RECIPE:
        if name.partition(".")[2] in checkpoint:
            raise ValueError(f"{name} is what the recipe says itself for each of its stages; remove it.")
    if not checkpoint.get("initial_load_model_only", True):
        raise ValueError(
            "checkpoint.initial_load_model_only = false: the first stage has a fresh optimizer; remove it."
        )
    if not isinstance(from_scratch, bool):
        raise ValueError(f"from_scratch = {from_scratch!r} must be true or false.")
    weights = bool(checkpoint.get("initial_load_path") or checkpoint.get("initial_load_in_hf"))
    if weights == from_scratch:
        raise ValueError(
            "from_scratch = true begins with random weights, and [checkpoint] names others; remove one."
            if weights
            else "it names no weights to begin with; set checkpoint.initial_load_in_hf = true (those in "
            "model.hf_assets_path), checkpoint.initial_load_path, or from_scratch = true above all sections."
        )


def _read_stage(path: str, number: int, table: Values, base: Values, on_top: Values) -> Stage:
    """``table``, on top of the recipe's own sections; its job is not read yet."""
    name = table.get("name")
    place = f"{path}, stage {name!r}" if isinstance(name, str) else f"{path}, stage {number}"
    with named(place):
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"name = {name!r} must be a word, of which its folder is named.")
        sections = {key: value for key, value in table.items() if key not in OWN}
        for key, value in sections.items():
            if not isinstance(value, dict):
                hint = f'; write optimizer_state = "{value}"' if key == "optimizer" else ""
                raise ValueError(f"{key} = {value!r} is no section of a job and none of {', '.join(OWN)}{hint}.")
            for field_name in value:
                full = f"{key}.{field_name}"
                if key in OF_THE_BASE or full in (*OF_THE_BASE, *BY_RECIPE, *(f"checkpoint.{s}" for s in START)):
                    raise ValueError(f"{full} is the same for all stages, or what the recipe says itself; remove it.")
        tokens, state = table.get("tokens", 0), table.get("optimizer_state", "fresh")
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < ("tokens" in table):
            raise ValueError(f"tokens = {tokens!r} must be a positive whole number.")
        if state not in ("fresh", "carried"):
            raise ValueError(f'optimizer_state = {state!r} must be "fresh" or "carried".')
        gate = read_gate(table.get("gate", {}))
        values = _merged(base, sections, on_top)
        _check_duration(values, sections, tokens)
    checkpoint, job = values.setdefault("checkpoint", {}), values.setdefault("job", {})
    checkpoint.update(ALWAYS)
    if number > 1:
        for key in START:
            checkpoint.pop(key, None)
    job["dump_folder"] = str(Path(job.get("dump_folder", "./outputs")) / f"{number:02}-{name}")
    return Stage(number, name, place, values, tokens, state, gate)


def _check_duration(values: Values, sections: Values, tokens: int) -> None:
    if tokens and "steps" in sections.get("training", {}):
        raise ValueError(f"tokens = {tokens} and training.steps both say how long it trains; remove one.")
    if not tokens and "steps" not in values.get("training", {}):
        raise ValueError("it does not say how long it trains; set tokens or training.steps.")
    values.setdefault("training", {})
    if tokens:
        values["training"]["steps"] = 1  # until the batch is known


def _job_of(stage: Stage, world_size: int, device: str) -> JobConfig:
    """The job of a stage, whose steps are known; what it loads is looked at when it starts."""
    checkpoint = {key: value for key, value in stage.values["checkpoint"].items() if key not in START}
    with _job_file({**stage.values, "checkpoint": checkpoint}) as file:
        config = read_job(["--job.config_file", file], world_size, device)
    if not stage.tokens:
        return config
    training, batch = config.training, config.training.global_batch_size
    if batch < 0:
        ranks = world_size or needed_ranks(config)
        batch = training.local_batch_size * (ranks // config.parallelism.context_parallel_degree)
    step = batch * training.seq_len
    if stage.tokens % step:
        near = max(stage.tokens // step, 1) * step
        raise ValueError(
            f"tokens = {stage.tokens} must be a multiple of a step's {step} (a batch of {batch} sequences of "
            f"training.seq_len = {training.seq_len}); nearest: {near} or {near + step}."
        )
    training.steps = stage.tokens // step
    return config


def _check_order(stage: Stage, earlier: Sequence[Stage]) -> None:
    if any(stage.name == other.name for other in earlier):
        raise ValueError("two stages have this name; give each its own, since their folders are named by it.")
    before = earlier[-1] if earlier else None
    if before is None:
        if stage.optimizer_state == "carried":
            raise ValueError('optimizer_state = "carried": no stage before has an optimizer; remove it.')
        return
    length, last = stage.config.training.seq_len, before.config.training.seq_len
    if length < last:
        raise ValueError(
            f"training.seq_len = {length} is shorter than the {last} of stage {before.name!r} before it; put the "
            "stages in the order of their lengths."
        )
    if stage.optimizer_state == "carried":
        checkpoint = before.config.checkpoint
        if checkpoint.last_save_in_hf:
            raise ValueError(
                f'optimizer_state = "carried": stage {before.name!r} before it ends with checkpoint.last_save_in_hf = '
                "true, a model alone; remove one."
            )
        checkpoint.last_save_model_only = before.values["checkpoint"]["last_save_model_only"] = False


@contextmanager
def _job_file(values: Values) -> Iterator[str]:
    """``values`` as a file, of which no sentence speaks."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "job.toml")
        file.write_text(job_text(values))
        try:
            yield str(file)
        except ValueError as error:
            raise ValueError(str(error).removeprefix(f"{file}: ")) from error


def _merged(*layers: Values) -> Values:
    """Sections of all ``layers``, field by field; later ones count."""
    merged: Values = {}
    for layer in layers:
        for key, value in layer.items():
            under = merged.get(key)
            merged[key] = (
                _merged(under, value) if isinstance(under, dict) and isinstance(value, dict) else deepcopy(value)
            )
    return merged
