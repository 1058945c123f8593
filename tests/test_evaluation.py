"""Evaluation: what it finds is what one plain model says, in every layout, and training does not notice it."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.jobs import from_seed, job_args, read_scalars, seed_checkpoint, train
from tests.ranks import run_ranks
from tests.test_train import HYBRID, LLAMA, RING, ULYSSES, fpdt, upipe
from torchtitan_upipe.job.results import Results, read_results
from torchtitan_upipe.titan.evaluation_plots import plot_results

HIDDEN = {
    **upipe(4, "host"),
    "context_parallel__hidden_states": "host",
    "context_parallel__tile_size": 48,
    "activation_checkpoint__mode": "full",
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "upipe": (4, upipe(4)),
    "ulysses": (2, ULYSSES),
    "ring": (2, RING),
    "hybrid": (4, upipe(4) | HYBRID | {"context_parallel__tile_size": 48}),
    "fpdt": (2, fpdt(98)),
    "hidden": (2, HIDDEN),
    "data_parallel": (4, ULYSSES | {"parallelism__context_parallel_degree": 2}),
}
FLAGS = [
    *("--evaluation.needle_lengths", "150", "256", "--evaluation.needle_depths", "0.4"),
    *("--evaluation.loss_lengths", "64", "--evaluation.no-plots"),
]
SMALL = {**LLAMA, "evaluation__needle_trials": 1, "evaluation__loss_sequences": 3}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Documents of 20 to 500 words."""
    draw, file = random.Random(1), tmp_path_factory.mktemp("text") / "documents.jsonl"
    with file.open("w") as out:
        for _ in range(12):
            words = draw.choices(["apple", "bread.", "cat", "dog,", "east", "five."], k=draw.randint(20, 500))
            out.write(json.dumps({"text": " ".join(words)}) + "\n")
    return {"training__dataset": "local", "training__dataset_path": file}


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seed_checkpoint(tmp_path_factory.mktemp("seed"), **LLAMA)


@pytest.fixture(scope="module")
def one_rank(seed: Path, text: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Results]:
    """By whether documents are masked."""
    return {
        masked: evaluate(tmp_path_factory.mktemp("one"), 1, seed, **text, **ULYSSES, training__document_mask=masked)
        for masked in (False, True)
    }


def evaluate(folder: Path, world_size: int, seed: Path, step: int = 0, **options: object) -> Results:
    args = job_args(folder, world_size, *from_seed(seed), *FLAGS, **{**SMALL, **options})
    assert run_ranks(run_evaluate, world_size, args, init=False, timeout=240) == [0] * world_size
    return read_results(folder / f"evaluation/step-{step}.json")


def run_evaluate(args: list[str]) -> int:
    from torchtitan_upipe.evaluate import main

    return main(args)


def assert_same(results: Results, reference: Results) -> None:
    for name, found in asdict(results).items():
        wanted = asdict(reference)[name]
        if isinstance(found, list):
            assert len(found) == len(wanted) > 0
            for row, other in zip(found, wanted, strict=True):
                assert row == pytest.approx(other, rel=1e-5)
        else:
            assert found == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    assert [n["exact_match"] for n in results.needles] == [n["exact_match"] for n in reference.needles]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_finds_what_one_rank_finds(
    layout: str, seed: Path, text: dict[str, object], one_rank: dict[bool, Results], tmp_path: Path
) -> None:
    ranks, options = LAYOUTS[layout]
    masked = layout in ("ulysses", "hidden")  # 256 tokens hold one document and the beginning of another
    found = evaluate(tmp_path, ranks, seed, **text, **options, training__document_mask=masked)
    assert_same(found, one_rank[masked])


def by_hand(args: list[str]) -> tuple[dict[str, Any], dict[str, Any], list[Any]]:
    """What the evaluator finds; the same from whole logits, one sequence at a time; what meets the output layer."""
    from torchtitan_upipe.job.read import read_job
    from torchtitan_upipe.titan.trainer import Trainer

    trainer = Trainer(read_job(args))
    trainer.checkpointer.load_weights()
    (model,) = trainer.model_parts
    evaluator = trainer.evaluator
    assert evaluator is not None
    rows: list[int] = []
    hook = model.output.register_forward_hook(lambda module, given, out: rows.append(out.shape[0]))
    found = evaluator.run(model, 0)
    hook.remove()
    assert model.training

    @torch.no_grad()
    def losses(sequence: Any) -> torch.Tensor:
        logits = model(sequence.inputs[None])[0]
        return F.cross_entropy(logits[sequence.scored], sequence.labels[sequence.scored], reduction="none").double()

    prompts = [evaluator.needles.prompt(cell, 0) for cell in evaluator.cells]  # type: ignore[union-attr]
    whole = [losses(sequence) for sequence in evaluator.texts[256]]
    ends = [sequence.last(64, 32) for sequence in evaluator.texts[256]]
    gains = [(losses(end), all_of_it[-32:]) for end, all_of_it in zip(ends, whole, strict=True)]
    wanted = {
        "log_probability": [-float(losses(prompt).sum()) for prompt in prompts],
        "loss_at": {str(n): float(torch.cat([*map(losses, s)]).mean()) for n, s in evaluator.texts.items()},
        "first": float(torch.stack([loss[0] for loss in whole]).mean()),
        "gain": sum(float((less - more).mean()) for less, more in gains) / len(gains),
    }
    likeliest = [torch.full_like(p.labels, -100) for p in prompts]
    for label, prompt in zip(likeliest, prompts, strict=True):
        label[-9:] = model(prompt.inputs[None])[0, -9:].argmax(-1)
        label[-9] += prompt is not prompts[0]  # the first alone is right everywhere
    sequences = [type(p)(p.inputs, label, p.starts) for p, label in zip(prompts, likeliest, strict=True)]
    hits = [evaluator.scorer(model, [sequence])[0][1].tolist() for sequence in sequences]
    trainer.close()
    answers = [int(prompt.scored.sum()) for prompt in prompts]
    return asdict(found), wanted, [rows, answers, hits]


def test_the_numbers_are_those_of_whole_logits(seed: Path, text: dict[str, object], tmp_path: Path) -> None:
    options = {**SMALL, **text, **ULYSSES, "evaluation__loss_sequences": 2}
    args = job_args(tmp_path, 1, *from_seed(seed), *FLAGS, "--evaluation.enable", **options)
    ((found, wanted, (rows, answers, hits)),) = run_ranks(by_hand, 1, args, init=False)
    assert [n["log_probability"] for n in found["needles"]] == pytest.approx(wanted["log_probability"], rel=1e-5)
    assert found["loss_at"] == pytest.approx(wanted["loss_at"], rel=1e-5)
    assert found["loss_by_position"][0]["loss"] == pytest.approx(wanted["first"], rel=1e-5)
    assert sum(row["tokens"] for row in found["loss_by_position"]) == 2 * 256
    assert found["context_gain"]["gain"] == pytest.approx(wanted["gain"], abs=1e-5)
    assert found["context_gain"]["tokens"] == 2 * 32
    # prompts of 150 and of 256 tokens, one and four needles; 256 tokens a sequence, of 64 all at once; 32 last ones
    assert rows == [*answers, 256, 256, 128, 64]
    assert hits == [[1.0] * 9, *[[0.0] + [1.0] * 8] * 3]


def test_training_does_not_notice_its_evaluations(seed: Path, text: dict[str, object], tmp_path: Path) -> None:
    """The same numbers to the last digit; the command, of a finished model, finds what the callback found."""
    options = {**SMALL, **text, **upipe(4), "training__steps": 3, "optimizer__lr": 1e-2}
    flags = ["--checkpoint.enable", "--checkpoint.initial_load_path", str(seed), *FLAGS]
    plain = train(tmp_path / "plain", 2, *from_seed(seed), **options)
    saves = {"checkpoint__interval": 3, "evaluation__freq": 2}
    job = tmp_path / "job"
    log = train(job, 2, *flags, "--evaluation.enable", "--checkpoint.last_save_in_hf", **options, **saves)
    assert log == plain
    assert sorted(file.name for file in (job / "evaluation").iterdir()) == ["step-2.json", "step-3.json"]
    found = {step: read_results(job / f"evaluation/step-{step}.json") for step in (2, 3)}
    assert found[2].loss_at["256"] > found[3].loss_at["256"] + 1e-3
    assert read_scalars(job, "evaluation/loss_at/256") == pytest.approx([found[n].loss_at["256"] for n in (2, 3)])
    (job / "evaluation/step-3.json").unlink()
    assert_same(evaluate(job, 2, seed, step=3, **{**options, **saves}), found[3])


def test_a_run_that_was_ended_evaluates_the_step_it_finds(seed: Path, text: dict[str, object], tmp_path: Path) -> None:
    options = {**SMALL, **text, **ULYSSES, "training__steps": 1}
    flags = ["--checkpoint.enable", "--checkpoint.no-last_save_model_only", *FLAGS]
    train(tmp_path, 1, *flags, **options)
    train(tmp_path, 1, *flags, "--evaluation.enable", **options)
    (file,) = (tmp_path / "evaluation").iterdir()
    written = file.stat().st_mtime_ns
    train(tmp_path, 1, *flags, "--evaluation.enable", **options)
    assert file.stat().st_mtime_ns == written


def test_pictures(one_rank: dict[bool, Results], tmp_path: Path) -> None:
    for picture in plot_results(one_rank[False], tmp_path / "step-0.json"):
        assert picture.stat().st_size > 5000
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step-0-loss.png", "step-0-needles.png"]


def test_text_is_counted_without_marks_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchtitan_upipe.titan import evaluation

    monkeypatch.setattr(evaluation, "read_documents", lambda *_: ("text", iter([[0, 7, 8, 1]] * 99)))
    config: Any = SimpleNamespace(evaluation=SimpleNamespace(dataset="local"))
    _, documents = evaluation._first_documents(config, None, 10)  # type: ignore[arg-type]
    assert len(documents) == 5
