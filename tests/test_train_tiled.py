"""Tiles and host memory in whole models and the real trainer: same numbers, names and collectives as without them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.jobs import Log, job_args, train
from tests.ranks import run_ranks
from tests.reference import relative_error
from tests.test_tiled import Largest
from torchtitan_upipe.titan.flavors import VOCAB_SIZE
from torchtitan_upipe.titan.specs import SPECS
from torchtitan_upipe.titan.tiled import summed_loss, tile_model

LLAMA = {"model__name": "llama3_upipe", "model__flavor": "debug_kv2"}
TIED = {"model__name": "qwen3_upipe", "model__flavor": "debug_tied"}
UPIPE = {"context_parallel__method": "upipe", "context_parallel__head_chunk": 2, "context_parallel__stash": "device"}
TILES = {"context_parallel__tile_size": 48}  # does not divide a rank's rows
FULL = {"activation_checkpoint__mode": "full"}
OFFLOAD = "--activation_checkpoint.offload"
VALIDATION = {
    "validation__dataset": "stdlib",
    "validation__seq_len": 256,
    "validation__local_batch_size": 2,
    "validation__steps": 2,
    "validation__freq": 5,
}


# --- models -----------------------------------------------------------------------------------------------------------

MODELS = [("llama3_upipe", "debug_kv2"), ("qwen3_upipe", "debug"), ("qwen3_upipe", "debug_tied")]
models = pytest.mark.parametrize("name, flavor", MODELS)


def build(name: str, flavor: str, tile_size: int) -> nn.Module:
    """TorchTitan's model with TorchTitan's initial weights, tiled before it has any, as in a job."""
    spec = SPECS[name]()
    with torch.device("meta"):
        model: Any = spec.model_cls(spec.model_args[flavor])
    if tile_size:
        tile_model(model, tile_size)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device("cpu"))
    return model


def tokens_and_labels(length: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCAB_SIZE, (2, length + 1), generator=torch.Generator().manual_seed(1))
    labels = tokens[:, 1:].clone()
    labels[1, length // 4 :] = -100
    return tokens[:, :-1], labels


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


@models
def test_names_and_initial_weights_are_torchtitans(name: str, flavor: str) -> None:
    plain, tiled = build(name, flavor, 0).state_dict(), build(name, flavor, 16).state_dict()
    assert list(tiled) == list(plain)
    assert all(torch.equal(tiled[key], plain[key]) for key in plain)


@models
def test_loss_and_gradients_of_a_model(name: str, flavor: str) -> None:
    """The loss halved, as a trainer divides it, so that ignoring the upstream gradient would show."""
    results = {}
    for tile_size in (0, 16, 1000):
        model = build(name, flavor, tile_size)
        loss = summed_loss(model, plain_loss, *tokens_and_labels(100))
        (loss * 0.5).backward()
        grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        results[tile_size] = {"loss": loss.detach(), **grads}
    plain = results.pop(0)
    tied = flavor == "debug_tied"
    assert ("output.weight" in plain) != tied
    for tiled in results.values():
        assert tiled.keys() == plain.keys()
        assert {key: relative_error(tiled[key], plain[key]) < 2e-6 for key in plain} == dict.fromkeys(plain, True)


def test_logits_of_a_tiled_model() -> None:
    """Asked for logits in evaluation it gives the plain ones; training without labels is refused."""
    plain, tiled = build(*MODELS[0], 0), build(*MODELS[0], 1000)
    tokens, labels = tokens_and_labels(20)
    assert torch.equal(tiled.eval()(tokens), plain(tokens))
    with pytest.raises(ValueError, match=r"tile_size asks for a loss in tiles .* gave the model no labels"):
        tiled.train()(tokens)
    with torch.no_grad():
        assert summed_loss(tiled, plain_loss, tokens, labels).shape == ()
        assert torch.equal(tiled(tokens), plain(tokens))  # the labels are gone


def test_no_tensor_of_a_model_has_all_logits() -> None:
    model = build(*MODELS[0], 16)
    tokens, labels = tokens_and_labels(256)
    with Largest() as largest:
        summed_loss(model, plain_loss, tokens, labels).backward()
    assert largest.elements == VOCAB_SIZE * 128  # the embedding's and output's weights, nothing larger
    assert largest.elements < tokens.numel() * VOCAB_SIZE


# --- trainer ----------------------------------------------------------------------------------------------------------


# Runs on the same number of ranks start from the same weights without a seed checkpoint.


def assert_same(log: Log, reference: Log, steps: int, validations: int) -> None:
    assert len(log.loss) == len(reference.loss) == steps
    assert len(log.validation) == len(reference.validation) == validations
    assert reference.loss[-1] < reference.loss[0]
    assert log.loss == pytest.approx(reference.loss, rel=1e-5)
    assert log.grad_norm == pytest.approx(reference.grad_norm, rel=1e-4)
    assert log.validation == pytest.approx(reference.validation, rel=1e-5)


def test_tiles_with_tied_weights_and_validation(tmp_path: Path) -> None:
    options = {**TIED, **UPIPE, **VALIDATION, "training__steps": 5}
    plain = train(tmp_path / "plain", 2, "--validation.enable", **options)
    tiled = train(tmp_path / "tiled", 2, "--validation.enable", **options, **TILES)
    assert_same(tiled, plain, steps=5, validations=2)


def test_every_switch_on_for_twenty_steps(tmp_path: Path) -> None:
    """Tiles, stash and block inputs on the host, under full checkpointing that stops when it has what it needs."""
    options = {**LLAMA, **UPIPE, "training__steps": 20}
    plain = train(tmp_path / "plain", 2, **options)
    switches = (OFFLOAD, "--activation_checkpoint.early_stop")
    assert_same(train(tmp_path / "all", 2, *switches, **options, **FULL, **TILES), plain, steps=20, validations=0)


class Collectives(TorchDispatchMode):
    """How often each collective was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def watch_three_steps(args: list[str]) -> tuple[dict[str, int], list[tuple[int, int]]]:
    """Collectives of the last of three steps; bytes of the host pool, and in use, after each step."""
    from torchtitan_upipe.job.read import read_job
    from torchtitan_upipe.stash.offload import OffloadedBlock
    from torchtitan_upipe.titan.trainer import Trainer

    trainer = Trainer(read_job(args))
    block = trainer.model_parts[0].layers["0"]
    pools, calls = [], {}
    train_step = trainer.train_step

    def watched(batches: Any) -> None:
        with Collectives() as collectives:
            train_step(batches)
        calls.update(collectives.calls)
        if isinstance(block, OffloadedBlock):
            pools.append((block.offload.pool.bytes, block.offload.pool.bytes_in_use))

    trainer.train_step = watched
    trainer.train()
    trainer.close()
    return calls, pools


def test_tiles_and_offload_cost_no_collective_and_one_buffer_a_block(tmp_path: Path) -> None:
    options = {**LLAMA, **UPIPE, **FULL, "training__steps": 3}
    plain = job_args(tmp_path / "plain", 2, **options)
    calls, pools = run_ranks(watch_three_steps, 2, plain, init=False)[0]
    assert pools == []
    # embedding, 2 blocks and head: gathered for forward, all but the head again for backward; reduced once
    assert calls["_allgather_base_"] == 4 + 3
    assert calls["_reduce_scatter_base_"] == 4

    switched = job_args(tmp_path / "switched", 2, OFFLOAD, **options, **TILES)
    switched_calls, pools = run_ranks(watch_three_steps, 2, switched, init=False)[0]
    assert switched_calls == calls
    blocks, rows, width = 2, 128, 128
    assert pools == [(blocks * rows * width * 4, 0)] * 3
