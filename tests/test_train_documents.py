"""Packed documents through the real trainer: every method logs what one rank logs, and no document sees another."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.jobs import Log, from_seed, job_args, seed_checkpoint, train
from tests.ranks import run_ranks
from tests.reference import relative_error
from tests.test_train import LLAMA, METHODS, TOKENIZER, ULYSSES, assert_same, upipe

PACKED = {"training__document_mask": True, "training__seq_len": 250}  # padded to 252 or 256 tokens on 4 ranks


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seed_checkpoint(tmp_path_factory.mktemp("seed"), **LLAMA)


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Documents of 1 to 90 words, several in every sample."""
    draw = random.Random(1)
    file = tmp_path_factory.mktemp("short") / "documents.jsonl"
    with file.open("w") as out:
        for _ in range(400):
            out.write(json.dumps({"text": " ".join(draw.choices("abcdefgh", k=draw.randint(1, 90)))}) + "\n")
    return {"training__dataset": "local", "training__dataset_path": file}


@pytest.fixture(scope="module")
def packed_one_rank(seed: Path, short_documents: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Log:
    folder = tmp_path_factory.mktemp("packed")
    return train(folder, 1, *from_seed(seed), **LLAMA, **ULYSSES, **short_documents, **PACKED)


@pytest.mark.parametrize("method", METHODS)
def test_packed_documents_equal_one_rank(
    method: str, seed: Path, short_documents: dict[str, object], packed_one_rank: Log, tmp_path: Path
) -> None:
    options = LLAMA | METHODS[method] | short_documents | PACKED
    assert_same(train(tmp_path, 4, *from_seed(seed), **options), packed_one_rank)


def test_the_document_mask_changes_the_loss(
    seed: Path, short_documents: dict[str, object], packed_one_rank: Log, tmp_path: Path
) -> None:
    options = LLAMA | ULYSSES | short_documents | PACKED | {"training__document_mask": False}
    log = train(tmp_path, 1, *from_seed(seed), **options)
    differences = [abs(a - b) for a, b in zip(log.loss, packed_one_rank.loss, strict=True)]
    assert max(differences) > 1e-2  # fresh weights hardly attend: it grows with the steps


def test_labels_across_documents_change_the_loss(
    seed: Path, short_documents: dict[str, object], packed_one_rank: Log, tmp_path: Path
) -> None:
    options = LLAMA | ULYSSES | short_documents | PACKED | {"training__labels_across_documents": True}
    log = train(tmp_path, 1, *from_seed(seed), **options)
    assert abs(log.loss[0] - packed_one_rank.loss[0]) > 1e-3


def unlabelled_rank(args: list[str]) -> tuple[float, float]:
    """Loss of a batch without a label, and the largest gradient."""
    from torchtitan_upipe.job.read import read_job
    from torchtitan_upipe.titan.trainer import Trainer

    trainer = Trainer(read_job(args))
    labels = torch.full((1, 64), -100)
    total = torch.zeros(())  # as the trainer counts them
    loss = trainer.forward_backward_step(
        input_dict={"input": torch.arange(64)[None]}, labels=labels, global_valid_tokens=total
    )
    largest = max(float(p.grad.abs().max()) for p in trainer.model_parts[0].parameters())
    trainer.close()
    return float(loss), largest


@pytest.mark.parametrize("tile_size", [0, 16])
def test_a_batch_without_a_label_has_no_loss_and_no_gradient(tile_size: int, tmp_path: Path) -> None:
    options = {"training__seq_len": 64, "context_parallel__tile_size": tile_size}
    found = run_ranks(unlabelled_rank, 2, job_args(tmp_path, 2, **options), init=False)
    assert found == [(0.0, 0.0)] * 2


def documents_rank(args: list[str], tokens: Tensor) -> list[Tensor]:
    """Logits of packed ``tokens``, and of each document alone, by a model that knows no documents."""
    from torchtitan_upipe.job.read import read_job
    from torchtitan_upipe.titan.trainer import Trainer

    trainer = Trainer(read_job(args))
    model = trainer.model_parts[0]
    batch = {"input": tokens.unsqueeze(0)}
    inputs, _, extra, kwargs = trainer.post_dataloading_process(batch, tokens.unsqueeze(0).clone())
    ends = (tokens == trainer.tokenizer.eos_id).nonzero().flatten() + 1
    for block in model.layers.values():
        block.attention.document_mask = False
    with torch.no_grad():
        packed = model(inputs, **extra, **kwargs)
        alone = [model(part.unsqueeze(0)) for part in tokens.tensor_split(ends)]
    trainer.close()
    return [packed, torch.cat(alone, dim=1)]


def test_packed_documents_have_the_logits_that_each_has_alone(tmp_path: Path) -> None:
    tokens = torch.randint(10, 2000, (100,), generator=torch.Generator().manual_seed(0))
    tokens[[16, 17, 60]] = TOKENIZER.token_to_id("<|end_of_text|>")
    args = job_args(tmp_path, 1, **LLAMA, **upipe(2), **PACKED)
    packed, alone = run_ranks(documents_rank, 1, args, tokens, init=False)[0]
    assert relative_error(packed, alone) < 1e-5
