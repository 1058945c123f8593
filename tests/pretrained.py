"""Tiny models of Transformers' own classes, with the shipped tokenizer beside them: what a user's checkpoint is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.jobs import ROOT

TOKENIZER = ROOT / "torchtitan_upipe/assets/tokenizer"
SIZES: dict[str, Any] = {
    "vocab_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 176,  # no multiple of what TorchTitan rounds to
    "initializer_range": 0.1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama3.1": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "llama3.2": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-linear": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": {**YARN, "rope_type": "linear"}}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": 32}),  # as Mistral-Nemo's
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "qwen3-tied": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-yarn": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32, "rope_parameters": YARN}),
}


def name_of(kind: str) -> str:
    """``model.name`` for a kind."""
    return "qwen3_upipe" if kind.startswith("qwen3") else "llama3_upipe"


def make(kind: str, **changes: Any) -> PreTrainedModel:
    """A model with weights that are large enough to matter, norms included."""
    config, model, own = KINDS[kind]
    torch.manual_seed(0)
    made = model(config(**{**SIZES, **own, **changes})).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return made


def save(model: PreTrainedModel, folder: Path) -> Path:
    """Write ``model`` as Transformers does, and a tokenizer."""
    model.save_pretrained(folder)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, folder)
    return folder
