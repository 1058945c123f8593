"""One rank whose parameters, gradients and optimizer are in host memory: FSDP2 on a mesh of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from tests.jobs import Log, from_seed, job_args, seed_checkpoint, train
from tests.ranks import run_ranks
from tests.test_huggingface import llama

OFFLOAD = "--training.enable_cpu_offload"
LLAMA = {"model__name": "llama3_upipe", "model__flavor": "debug_kv2"}
MODELS = {"llama3": LLAMA, "qwen3": {"model__name": "qwen3_upipe", "model__flavor": "debug"}}
PLAIN = {"context_parallel__method": "ulysses"}
LEAST = {
    "context_parallel__method": "upipe",
    "context_parallel__head_chunk": 2,
    "context_parallel__stash": "host",
    "context_parallel__tile_size": 64,
    "activation_checkpoint__mode": "full",
    "activation_checkpoint__offload": True,
}


def assert_same(log: Log, reference: Log, loss: float = 1e-6, grad_norm: float = 1e-5) -> None:
    assert len(log.loss) == len(reference.loss) > 0
    assert log.loss == pytest.approx(reference.loss, rel=loss)
    assert log.grad_norm == pytest.approx(reference.grad_norm, rel=grad_norm)
    assert log.validation == pytest.approx(reference.validation, rel=loss)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Log]:
    """Ten steps of plain weights on one rank, without FSDP2, in ordinary autograd."""
    return {name: train(tmp_path_factory.mktemp(name), 1, **MODELS[name], **PLAIN) for name in MODELS}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("options", [PLAIN, LEAST], ids=["plain", "least"])
def test_logged_numbers_are_those_of_plain_weights(
    model: str, options: dict[str, object], plain: dict[str, Log], tmp_path: Path
) -> None:
    assert_same(train(tmp_path, 1, OFFLOAD, **MODELS[model], **options), plain[model])


def where_the_state_is(args: list[str]) -> tuple[int, int, set[str], set[torch.dtype], set[torch.dtype]]:
    """FSDP2's modules, groups of offloaded weights among them, devices of the state, dtypes of it and of a gather."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    from torchtitan_upipe.job.read import read_job
    from torchtitan_upipe.titan.trainer import Trainer

    trainer = Trainer(read_job(args))
    trainer.train()
    (model,) = trainer.model_parts
    state = [
        value for optimizer in trainer.optimizers for entry in optimizer.state.values() for value in entry.values()
    ]
    local = [value.to_local() for value in [*model.parameters(), *state] if isinstance(value, DTensor)]
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    block = next(iter(model.layers.values()))
    block.unshard()
    gathered = {parameter.dtype for parameter in block.parameters()}
    block.reshard()
    groups = {module._get_fsdp_state()._fsdp_param_group for module in modules} - {None}
    offloaded = sum(all(p.offload_to_cpu for p in group.fsdp_params) for group in groups)
    trainer.close()
    return len(modules), offloaded, {t.device.type for t in local}, {t.dtype for t in local}, gathered


def test_the_state_is_on_the_host_and_a_block_is_gathered_in_mixed_precision(tmp_path: Path) -> None:
    args = job_args(tmp_path, 1, OFFLOAD, **LLAMA, training__steps=1, training__mixed_precision_param="bfloat16")
    ((modules, offloaded, devices, dtypes, gathered),) = run_ranks(where_the_state_is, 1, args, init=False)
    assert modules == 6  # embedding, two blocks, final norm and output, the model
    assert offloaded == 4  # groups: norm and output share one, the model has no weights of its own
    assert devices == {"cpu"}
    assert dtypes == {torch.float32}
    assert gathered == {torch.bfloat16}


def test_bfloat16_stays_near_float32(plain: dict[str, Log], tmp_path: Path) -> None:
    mixed = {**LLAMA, **LEAST, "training__mixed_precision_param": "bfloat16"}
    log = train(tmp_path, 1, OFFLOAD, **mixed)
    assert_same(log, plain["llama3"], loss=2e-3, grad_norm=3e-2)
    assert log.loss != plain["llama3"].loss


def test_accumulated_gradients_tied_weights_and_validation(tmp_path: Path) -> None:
    options = {
        "model__name": "qwen3_upipe",
        "model__flavor": "debug_tied",
        "training__global_batch_size": 2,
        "training__steps": 4,
        "validation__enable": True,
        "validation__dataset": "stdlib",
        "validation__seq_len": 256,
        "validation__local_batch_size": 1,
        "validation__steps": 1,
        "validation__freq": 2,
    }
    one = train(tmp_path / "plain", 1, **options, **PLAIN)
    assert len(one.validation) == 3
    assert_same(train(tmp_path / "offload", 1, OFFLOAD, **options, **LEAST), one)


def test_two_ranks_offload_too(tmp_path: Path) -> None:
    seed = seed_checkpoint(tmp_path / "seed", **LLAMA)
    one = train(tmp_path / "one", 1, *from_seed(seed), **LLAMA, **PLAIN)
    assert_same(train(tmp_path / "two", 2, *from_seed(seed), OFFLOAD, **LLAMA, **LEAST), one, 1e-5, 1e-4)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_resumed_run_repeats_the_unbroken_one_on_one_and_two_ranks(tmp_path: Path) -> None:
    options = {**LLAMA, **LEAST, "checkpoint__interval": 4}
    whole = train(tmp_path / "whole", 1, "--checkpoint.enable", OFFLOAD, **options)
    step = tmp_path / "whole/checkpoint/step-4"
    flags = ["--checkpoint.enable", "--checkpoint.load_only", "--checkpoint.no-initial_load_model_only"]
    resumed = train(tmp_path / "resumed", 1, *flags, OFFLOAD, **options, checkpoint__initial_load_path=step)
    assert resumed.loss == whole.loss[4:]
    assert resumed.grad_norm == whole.grad_norm[4:]
    for name, ranks in (("plain", 1), ("two", 2)):  # without offload
        log = train(tmp_path / name, ranks, *flags, **options, checkpoint__initial_load_path=step)
        assert log.loss == pytest.approx(whole.loss[4:], rel=1e-5)


def test_a_seed_checkpoint_is_that_of_plain_weights(tmp_path: Path) -> None:
    options = {**LLAMA, "training__steps": 2}
    flags = ["--checkpoint.enable", "--checkpoint.create_seed_checkpoint"]
    train(tmp_path / "seed", 1, *flags, OFFLOAD, **options)
    seeds = [tmp_path / "seed/checkpoint/step-0", seed_checkpoint(tmp_path / "plain", **options)]
    logs = [train(tmp_path / str(i), 1, *from_seed(seed), **options, **PLAIN) for i, seed in enumerate(seeds)]
    assert logs[0].loss == logs[1].loss


def test_hugging_face_weights_go_in_and_out_unchanged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama()
    assert isinstance(model, LlamaForCausalLM)
    model.save_pretrained(tmp_path / "hf")
    flags = ["--checkpoint.enable", "--checkpoint.initial_load_in_hf", "--checkpoint.last_save_in_hf", OFFLOAD]
    options = {"training__steps": 1, "optimizer__lr": 0.0, "checkpoint__initial_load_path": tmp_path / "hf"}
    train(tmp_path / "run", 1, *flags, **LLAMA, **LEAST, **options)
    saved: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "run/checkpoint/step-1").glob("*.safetensors"):
        saved |= load_file(file)
    assert saved.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(saved[name], weight), name


# --- the stock trainer ----------------------------------------------------------------------------------------------


def stock_trainer_rank(args: list[str]) -> str:
    import torchtitan.distributed.utils as dist_utils
    import torchtitan.train

    from torchtitan_upipe.job.read import read_job

    init = dist_utils.init_distributed  # on CPU gloo must not be named twice, which is not what is tested
    dist_utils.init_distributed = lambda comm, enable_cpu_backend=False, **kwargs: init(comm, **kwargs)
    with pytest.raises(ValueError, match=r"start the job with .torchrun -m torchtitan_upipe.train.") as caught:
        torchtitan.train.Trainer(read_job(args))
    return str(caught.value)


def test_the_stock_trainer_refuses_it(tmp_path: Path) -> None:
    (message,) = run_ranks(stock_trainer_rank, 1, job_args(tmp_path, 1, OFFLOAD, **LLAMA), init=False)
    assert "training.enable_cpu_offload = true gives one rank to FSDP2" in message
