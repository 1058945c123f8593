"""Evaluations that cannot be done end in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs import job_args
from tests.ranks import run_ranks
from tests.test_train import LLAMA, ULYSSES
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.job.results import read_results


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["freq", "0"], r"evaluation.freq = 0 must be at least 1"),
        (["needle_trials", "0", "loss_sequences", "0"], r"leave nothing to evaluate; set one of them"),
        (["needle_lengths", "512"], r"needle_lengths holds 512, more than training.seq_len = 256"),
        (["needle_lengths", "3"], r"needle_lengths holds 3, and must be at least 4: a token for each of 4"),
        (["loss_lengths", "300"], r"loss_lengths holds 300, more than training.seq_len = 256"),
        (["needle_depths", "1.5"], r"needle_depths holds 1.5, and must be between 0 .* and 1"),
        (["needle_keys", "0"], r"needle_keys holds 0, and must be between 1 and 44"),
        (["needle_values", "values.txt", "needle_keys", "3"], r"needle_keys holds 3, and must be between 1 and 2"),
        (["needle", "{value}"], r"evaluation.needle = '\{value\}' must hold \{key\}"),
        (["question", "why?"], r"evaluation.question = 'why\?' must hold \{key\}"),
        (["question", "{key} {value}"], r"must not hold \{value\}, the answer"),
        (["needle_names", "none.txt"], r"needle_names = 'none.txt' cannot be read \(No such file"),
        (["needle_names", "empty.txt"], r"needle_names = 'empty.txt' has no line"),
        (["needle_names", "twice.txt"], r"needle_names = 'twice.txt' names 'a' twice"),
        (["truncated_context", "256"], r"truncated_context = 256 must be at least 4 and below training.seq_len = 256"),
        (["dataset_path", "x"], r"dataset_path = 'x' belongs to evaluation.dataset, which is not set"),
        (["dataset", "chat", "dataset_path", "x"], r"evaluation.dataset = \"chat\" is no text"),
        (["dataset", "local", "dataset_path", "x"], r"evaluation.dataset_path = 'x' does not exist"),
        (["dataset", "nothing"], r"evaluation.dataset = 'nothing' is unknown; choose one of"),
        (["folder", ""], r"evaluation.folder = \"\" names no folder"),
    ],
)
def test_refused(flags: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assets = str(Path("torchtitan_upipe/assets/tokenizer").absolute())
    monkeypatch.chdir(tmp_path)
    for name, lines in {"values": "a\nb\n", "twice": "a\nb\na\n", "empty": "\n"}.items():
        Path(f"{name}.txt").write_text(lines)
    words = [f"--evaluation.{word}" if i % 2 == 0 else word for i, word in enumerate(flags)]
    with pytest.raises(ValueError, match=sentence):
        read_job(job_args(tmp_path, 4, "--evaluation.enable", *words, model__hf_assets_path=assets))


def test_plots_need_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"plots = true needs matplotlib; install it, or set evaluation.plots = false"):
        read_job(job_args(tmp_path, 1, "--evaluation.enable"))


def refused_rank(args: list[str]) -> str:
    from torchtitan_upipe.job.read import read_job
    from torchtitan_upipe.titan.trainer import evaluate_job

    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the test knows the sentence)
        evaluate_job(read_job(args))
    return str(caught.value)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--checkpoint.no-enable"], "checkpoint.enable = false: there are no weights to evaluate"),
        ([], "holds no checkpoint, and the job names no other weights; set checkpoint.initial_"),
        (["--evaluation.needle_lengths", "40"], "needle_lengths = 40 leaves no room for text beside 1 needles"),
        (["--training.seq_len", "9000"], "needle_lengths holds 9000, and dataset 'local' at"),
        (["--evaluation.needle_trials", "0", "--evaluation.loss_sequences", "99"], "of 256 tokens; name more text"),
    ],
)
def test_an_evaluation_that_cannot_be_done(flags: list[str], sentence: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("An apple a day. " * 500)
    data = {"training__dataset": "local", "training__dataset_path": text}
    args = job_args(tmp_path, 1, "--checkpoint.enable", "--evaluation.no-plots", *flags, **LLAMA, **ULYSSES, **data)
    assert sentence in run_ranks(refused_rank, 1, args, init=False)[0]


def test_a_file_that_is_no_evaluation(tmp_path: Path) -> None:
    file = tmp_path / "step-1.json"
    for content, sentence in {"": "is no valid JSON", "[]": "must hold context_gain, loss_at"}.items():
        file.write_text(content)
        with pytest.raises(ValueError, match=sentence):
            read_results(file)
    with pytest.raises(ValueError, match=r"step-2.json cannot be read: No such file"):
        read_results(tmp_path / "step-2.json")
