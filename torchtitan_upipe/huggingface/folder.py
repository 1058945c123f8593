"""What stands beside the weights of a Hugging Face model: ``config.json``, tokenizer, generation config."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from torchtitan_upipe.cp.frequencies import RopeParameters
from torchtitan_upipe.job.pretrained import CONFIG, ROPE_TYPES, Pretrained, read_config

CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM"}
FULL_ATTENTION: dict[str, dict[str, Any]] = {  # fields whose absence stands for something else
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"sliding_window": None},
    "qwen3": {"attention_bias": False, "use_sliding_window": False},
}
GENERATION = "generation_config.json"
COPIED = (  # of a model's folder, where they are there
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
)
ROPE_FIELDS = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow"),
}


@dataclass(frozen=True)
class ModelFiles:
    """The files beside a model's weights.

    Attributes:
        model: what was trained, its RoPE and its context included.
        assets: the folder with the tokenizer and, where it came from Hugging Face, the model's own ``config.json``.
    """

    model: Pretrained
    assets: Path

    def write(self, folder: Path, dtype: str) -> None:
        """Write them into ``folder``, for weights of ``dtype``, for example ``"bfloat16"``."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in COPIED:
            source = self.assets / name
            if source.is_file() and not (folder / name).exists():
                shutil.copyfile(source, folder / name)
        values = self._own_config() | _config(self.model, dtype)
        if not {"bos_token_id", "eos_token_id"} & values.keys():
            values |= _special_tokens(self.assets)
        (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
        if not (folder / GENERATION).exists():
            ids = {name: values[name] for name in ("bos_token_id", "eos_token_id") if name in values}
            (folder / GENERATION).write_text(json.dumps(ids, indent=2) + "\n")

    def _own_config(self) -> dict[str, Any]:
        """What the model's own file says beside shape and RoPE; nothing where it has none, or it is another's."""
        path = self.assets / CONFIG
        values = read_config(path) if path.is_file() else {}
        return values if values.get("model_type") == self.model.model_type else {}


def _config(model: Pretrained, dtype: str) -> dict[str, Any]:
    rope = rope_values(model.rope)
    return FULL_ATTENTION[model.model_type] | {
        "architectures": [CLASSES[model.model_type]],
        "model_type": model.model_type,
        "hidden_act": "silu",
        "hidden_size": model.dim,
        "intermediate_size": model.inner,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied,
        "max_position_embeddings": model.length,
        # of Transformers 5, and of 4, which would silently take 10,000 for theta
        "rope_parameters": {**rope, "rope_theta": model.rope.theta},
        "rope_theta": model.rope.theta,
        "rope_scaling": None if model.rope.type == "none" else rope,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def rope_values(rope: RopeParameters) -> dict[str, Any]:
    """The entry of ``config.json`` for ``rope``, without its theta."""
    kind = next(theirs for theirs, ours in ROPE_TYPES.items() if ours == rope.type)
    values: dict[str, Any] = {"rope_type": kind}
    values |= {name: getattr(rope, name) for name in ROPE_FIELDS[rope.type]}
    if rope.type in ("llama3", "yarn"):
        values["original_max_position_embeddings"] = rope.original_length
    if rope.type == "yarn" and rope.attention_factor:
        values["attention_factor"] = rope.attention_factor
    return values


def _special_tokens(assets: Path) -> dict[str, int]:
    """Numbers of the tokens that ``tokenizer_config.json`` says begin and end a text."""
    path, tokenizer_path = assets / "tokenizer_config.json", assets / "tokenizer.json"
    if not (path.is_file() and tokenizer_path.is_file()):
        return {}
    values, tokenizer = read_config(path), Tokenizer.from_file(str(tokenizer_path))
    ids: dict[str, int] = {}
    for name in ("bos_token", "eos_token"):
        token = values.get(name)
        number = tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token) if token else None
        if number is not None:
            ids[f"{name}_id"] = number
    return ids
