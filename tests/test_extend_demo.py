"""The short-context model, the documents and the recipe of scripts/extend_demo.sh, which itself takes minutes."""

from __future__ import annotations

import random
import runpy
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.jobs import ROOT
from torchtitan_upipe import extend
from torchtitan_upipe.job.pretrained import read_pretrained

FOLDER = ROOT / "scripts/extend"
MODEL = FOLDER / "model"
CONTEXT = 128
documents = runpy.run_path(str(FOLDER / "documents.py"))


def test_documents_are_the_same_every_time_and_call_each_name_twice_with_one_number() -> None:
    for length in (documents["SHORTEST"], 40, 1000):
        text = documents["document"](random.Random(0), length)
        assert text == documents["document"](random.Random(0), length)
        words = text.split()
        calls = Counter(tuple(words[at + 1 : at + 4]) for at, word in enumerate(words) if word == "call")
        assert len(words) == length
        assert set(calls.values()) == {2}
        assert len({name for name, _, _ in calls}) == len(calls)


def test_the_shipped_model_is_small_and_has_the_documents_tokenizer(tmp_path: Path) -> None:
    documents["write_tokenizer"](tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (MODEL / "tokenizer.json").read_bytes()
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 3e6
    assert read_pretrained(str(MODEL)).length == CONTEXT  # what flavor = "hf" reads


def test_the_shipped_model_retrieves_within_its_context_and_not_at_eight_times_its_length() -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    rng = random.Random(0)

    def answered(length: int) -> int:
        """Of eight prompts of ``length`` tokens, how many are continued by the first word of the number called."""
        right = 0
        for _ in range(8):
            filler = rng.choices(documents["FILLER"], k=length - 8)
            filler.insert(rng.randrange(len(filler)), "call baka 17 42 .")
            ids = tokenizer(
                f"<s> {' '.join(filler)} call baka", return_tensors="pt", add_special_tokens=False
            ).input_ids
            assert ids.shape == (1, length)
            with torch.no_grad():
                right += int(model(ids).logits[0, -1].argmax() == tokenizer.convert_tokens_to_ids("17"))
        return right

    assert answered(CONTEXT // 2) == 8
    assert answered(8 * CONTEXT) == 0


def test_the_recipe_can_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    documents["main"](tmp_path / "outputs/extend/data", tokens=2048)
    (tmp_path / "scripts").symlink_to(FOLDER.parent)
    monkeypatch.chdir(tmp_path)
    assert extend.main(["--recipe", "scripts/extend/recipe.toml", "--dry-run"]) == 0
    assert "1,024" in capsys.readouterr().out
