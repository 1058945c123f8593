"""Recipes: what a file may say, where stages go on, what a gate lets through, and runs that are killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from tests.jobs import ROOT, read_log
from tests.ranks import RankError, preload, run_ranks
from tests.test_command import torchrun
from torchtitan_upipe.device import SIMULATED
from torchtitan_upipe.extend import main
from torchtitan_upipe.job.gate import Gate
from torchtitan_upipe.job.progress import FINISHED, finish, next_task
from torchtitan_upipe.job.recipe import Stage, read_recipe
from torchtitan_upipe.job.results import Results, results_path

preload("torchtitan_upipe.extend")

BASE = f"""
from_scratch = true
[job]
dump_folder = "DUMP"
[experimental]
custom_import = "torchtitan_upipe.train_spec"
[model]
name = "llama3_upipe"
flavor = "debug_kv2"
hf_assets_path = "{ROOT}/torchtitan_upipe/assets/tokenizer"
[training]
dataset = "stdlib"
local_batch_size = 2
mixed_precision_param = "float32"
[parallelism]
context_parallel_degree = 2
[metrics]
log_freq = 1
enable_tensorboard = true
[checkpoint]
interval = 2
[debug]
seed = 0
"""
SHORT = """
[[stage]]
name = "short"
training.seq_len = 64
training.steps = 3
optimizer.lr = 1e-2
lr_scheduler.warmup_steps = 1
"""
LONG = """
[[stage]]
name = "long"
tokens = 1024
optimizer_state = "carried"
training.seq_len = 128
training.document_mask = true
model.rope_theta = 4e4
optimizer.lr = 1e-3
optimizer.weight_decay = 0.2
lr_scheduler.warmup_steps = 2
"""
GATED = "[evaluation]\nenable = true\nneedle_lengths = [64]\nloss_lengths = [64]\n"


def write(folder: Path, *parts: str) -> str:
    path = folder / "recipe.toml"
    path.write_text("".join(parts).replace("DUMP", str(folder / "out")))
    return str(path)


def stages_of(folder: Path, *parts: str) -> list[Stage]:
    return read_recipe(write(folder, *parts), [], 2, "cpu")


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_stage_is_the_job_with_its_own_fields(tmp_path: Path) -> None:
    short, long = read_recipe(write(tmp_path, BASE, SHORT, LONG), ["--optimizer.eps", "1e-6"], 2, "cpu")
    assert (short.config.training.steps, long.config.training.steps) == (3, 4)  # of 2 x 128 tokens
    assert (short.config.training.document_mask, long.config.training.document_mask) == (False, True)
    assert [stage.config.optimizer.lr for stage in (short, long)] == [1e-2, 1e-3]
    assert [stage.config.optimizer.eps for stage in (short, long)] == [1e-6, 1e-6]
    assert [stage.folder.name for stage in (short, long)] == ["01-short", "02-long"]
    assert not short.config.checkpoint.last_save_model_only  # the second carries its optimizer
    assert long.config.checkpoint.last_save_model_only


@pytest.mark.parametrize(
    "parts, sentence",
    [
        ((BASE,), r"recipe.toml: a recipe has tables \[\[stage\]\]"),
        ((BASE, "[[stage"), r"recipe.toml' is not valid TOML"),
        ((BASE, SHORT.replace('"short"', '"a/b"')), r"recipe.toml, stage 'a/b': name = 'a/b' must be a word"),
        ((BASE, SHORT.replace('name = "short"', "")), r"recipe.toml, stage 1: name = None must be a word"),
        ((BASE, SHORT, SHORT), r"stage 'short': two stages have this name"),
        ((BASE, LONG.replace('"carried"', '"fresh"'), SHORT), r"stage 'short': training.seq_len = 64 is shorter than"),
        ((BASE, SHORT, "wieght = 1"), r"stage 'short': wieght = 1 is no section of a job"),
        ((BASE, SHORT, "optimizer.rl = 1"), r"stage 'short': unknown field optimizer.rl; the nearest .* optimizer.lr"),
        ((BASE, SHORT.replace("3", "'3'")), r"stage 'short': training.steps = '3' is not of type int"),
        ((BASE, SHORT.replace("training.steps = 3", 'optimizer_state = "x"')), r"optimizer_state = 'x' must be"),
        ((BASE, SHORT.replace("training.steps = 3", "")), r"does not say how long it trains; set tokens"),
        ((BASE, SHORT, "tokens = 128"), r"tokens = 128 and training.steps both say how long"),
        ((BASE, SHORT, LONG.replace("1024", "1000")), r"tokens = 1000 must be a multiple of .* nearest: 768 or 1024"),
        ((BASE, LONG), r"stage 'long': optimizer_state = \"carried\": no stage before has an optimizer"),
        ((BASE, SHORT, "checkpoint.last_save_in_hf = true", LONG), r"carried.: stage 'short' before it ends with"),
        ((BASE, SHORT, "model.flavor = 'debug'"), r"model.flavor is the same for all stages"),
        ((BASE, SHORT, "checkpoint.load_step = 2"), r"checkpoint.load_step is the same for all stages"),
        ((BASE.replace("interval = 2", "load_only = true"), SHORT), r"recipe.toml: checkpoint.load_only is what the"),
        ((BASE.replace("from_scratch = true", ""), SHORT), r"recipe.toml: it names no weights to begin with"),
        ((BASE.replace("interval = 2", "initial_load_path = 'x'"), SHORT), r"from_scratch = true begins with random"),
        ((BASE.replace("seed = 0", "sede = 0"), SHORT), r"recipe.toml, stage 'short': unknown field debug.sede"),
        ((BASE, SHORT, "gate = 1"), r"stage 'short': gate = 1 must be a table"),
        ((BASE, SHORT, "gate.loss = 1"), r"unknown field gate.loss; known are needle_exact_match"),
        ((BASE, SHORT, "gate.loss_at = 2.0"), r"gate.loss_at = 2.0 must be a table of lengths"),
        ((BASE, SHORT, "gate.needle_exact_match = true"), r"gate.needle_exact_match = True must be a number"),
        ((BASE, SHORT, "gate.needle_exact_match = 0.9"), r"gate: no evaluation measures needles; set evaluation.enabl"),
        ((BASE, GATED, SHORT, "gate.needle_exact_match = 1.5"), r"needle_exact_match = 1.5 must be a share"),
        ((BASE, GATED, SHORT, "gate.needle_log_probability = 0.5"), r"must be finite and below 0"),
        ((BASE, GATED, SHORT, "gate.loss_at = { 32 = 2.0 }"), r"gate.loss_at.32: no evaluation of this stage measures"),
        ((BASE, GATED, SHORT, "gate.loss_increase = { 64 = 0.1 }"), r"compares with the first stage, which this"),
        ((BASE, GATED, SHORT, LONG, "gate.loss_increase = { 128 = 0.1 }"), r"no evaluation of the first stage"),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_refused(parts: tuple[str, ...], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        stages_of(tmp_path, *parts)
    assert "\n" not in str(caught.value)
    assert "/job.toml" not in str(caught.value)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the job file 'no.toml'"):
        read_recipe("no.toml", [], 2)
    with pytest.raises(ValueError, match=r"the recipe is the job file"):
        read_recipe(write(tmp_path, BASE, SHORT), ["--job.config_file", "x.toml"], 2)


# --- shipped ---------------------------------------------------------------------------------------------------------

RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.toml") if "[[stage]]" in path.read_text())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_fit(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", str(path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for stage in read_recipe(str(path), [], 0, SIMULATED):
        (row,) = [line for line in printed.splitlines() if line.startswith(f"│ {stage.name} ")]
        assert f" {stage.config.training.seq_len:,} " in row
        assert float(row.split("│")[13]) > 0  # seconds a step


def test_a_dry_run_says_what_does_not_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama = str(ROOT / "recipes/llama3.1_8b_1m.toml")
    chunk = ["--context_parallel.settings", "manual", "--context_parallel.head_chunk", "32"]
    folder = str(tmp_path / "no")
    for options, sentence in (
        (["--host-memory", "1GiB", *chunk], "llama3.1_8b_1m.toml, stage '1m': it needs "),
        (["--device", "x"], "ValueError: --device x is not in the table; choose h100-80gb,"),
        (
            ["--model.flavor", "hf", "--model.hf_assets_path", folder],
            f"'128k': {folder}/config.json does not exist; set",
        ),
    ):
        assert main(["--recipe", llama, "--dry-run", *options]) == 1
        assert sentence in capsys.readouterr().err


# --- what is on disk -------------------------------------------------------------------------------------------------


def checkpoint(stage: Stage, step: int, whole: bool = True) -> Path:
    folder = stage.folder / "checkpoint" / f"step-{step}"
    folder.mkdir(parents=True)
    if whole:
        (folder / ".metadata").touch()
    return folder


def job_file(task: Any) -> dict[str, Any]:
    return tomllib.loads(Path(task["job_file"]).read_text())["checkpoint"]


def test_the_next_task_follows_from_the_folders(tmp_path: Path) -> None:
    stages = stages_of(tmp_path, BASE, SHORT, LONG)
    short, long = stages
    task = next_task(stages)
    assert (task["stage"], task["work"]) == (0, "train")
    assert "initial_load_path" not in job_file(task)
    assert not finish(stages, 0)  # nothing is trained

    broken = checkpoint(short, 2, whole=False)  # killed while the first one was written
    assert next_task(stages) == task
    assert not broken.exists()
    checkpoint(short, 2)
    assert next_task(stages)["work"] == "train"
    assert job_file(next_task(stages))["load_step"] == 2
    checkpoint(short, 3)
    assert next_task(stages)["work"] == "judge"
    assert finish(stages, 0)

    task = next_task(stages)
    assert (task["stage"], task["work"]) == (1, "train")
    assert job_file(task)["initial_load_path"] == str(short.last_checkpoint)
    assert job_file(task)["exclude_from_loading"] == ["train_state", "lr_scheduler", "dataloader"]
    checkpoint(long, 2)
    assert "initial_load_path" not in job_file(next_task(stages))
    assert "exclude_from_loading" not in job_file(next_task(stages))  # its own checkpoint is loaded whole
    checkpoint(long, 4)
    assert finish(stages, 1)
    assert next_task(stages) is None


def test_finished_stages_and_the_recipe_must_go_together(tmp_path: Path) -> None:
    stages = stages_of(tmp_path, BASE, SHORT, LONG)
    for index, step in ((0, 3), (1, 4)):
        checkpoint(stages[index], step)
        finish(stages, index)
    layout = "[context_parallel]\nmethod = 'ulysses'\n"
    assert next_task(stages_of(tmp_path, BASE, layout, SHORT, LONG)) is None  # learns the same
    with pytest.raises(ValueError, match=r"stage 'short': it is finished, .* now: optimizer.lr = 0.02 was 0.01; undo"):
        next_task(stages_of(tmp_path, BASE, SHORT.replace("1e-2", "2e-2"), LONG))
    with pytest.raises(ValueError, match=r"recipe.toml: .*02-long holds a finished stage that is not in the recipe at"):
        next_task(stages_of(tmp_path, BASE, SHORT))
    (stages[0].folder / FINISHED).unlink()
    with pytest.raises(ValueError, match=r"stage 'long': it is finished, and stage 'short' before it is not"):
        next_task(stages)
    (stages[0].folder / FINISHED).write_text("{")
    with pytest.raises(ValueError, match=r"finished.json is damaged .* remove it to evaluate"):
        next_task(stages)
    finish(stages, 0)
    shutil.rmtree(stages[1].folder)
    shutil.rmtree(stages[0].last_checkpoint)
    with pytest.raises(ValueError, match=r"stage 'long': it begins with .*step-3, .* of stage 'short', which is gone"):
        next_task(stages)


# --- the gate --------------------------------------------------------------------------------------------------------


def results(exact: float = 1.0, log_probability: float = -0.1, loss: float = 2.0) -> Results:
    needles: Any = [
        {"length": n, "depth": d, "keys": 1, "trials": 2, "exact_match": e, "log_probability": log_probability}
        for n, d, e in ((64, 0.0, 1.0), (64, 1.0, 1.0), (128, 0.0, 1.0), (128, 1.0, exact))
    ]
    return Results(3, 128, needles, [], {"64": loss, "128": 2.0}, None)


def test_a_gate_asks_for_what_it_says() -> None:
    gate = Gate(needle_exact_match=0.9, needle_log_probability=-0.5, loss_at={64: 2.5}, loss_increase={64: 0.1})
    assert not list(gate.shortfalls(results(), results()))
    assert list(gate.shortfalls(results(exact=0.5), results())) == [
        "needle_exact_match = 0.75 at 128 tokens is below 0.9"
    ]
    assert len(list(gate.shortfalls(results(log_probability=-0.6), results()))) == 2  # both lengths
    assert list(gate.shortfalls(results(loss=2.2), results())) == ["loss_increase.64 = 0.2000 is above 0.1"]
    assert len(list(gate.shortfalls(results(loss=float("nan")), results()))) == 2
    with pytest.raises(ValueError, match="has no loss at 32 tokens; remove its file"):
        list(Gate(loss_at={32: 1.0}).shortfalls(results(), None))


def test_a_stage_that_does_not_pass_is_not_finished(tmp_path: Path) -> None:
    gate = "gate.needle_exact_match = 0.9\n"
    stages = stages_of(tmp_path, BASE, GATED, SHORT, gate, LONG)
    checkpoint(stages[0], 3)
    assert next_task(stages)["work"] == "evaluate"
    results(exact=0.0).write(results_path(stages[0].config, 3))
    with pytest.raises(
        ValueError, match=r"'short': it has not passed its gate: needle_exact_match = 0.5 at 128 tokens"
    ):
        finish(stages, 0)
    task = next_task(stages)
    assert (task["stage"], task["work"]) == (0, "judge")
    assert finish(stages_of(tmp_path, BASE, GATED, SHORT, "gate.needle_exact_match = 0.5\n", LONG), 0)


# --- runs ------------------------------------------------------------------------------------------------------------


def one_turn(args: list[str], dies_at: int = 0) -> tuple[int, bool]:
    """The exit code of one turn on this rank, and whether another follows; rank 1 dies before a step's end."""
    from torchtitan_upipe.titan.trainer import Trainer
    from torchtitan_upipe.turns import Turn

    class NextTurnError(Exception):
        pass

    def go_on(turn: Turn) -> None:
        raise NextTurnError

    Turn.next = go_on  # type: ignore[method-assign, assignment]
    step: Callable[..., None] = Trainer.train_step

    def train_step(trainer: Trainer, data: Any) -> None:
        if trainer.step == dies_at and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        step(trainer, data)

    Trainer.train_step = train_step
    try:
        return main(args), False
    except NextTurnError:
        return 0, True


def optimizer_of(folder: Path) -> tuple[float, float]:
    """Steps that the optimizer of a checkpoint has seen, and its weight decay."""
    steps, decay = "optimizer.state.norm.weight.step", "optimizer.param_groups.norm.weight.weight_decay"
    state: dict[str, Any] = {steps: torch.zeros(()), decay: 0.0}
    load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return float(state[steps]), state[decay]


def test_a_killed_recipe_goes_on_where_it_was(tmp_path: Path) -> None:
    """To the last digit; finished stages are not trained again."""
    args = ["--recipe", write(tmp_path, BASE, SHORT, LONG)]
    whole = tmp_path / "out"
    assert run_ranks(one_turn, 2, args, init=False) == [(0, True)] * 2
    shutil.copytree(whole, tmp_path / "broken")
    assert run_ranks(one_turn, 2, args, init=False) == [(0, False)] * 2
    log = read_log(whole / "02-long")
    assert len(log.loss) == 4

    moved = [*args, "--job.dump_folder", str(tmp_path / "broken")]
    with pytest.raises(RankError, match="rank 1 died"):
        run_ranks(one_turn, 2, moved, 3, init=False)
    assert json.loads((tmp_path / "broken/01-short" / FINISHED).read_text())["stage"] == "short"
    for file in (tmp_path / "broken/02-long").glob("tb/*/events*"):
        file.unlink()
    assert run_ranks(one_turn, 2, moved, init=False) == [(0, False)] * 2
    again = read_log(tmp_path / "broken/02-long")
    assert again.loss == log.loss[2:]
    assert again.grad_norm == log.grad_norm[2:]
    assert run_ranks(one_turn, 2, moved, init=False) == [(0, False)] * 2  # nothing is left
    assert len(read_log(tmp_path / "broken/02-long").loss) == 2

    assert optimizer_of(whole / "01-short/checkpoint/step-3") == (3, 0.1)
    assert optimizer_of(whole / "02-long/checkpoint/step-2") == (5, 0.2)  # its moments are carried


LOSSES = "[evaluation]\nenable = true\nneedle_trials = 0\nloss_sequences = 1\nloss_lengths = [64]\nplots = false\n"


def test_torchrun_sees_one_run_of_all_stages(tmp_path: Path) -> None:
    """Each in processes of its own, under the numbers of those before; it ends at a gate that is not passed."""
    gates = ["gate.loss_at = { 64 = 9.0 }\n", "gate.loss_at = { 64 = 0.5 }\n"]
    parts = [BASE, LOSSES, SHORT.replace("steps = 3", "steps = 1"), gates[0], LONG.replace("1024", "256")]
    path = write(tmp_path, *parts, gates[1])
    result = torchrun(2, "-m", "torchtitan_upipe.extend", "--recipe", path)
    assert result.returncode == 1, result.stderr[-3000:]
    assert (result.stdout + result.stderr).count("Training completed") == 2
    sentence = f"ValueError: {path}, stage 'long': it has not passed its gate: loss_at.64 = "
    assert sentence in "".join(result.stderr.strip().splitlines()[-6:]), result.stderr[-3000:]
    out = tmp_path / "out"
    assert [(out / name / FINISHED).is_file() for name in ("01-short", "02-long")] == [True, False]

    found = out / "02-long/evaluation/step-1.json"
    before = json.loads(found.read_text())["loss_at"]
    found.unlink()  # as if killed before it was written
    write(tmp_path, *parts, gates[0])
    assert run_ranks(one_turn, 2, ["--recipe", path], init=False) == [(0, False)] * 2
    assert json.loads(found.read_text())["loss_at"] == pytest.approx(before)
    assert (out / "02-long" / FINISHED).is_file()
