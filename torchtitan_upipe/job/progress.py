"""How far the stages of a recipe are, by what is on disk; one rank looks, and says so to the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from torchtitan_upipe.job.recipe import Stage, Values, named, start_of
from torchtitan_upipe.job.results import read_results, results_path
from torchtitan_upipe.job.steps import finished_steps, is_finished
from torchtitan_upipe.job.write import job_text

FINISHED = "finished.json"  # in a stage's folder, once it has passed its gate
JOB_FILE = "job.toml"  # as the stage was started the last time
LEARNT = ("model", "training", "optimizer", "lr_scheduler")  # sections that say what a stage has learnt
HOW = (
    "local_batch_size",
    "enable_cpu_offload",
    "gc_freq",
    "gc_debug",
    "dataloader",
)  # fields of [training] that do not


class Task(TypedDict):
    """What all ranks do next, with the job in ``job_file``.

    ``stage`` counts from 0; ``work`` is what is left of it: all, its evaluation, or only to pass its gate.
    """

    stage: int
    job_file: str
    work: Literal["train", "evaluate", "judge"]


def next_task(stages: Sequence[Stage]) -> Task | None:
    """The first stage that is not finished, whose job file is written; None where all are.

    A folder of checkpoints without a whole one, which a run that was killed leaves, is removed.

    Raises:
        ValueError: finished stages and the recipe do not go together, or a checkpoint to begin with is gone.
    """
    _check_finished(stages)
    index = next((i for i, stage in enumerate(stages) if not finished(stage)), None)
    if index is None:
        return None
    stage, before = stages[index], stages[index - 1] if index else None
    begun = newest_step(stage)
    checkpoints = stage.folder / stage.config.checkpoint.folder
    if not begun and checkpoints.exists():
        shutil.rmtree(checkpoints)
    if not begun and before is not None and not is_finished(before.last_checkpoint):
        raise ValueError(
            f"{stage.place}: it begins with {before.last_checkpoint}, the last checkpoint of stage {before.name!r}, "
            f"which is gone; bring it back, or remove {before.folder} to train that stage again."
        )
    file = stage.folder / JOB_FILE
    _write(file, job_text(start_of(stage, before, begun)))
    trained = begun >= stage.config.training.steps
    return {
        "stage": index,
        "job_file": str(file),
        "work": "train" if not trained else "judge" if _evaluated(stage) else "evaluate",
    }


def finish(stages: Sequence[Stage], index: int) -> bool:
    """Mark a stage that has trained and passed its gate as finished; whether it has come to its end.

    Raises:
        ValueError: the gate's threshold and what was measured.
    """
    stage = stages[index]
    if not is_finished(stage.last_checkpoint) or not _evaluated(stage):
        return False
    results = [
        read_results(results_path(one.config, one.config.training.steps)) if one.config.evaluation.enable else None
        for one in (stage, stages[0])
    ]
    if results[0] is not None:
        with named(stage.place):
            if shortfalls := list(stage.gate.shortfalls(results[0], results[1] if index else None)):
                raise ValueError(
                    f"it has not passed its gate: {'; '.join(shortfalls)}; train it longer or otherwise (remove "
                    f"{stage.folder}), or change the threshold."
                )
    _write(stage.folder / FINISHED, json.dumps({"stage": stage.name, "learnt": _learnt(stage)}, indent=2) + "\n")
    return True


def finished(stage: Stage) -> bool:
    """Whether a stage has passed its gate."""
    return (stage.folder / FINISHED).is_file()


def _evaluated(stage: Stage) -> bool:
    return not stage.config.evaluation.enable or results_path(stage.config, stage.config.training.steps).exists()


def newest_step(stage: Stage) -> int:
    """The step of its newest whole checkpoint; 0 = there is none."""
    return max(finished_steps(stage.folder / stage.config.checkpoint.folder), default=0)


def _check_finished(stages: Sequence[Stage]) -> None:
    dump = stages[0].folder.parent
    path = stages[0].place.partition(", stage ")[0]
    folders = {stage.folder for stage in stages}
    for marker in sorted(dump.glob(f"[0-9][0-9]-*/{FINISHED}")):
        if marker.parent not in folders:
            raise ValueError(
                f"{path}: {marker.parent} holds a finished stage that is not in the recipe at this place; bring it "
                "back, or choose another job.dump_folder."
            )
    for stage, before in zip(stages, [None, *stages], strict=False):
        if not finished(stage):
            continue
        if before is not None and not finished(before):
            raise ValueError(
                f"{stage.place}: it is finished, and stage {before.name!r} before it is not; remove {stage.folder} to "
                "train it again, or choose another job.dump_folder."
            )
        with named(stage.place):
            _check_unchanged(stage)


def _check_unchanged(stage: Stage) -> None:
    marker = stage.folder / FINISHED
    try:
        was: Values = json.loads(marker.read_text())["learnt"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{marker} is damaged ({error}); remove it to evaluate the stage again.") from error
    now = json.loads(json.dumps(_learnt(stage)))
    changed = [name for name in sorted({*was, *now}) if was.get(name) != now.get(name)]
    if changed:
        fields = ", ".join(f"{name} = {now.get(name)!r} was {was.get(name)!r}" for name in changed)
        raise ValueError(
            f"it is finished, and the recipe says otherwise now: {fields}; undo that, remove {stage.folder} and those "
            "of later stages to train again, or choose another job.dump_folder."
        )


def _learnt(stage: Stage) -> Values:
    """The fields that say what it has learnt, by full name."""
    fields = {name: value for section in LEARNT for name, value in _flat(section, stage.values.get(section, {}))}
    if stage.tokens:
        fields |= {"training.steps": None, "tokens": stage.tokens}  # the steps follow from the batch
    without = {f"training.{name}" for name in HOW}
    kept = {name: value for name, value in fields.items() if not name.startswith(tuple(without))}
    return kept | {"optimizer_state": stage.optimizer_state}


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield prefix, value
        return
    for name, inner in value.items():
        yield from _flat(f"{prefix}.{name}", inner)


def _write(path: Path, text: str) -> None:
    """The file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text)
    unfinished.replace(path)
