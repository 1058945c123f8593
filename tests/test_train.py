"""Whole models through the real trainer: the logged numbers of every method and degree are those of one rank."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.jobs import ROOT, Log, from_seed, job_args, seed_checkpoint, train
from tests.ranks import run_ranks

LLAMA = {"model__name": "llama3_upipe", "model__flavor": "debug_kv2"}  # H = 8, G = 2
QWEN = {"model__name": "qwen3_upipe", "model__flavor": "debug"}  # H = 8, G = 4, H*d = 256, D = 192, q/k norm
MODELS = {"llama3": LLAMA, "qwen3": QWEN}


def upipe(chunk: int, stash: str = "device") -> dict[str, object]:
    return {
        "context_parallel__method": "upipe",
        "context_parallel__head_chunk": chunk,
        "context_parallel__stash": stash,
    }


def fpdt(chunk: int, stash: str = "device") -> dict[str, object]:
    return {
        "context_parallel__method": "fpdt",
        "context_parallel__head_chunk": 0,
        "context_parallel__sequence_chunk": chunk,
        "context_parallel__stash": stash,
    }


TOKENIZER = Tokenizer.from_file(str(ROOT / "torchtitan_upipe/assets/tokenizer/tokenizer.json"))
ULYSSES = {"context_parallel__method": "ulysses"}
RING = {"context_parallel__method": "ring"}
HIDDEN = {
    "context_parallel__hidden_states": "host",
    "context_parallel__stash": "host",
    "context_parallel__tile_size": 48,
}
HYBRID = {"context_parallel__ring_degree": 2}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: seed_checkpoint(tmp_path_factory.mktemp(f"{name}_seed"), **MODELS[name]) for name in MODELS}


@pytest.fixture(scope="module")
def one_rank(seeds: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Log]:
    """Ten steps on one rank: Ulysses there is the plain attention layer in ordinary autograd."""
    return {
        name: train(tmp_path_factory.mktemp(f"{name}_one"), 1, *from_seed(seeds[name]), **MODELS[name], **ULYSSES)
        for name in MODELS
    }


def assert_same(log: Log, reference: Log, loss: float = 1e-5, grad_norm: float = 1e-4) -> None:
    assert len(log.loss) == len(reference.loss) > 0
    assert log.loss == pytest.approx(reference.loss, rel=loss)
    assert log.grad_norm == pytest.approx(reference.grad_norm, rel=grad_norm)


METHODS = {
    "ulysses": ULYSSES,
    "upipe": upipe(4),
    "upipe_one_stage": upipe(0),
    "upipe_teams": upipe(1),  # ranks share heads
    "ring": RING,
    "hybrid_ulysses": ULYSSES | HYBRID,
    "hybrid_upipe": upipe(4) | HYBRID,
    "fpdt": fpdt(98),  # of 256 tokens: three chunks of 96, 96 and 64 on 4 ranks
}


@pytest.mark.parametrize(
    "method, degree", [*((m, 4) for m in METHODS), ("ulysses", 2), ("upipe", 2), ("ring", 2), ("fpdt", 2)]
)
@pytest.mark.parametrize("model", MODELS)
def test_logged_numbers_equal_one_rank(
    model: str, method: str, degree: int, seeds: dict[str, Path], one_rank: dict[str, Log], tmp_path: Path
) -> None:
    log = train(tmp_path, degree, *from_seed(seeds[model]), **MODELS[model], **METHODS[method])
    assert_same(log, one_rank[model])


@pytest.mark.parametrize("degree", [3, 4])
def test_heads_that_the_ranks_do_not_divide(degree: int, tmp_path: Path) -> None:
    """14 query and 2 KV heads, as Qwen2.5-7B's 28 and 4 on 6 or 8 ranks; 256 tokens on 3 ranks are padded."""
    options = {"model__name": "llama3_upipe", "model__flavor": "debug_heads14", "training__steps": 6}
    seed = seed_checkpoint(tmp_path / "seed", **options)
    one = train(tmp_path / "one", 1, *from_seed(seed), **options, **ULYSSES)
    for method in ("ulysses", "upipe", "fpdt"):
        log = train(tmp_path / method, degree, *from_seed(seed), **options, **METHODS[method])
        assert_same(log, one)


def test_hybrid_beside_data_parallelism(
    seeds: dict[str, Path], documents: dict[str, object], two_documents: Log, tmp_path: Path
) -> None:
    """Two replicas of 2 x 2 ranks: the groups of each replica are its own."""
    degrees = {"parallelism__context_parallel_degree": 4, "parallelism__data_parallel_replicate_degree": 2}
    options = {**LLAMA, **upipe(4), **HYBRID, **documents, **degrees}
    assert_same(train(tmp_path, 8, *from_seed(seeds["llama3"]), **options), two_documents)


@pytest.mark.parametrize(
    "mode, method",
    [
        ("full", upipe(4)),
        ("full", upipe(4, "none")),
        ("selective", upipe(4)),
        ("full", fpdt(64, "host")),
        ("full", fpdt(64, "none")),
        ("selective", fpdt(64)),
    ],
    ids=str,
)
def test_activation_checkpointing(
    mode: str, method: dict[str, object], seeds: dict[str, Path], one_rank: dict[str, Log], tmp_path: Path
) -> None:
    options = {**method, "activation_checkpoint__mode": mode}
    assert_same(train(tmp_path, 2, *from_seed(seeds["llama3"]), **LLAMA, **options), one_rank["llama3"])


def traffic_of_one_step(args: list[str]) -> list[tuple[int, int]]:
    """All-to-all calls and bytes of every layer in one training step."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

    from torchtitan_upipe.job.read import read_job
    from torchtitan_upipe.titan.trainer import Trainer

    trainer = Trainer(read_job(args))
    trainer.train()
    trainer.close()
    blocks = list(trainer.model_parts[0].layers.values())
    checkpointed = [isinstance(block, CheckpointWrapper) for block in blocks]
    assert checkpointed == [args[args.index("--activation_checkpoint.mode") + 1] == "full"] * len(blocks)
    layers = [block.attention.method.exchange.traffic for block in blocks]
    return [(traffic.calls, traffic.bytes) for traffic in layers]


def test_full_checkpointing_finds_the_stash_again(tmp_path: Path) -> None:
    """With a stash, full checkpointing costs no exchange more; without one, the block's second run repeats them all."""
    calls = {}
    for mode in ("none", "full"):
        for stash in ("device", "none"):
            options = {**LLAMA, **upipe(4, stash), "activation_checkpoint__mode": mode, "training__steps": 1}
            args = job_args(tmp_path / f"{mode}-{stash}", 2, **options)
            calls[mode, stash] = run_ranks(traffic_of_one_step, 2, args, init=False)[0]
    assert calls["full", "device"] == calls["none", "device"] == calls["none", "none"]
    (with_stash, _), (without, _) = calls["full", "device"][0], calls["full", "none"][0]
    assert without == with_stash * 4 // 3  # forward 1, second run 1, backward 2 against forward 1, backward 2
    # two stages of U = 4; G = 2 KV heads, one a rank, stay for both: q and o twice, k and v once
    assert with_stash == 3 * (2 * 2 + 2)


@pytest.mark.parametrize("method", [ULYSSES, upipe(4), fpdt(64)], ids=["ulysses", "upipe", "fpdt"])
def test_selective_checkpointing_by_operation(
    method: dict[str, object], seeds: dict[str, Path], one_rank: dict[str, Log], tmp_path: Path
) -> None:
    options = {
        **method,
        "activation_checkpoint__mode": "selective",
        "activation_checkpoint__selective_ac_option": "op",
    }
    assert_same(train(tmp_path, 2, *from_seed(seeds["qwen3"]), **QWEN, **options), one_rank["qwen3"])


# --- data parallelism -----------------------------------------------------------------------------------------------

SEQUENCE = 256


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A local dataset whose every document fills one sample exactly (with BOS, EOS and the shifted label).

    Data-parallel ranks take documents in turn, so two ranks together read what one rank reads in two micro-batches.
    """
    words = sorted(
        w.replace("\u0120", " ")
        for w in TOKENIZER.get_vocab()
        if w[0] == "\u0120" and w[1:].isascii() and w[1:].isalpha()
    )
    draw = random.Random(0)
    file = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    with file.open("w") as out:
        for _ in range(32):
            text = "".join(draw.choices(words[:40], k=SEQUENCE - 1))
            assert len(TOKENIZER.encode(text).ids) == SEQUENCE - 1
            out.write(json.dumps({"text": text}) + "\n")
    return {
        "training__dataset": "local",
        "training__dataset_path": file,
        "training__seq_len": SEQUENCE,
        "training__global_batch_size": 2,
    }


@pytest.fixture(scope="module")
def two_documents(
    seeds: dict[str, Path], documents: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> Log:
    """Global batches of two documents on one rank, in two accumulated micro-batches."""
    folder = tmp_path_factory.mktemp("two_documents")
    return train(folder, 1, *from_seed(seeds["llama3"]), **LLAMA, **ULYSSES, **documents)


def test_training_learns(two_documents: Log) -> None:
    assert two_documents.loss[-1] < two_documents.loss[0] - 0.3


@pytest.mark.parametrize(
    "world, parallelism",
    [
        pytest.param(2, {"context_parallel_degree": 2}, id="accumulation"),
        pytest.param(4, {"context_parallel_degree": 2, "data_parallel_shard_degree": 2}, id="cp-fsdp"),
        pytest.param(4, {"context_parallel_degree": 2, "data_parallel_replicate_degree": 2}, id="cp-hsdp"),
        pytest.param(2, {"context_parallel_degree": 1, "data_parallel_shard_degree": 2}, id="fsdp"),
        pytest.param(2, {"context_parallel_degree": 1, "data_parallel_replicate_degree": 2}, id="ddp"),
    ],
)
def test_beside_data_parallelism(
    world: int,
    parallelism: dict[str, int],
    seeds: dict[str, Path],
    documents: dict[str, object],
    two_documents: Log,
    tmp_path: Path,
) -> None:
    degrees = {f"parallelism__{name}": value for name, value in parallelism.items()}
    log = train(tmp_path, world, *from_seed(seeds["llama3"]), **LLAMA, **upipe(4), **documents, **degrees)
    assert_same(log, two_documents)


def test_bfloat16_with_and_without_fsdp(seeds: dict[str, Path], one_rank: dict[str, Log], tmp_path: Path) -> None:
    """One rank goes through autocast, two through FSDP's mixed precision; both stay near the float32 run."""
    mixed = {**LLAMA, **upipe(4), "training__mixed_precision_param": "bfloat16"}
    for world in (1, 2):
        log = train(tmp_path / str(world), world, *from_seed(seeds["llama3"]), **mixed)
        assert_same(log, one_rank["llama3"], loss=2e-3, grad_norm=3e-2)


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [upipe(2), fpdt(96, "host"), HIDDEN], ids=["upipe", "fpdt", "hidden-states"])
def test_resumed_run_repeats_the_unbroken_one(method: dict[str, object], tmp_path: Path) -> None:
    """To the last digit: model, optimizer, schedule and position in the data all come back."""
    options = {**QWEN, **method, "activation_checkpoint__mode": "full", "checkpoint__interval": 4}
    whole = train(tmp_path / "whole", 2, "--checkpoint.enable", **options)
    train(tmp_path / "broken", 2, "--checkpoint.enable", **options, training__steps=6, lr_scheduler__total_steps=10)
    (tmp_path / "broken" / "checkpoint" / "step-6").rename(tmp_path / "the model alone, saved at the end")
    for file in (tmp_path / "broken").glob("tb/*/events*"):
        file.unlink()
    resumed = train(tmp_path / "broken", 2, "--checkpoint.enable", **options)
    assert len(resumed.loss) == 6  # steps 5 to 10
    assert resumed.loss == whole.loss[4:]
    assert resumed.grad_norm == whole.grad_norm[4:]


@pytest.mark.parametrize(
    "world, options",
    [
        pytest.param(2, upipe(2), id="other-chunk"),
        pytest.param(4, ULYSSES, id="other-method-and-degree"),
        pytest.param(1, upipe(1, "none"), id="one-rank"),
        pytest.param(4, RING, id="ring"),
        pytest.param(4, upipe(4) | HYBRID, id="hybrid"),
        pytest.param(4, fpdt(40), id="fpdt"),
    ],
)
def test_checkpoint_continues_under_another_layout(
    world: int, options: dict[str, object], unbroken: tuple[Path, Log], tmp_path: Path
) -> None:
    checkpoint, whole = unbroken
    log = train(
        tmp_path,
        world,
        "--checkpoint.enable",
        "--checkpoint.load_only",
        "--checkpoint.no_initial_load_model_only",
        **LLAMA,
        **options,
        checkpoint__initial_load_path=checkpoint,
    )
    assert len(log.loss) == 6
    assert log.loss == pytest.approx(whole.loss[4:], rel=1e-5)
    assert log.grad_norm == pytest.approx(whole.grad_norm[4:], rel=1e-4)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Log]:
    """Ten steps of UPipe on two ranks with U = 4, and its checkpoint of step 4."""
    folder = tmp_path_factory.mktemp("unbroken")
    log = train(folder, 2, "--checkpoint.enable", **LLAMA, **upipe(4), checkpoint__interval=4)
    return folder / "checkpoint" / "step-4", log


# --- validation -----------------------------------------------------------------------------------------------------


def test_validation_loss_equals_one_rank(seeds: dict[str, Path], tmp_path: Path) -> None:
    options = {
        **LLAMA,
        "training__steps": 2,
        "validation__dataset": "stdlib",
        "validation__seq_len": 256,
        "validation__local_batch_size": 2,
        "validation__steps": 2,
        "validation__freq": 2,
    }
    logs = [
        train(tmp_path / str(i), world, *from_seed(seeds["llama3"]), "--validation.enable", **options, **method)
        for i, (world, method) in enumerate(((1, upipe(0)), (2, upipe(0)), (4, upipe(4) | HYBRID), (2, fpdt(100))))
    ]
    assert len(logs[0].validation) == 2
    assert 5 < logs[0].validation[0] < 10
    for log in logs[1:]:
        assert log.validation == pytest.approx(logs[0].validation, rel=1e-5)


def test_tied_weights(tmp_path: Path) -> None:
    """Qwen3's small models share one weight between embedding and output."""
    tied = {"model__name": "qwen3_upipe", "model__flavor": "debug_tied"}
    seed = seed_checkpoint(tmp_path / "seed", **tied)
    one = train(tmp_path / "one", 1, *from_seed(seed), **tied, **ULYSSES)
    assert_same(train(tmp_path / "two", 2, *from_seed(seed), **tied, **upipe(2)), one)


# --- other ways to start --------------------------------------------------------------------------------------------


def fake_backend_rank(args: list[str]) -> int:
    import os

    from torchtitan_upipe.train import main

    os.environ["NGPU"] = "8"
    return main(args)


def test_dry_run_with_a_fake_backend(tmp_path: Path) -> None:
    """One process plays rank 0 of eight: the whole loop runs, nothing is sent."""
    options = {**LLAMA, **upipe(8), "comm__mode": "fake_backend", "training__steps": 2}
    args = job_args(tmp_path, 8, **options)
    assert run_ranks(fake_backend_rank, 1, args, init=False) == [0]


def stock_trainer_rank(args: list[str]) -> str:
    import torchtitan.train

    from torchtitan_upipe.job.read import read_job

    with pytest.raises(ValueError, match=r"start the job with .torchrun -m torchtitan_upipe.train.") as caught:
        torchtitan.train.Trainer(read_job(args))
    return str(caught.value)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (upipe(4) | HYBRID, "ring_degree = 2 shards for a hybrid"),
        (fpdt(128), 'method = "fpdt" shards each chunk of the sequence'),
        ({"training__seq_len": 254}, "seq_len = 254, no multiple of 4, is padded"),
        ({"context_parallel__tile_size": 64}, "tile_size = 64 computes the loss in tiles"),
        ({"training__document_mask": True}, "document_mask = true finds documents"),
        ({"evaluation__enable": True}, "evaluation.enable = true evaluates"),
        (
            {"context_parallel__settings": "auto", "context_parallel__head_chunk": 0}
            | {"activation_checkpoint__mode": "selective"},
            'settings = "auto" may choose tiles',
        ),
    ],
    ids=["hybrid", "fpdt", "padding", "tiles", "documents", "evaluation", "auto"],
)
def test_the_stock_trainer_refuses_what_it_does_not_do(
    options: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    """Before it would abort in gloo, hang in NCCL, or shard a hybrid contiguously."""
    args = job_args(tmp_path, 4, **(LLAMA | upipe(4) | options))
    assert all(sentence in message for message in run_ranks(stock_trainer_rank, 4, args, init=False))
