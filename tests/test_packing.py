"""Documents packed whole: each once, cut only where it is longer than a sequence; one rank's loss on four."""

from __future__ import annotations

import json
import pickle
import random
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.jobs import from_seed, seed_checkpoint, train
from tests.test_train import LLAMA, METHODS, ULYSSES, assert_same
from torchtitan_upipe.data.packing import PackedTexts
from torchtitan_upipe.data.reader import Reader
from torchtitan_upipe.data.text import load_local

LENGTH = 20
LENGTHS = [random.Random(i).randint(2, 30) for i in range(60)] + [70]


def encode(row: Any) -> list[int]:
    number, length = map(int, row["text"].split())
    return [number * 100 + i for i in range(length)]


def stream(folder: Path, **options: Any) -> PackedTexts:
    lines = [json.dumps({"text": f"{i} {length}"}) for i, length in enumerate(LENGTHS, 1)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    return PackedTexts(Reader(load_local(str(folder))), encode, LENGTH, marks=True, **options)


def pieces(example: tuple[dict[str, Tensor], Tensor]) -> list[tuple[list[int], list[int]]]:
    inputs, labels = example[0]["input"], example[1]
    starts = [*example[0]["starts"].nonzero().flatten().tolist(), LENGTH]
    parts = [(inputs[a:b].tolist(), labels[a:b].tolist()) for a, b in pairwise(starts)]
    padding = [labels for tokens, labels in parts if tokens[0] == 0]
    assert all(set(ignored) == {-100} for ignored in padding)
    return [part for part in parts if part[0][0] != 0]


def test_every_transition_within_a_document_is_trained_once(tmp_path: Path) -> None:
    examples = list(stream(tmp_path, endless=False))
    found = [pair for example in examples for part in pieces(example) for pair in zip(*part, strict=True)]
    expected = [(i * 100 + at - 1, i * 100 + at) for i, length in enumerate(LENGTHS, 1) for at in range(1, length)]
    assert sorted(found) == sorted(expected)
    whole = [tokens[0] // 100 for example in examples for tokens, _ in pieces(example) if tokens[0] % 100 == 0]
    assert sorted(whole) == list(range(1, 62))  # none begins in the middle of another sequence
    assert len(examples) < 1.25 * sum(LENGTHS) / LENGTH


@pytest.mark.parametrize("stop", [1, 20, 60])
def test_a_resumed_stream_goes_on_where_it_was(stop: int, tmp_path: Path) -> None:
    whole = [pieces(example) for example in islice(stream(tmp_path), stop + 30)]
    first = stream(tmp_path)
    begun = [pieces(example) for example in islice(first, stop)]
    resumed = stream(tmp_path)
    resumed.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    assert begun + [pieces(example) for example in islice(resumed, 30)] == whole


def test_four_ranks_log_what_one_logs(tmp_path: Path) -> None:
    draw = random.Random(1)
    lines = [json.dumps({"text": " ".join(draw.choices("abcdefgh", k=draw.randint(1, 90)))}) for _ in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    options: dict[str, Any] = LLAMA | {
        "training__dataset": "local",
        "training__dataset_path": tmp_path / "a.jsonl",
        "training__packing": "first_fit",
        "training__document_mask": True,
        "training__seq_len": 122,
        "training__steps": 4,
    }
    seed = from_seed(seed_checkpoint(tmp_path / "seed", **LLAMA))
    one = train(tmp_path / "one", 1, *seed, **(options | ULYSSES))
    assert_same(train(tmp_path / "four", 4, *seed, **(options | METHODS["upipe"])), one)
    joined = train(tmp_path / "joined", 1, *seed, **(options | ULYSSES | {"training__packing": "join"}))
    assert abs(joined.loss[0] - one.loss[0]) > 1e-4
