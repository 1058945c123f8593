"""Weights made by ``transformers`` give its own logits when TorchTitan loads them and UPipe runs on four ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from tests.jobs import job_args, train
from tests.ranks import run_ranks
from tests.reference import relative_error

LENGTH = 64
SHARED = {"vocab_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 2, "initializer_range": 0.1}


def llama() -> PreTrainedModel:
    """The flavor ``debug_kv2``: two KV heads, fewer than ranks."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128,
            intermediate_size=512,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            rope_parameters=rope,
            **SHARED,
        )
    )


def qwen() -> PreTrainedModel:
    """The flavor ``debug``: H*d = 256, D = 192, norms whose weights are not one."""
    model = Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=192,
            intermediate_size=512,
            num_key_value_heads=4,
            head_dim=32,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
            tie_word_embeddings=False,
            **SHARED,
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.uniform_(0.5, 1.5)
    return model


def logits_rank(args: list[str], tokens: Tensor) -> Tensor:
    from torchtitan_upipe.job.read import read_job
    from torchtitan_upipe.titan.trainer import Trainer

    trainer = Trainer(read_job(args))
    assert trainer.checkpointer.load()
    inputs, _, extra, kwargs = trainer.post_dataloading_process({"input": tokens}, tokens.clone())
    with torch.no_grad():
        logits = trainer.model_parts[0](inputs, **extra, **kwargs)
    assert logits.shape == (tokens.shape[0], tokens.shape[1] // dist.get_world_size(), 2048)
    trainer.close()
    return logits


@pytest.mark.parametrize(
    "make, name, flavor", [(llama, "llama3_upipe", "debug_kv2"), (qwen, "qwen3_upipe", "debug")], ids=["llama", "qwen"]
)
def test_logits_are_those_of_transformers(make: object, name: str, flavor: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make().eval()  # type: ignore[operator]
    model.save_pretrained(tmp_path / "hf")
    tokens = torch.randint(2048, (2, LENGTH))
    with torch.no_grad():
        expected = model(tokens).logits

    args = job_args(
        tmp_path / "run",
        4,
        "--checkpoint.enable",
        "--checkpoint.initial_load_in_hf",
        model__name=name,
        model__flavor=flavor,
        training__seq_len=LENGTH,
        training__local_batch_size=2,
        checkpoint__initial_load_path=tmp_path / "hf",
        context_parallel__head_chunk=4,
    )
    logits = torch.cat(run_ranks(logits_rank, 4, args, tokens, init=False), dim=1)
    assert relative_error(logits, expected) < 1e-4
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_weights_go_back_to_transformers_unchanged(tmp_path: Path) -> None:
    """A step with learning rate 0, saved in Hugging Face's format from four ranks that cut KV heads."""
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "hf")
    train(
        tmp_path / "run",
        4,
        "--checkpoint.enable",
        "--checkpoint.initial_load_in_hf",
        "--checkpoint.last_save_in_hf",
        model__flavor="debug_kv2",
        training__steps=1,
        optimizer__lr=0.0,
        checkpoint__initial_load_path=tmp_path / "hf",
    )
    saved = {}
    for file in (tmp_path / "run" / "checkpoint" / "step-1").glob("*.safetensors"):
        saved |= load_file(file)
    assert saved.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(saved[name], weight), name
