"""A Hugging Face model's ``config.json``: its shape and its RoPE, or a sentence that names what is not supported."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from torchtitan_upipe.cp.frequencies import RopeParameters

CONFIG = "config.json"
MODEL_NAMES = {"llama": "llama3_upipe", "mistral": "llama3_upipe", "qwen3": "qwen3_upipe"}  # by model_type
ROPE_TYPES = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}  # Transformers' names, ours
ROPE_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
NEEDED = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",)}


@dataclass(frozen=True)
class Pretrained:
    """A dense decoder of ``config.json``; ``length`` is its context, ``inner`` its feed-forward's width."""

    model_type: str
    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    norm_eps: float
    tied: bool
    length: int
    rope: RopeParameters


class PretrainedArgs(ABC):
    """TorchTitan's arguments of a flavor that takes its shape from a ``config.json``; a dataclass.

    Attributes:
        model_types: those of ``config.json`` that the model can be.
        assets: the folder that the shape was read from.
    """

    model_types: ClassVar[tuple[str, ...]]
    assets: str

    @abstractmethod
    def of(self, pretrained: Pretrained, assets: str) -> Self:
        """Arguments of that shape."""

    def filled(self, assets: str) -> Self:
        """Arguments of the model in the folder ``assets``.

        Raises:
            ValueError: see :func:`read_pretrained`, or the model is of another kind.
        """
        if self.assets == assets:
            return self
        pretrained = read_pretrained(assets)
        if pretrained.model_type not in self.model_types:
            raise ValueError(
                f"{Path(assets) / CONFIG} is of a {pretrained.model_type} model, and model.name takes "
                f'{" or ".join(self.model_types)}; set model.name = "{MODEL_NAMES[pretrained.model_type]}".'
            )
        return self.of(pretrained, assets)


def read_pretrained(assets: str) -> Pretrained:
    """What ``config.json`` in the folder ``assets`` says.

    Raises:
        ValueError: there is none, it is damaged, or the model has what this project does not compute.
    """
    path = Path(assets) / CONFIG
    values = read_config(path)
    model_type = values.get("model_type")
    if model_type not in MODEL_NAMES:
        raise ValueError(f"{path}: model_type = {model_type!r} is not supported; {', '.join(MODEL_NAMES)} are.")
    _check_supported(values, path)
    heads, length = _count(values, "num_attention_heads", path), _count(values, "max_position_embeddings", path)
    dim = _count(values, "hidden_size", path)
    kv_heads = _count(values, "num_key_value_heads", path, heads if model_type == "llama" else None)
    if heads % kv_heads:
        raise ValueError(f"{path}: num_attention_heads = {heads} is no multiple of num_key_value_heads = {kv_heads}.")
    return Pretrained(
        model_type=model_type,
        layers=_count(values, "num_hidden_layers", path),
        dim=dim,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_count(values, "head_dim", path, 128 if model_type == "qwen3" else dim // heads),
        inner=_count(values, "intermediate_size", path),
        vocab=_count(values, "vocab_size", path),
        norm_eps=_number(values, "rms_norm_eps", path, 1e-6),
        tied=bool(values.get("tie_word_embeddings", False)),
        length=length,
        rope=_read_rope(values, length, path),
    )


def read_config(path: Path) -> dict[str, Any]:
    """The object in a file of JSON.

    Raises:
        ValueError: there is none, or the file cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} does not exist; set model.hf_assets_path to a folder with a Hugging Face model."
        ) from error
    except (OSError, ValueError) as error:  # of which damaged JSON and text are kinds
        raise ValueError(f"{path} cannot be read ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__} where an object is expected.")
    return values


def _check_supported(values: Mapping[str, Any], path: Path) -> None:
    windowed = values.get("use_sliding_window", values["model_type"] == "mistral")
    # Mistral's window is 4096 where the file does not say null
    window = values.get("sliding_window", 4096 if values["model_type"] == "mistral" else None)
    layers = sorted(set(values.get("layer_types") or ()) - {"full_attention"})
    refused = {
        "attention_bias = true (biases of the projections)": values.get("attention_bias"),
        "mlp_bias = true (biases of the feed-forward)": values.get("mlp_bias"),
        f"sliding_window = {window} (attention within a window)": windowed and window,
        f"layer_types with {', '.join(layers)}": layers,
        f"hidden_act = {values.get('hidden_act')!r}": values.get("hidden_act", "silu") != "silu",
        f"attention_dropout = {values.get('attention_dropout')}": values.get("attention_dropout"),
        f"partial_rotary_factor = {values.get('partial_rotary_factor')}": values.get("partial_rotary_factor", 1) != 1,
        "quantization_config (quantised weights)": values.get("quantization_config"),
    }
    for feature, found in refused.items():
        if found:
            raise ValueError(f"{path}: {feature} is not supported.")


def _read_rope(values: Mapping[str, Any], length: int, path: Path) -> RopeParameters:
    """RoPE in the spelling of Transformers 5, ``rope_parameters``, or of 4, ``rope_theta`` and ``rope_scaling``."""
    theta = values.get("rope_theta", 10000.0)
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    if isinstance(new, dict):
        rope = _rope_of({"rope_theta": theta, **new}, "rope_parameters", length, path)
        if isinstance(old, dict) and _rope_of({"rope_theta": theta, **old}, "rope_scaling", length, path) != rope:
            raise ValueError(f"{path}: rope_parameters and rope_scaling say different things; remove one.")
        return rope
    return _rope_of({"rope_theta": theta, **(old or {})}, "rope_scaling", length, path)


def _rope_of(rope: Mapping[str, Any], name: str, length: int, path: Path) -> RopeParameters:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(f"{path}: {name} of type {kind!r} is not supported; {', '.join(ROPE_TYPES)} are.")
    for key in ("mscale", "mscale_all_dim"):
        if rope.get(key) is not None:
            raise ValueError(f"{path}: {name} with {key} is not supported.")
    if not rope.get("truncate", True) or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{path}: {name} with truncate = false or partial_rotary_factor is not supported.")
    for key in NEEDED.get(ROPE_TYPES[kind], ()):
        _number(rope, key, path)
    numbers = {key: _number(rope, key, path) for key in ROPE_NUMBERS if rope.get(key) is not None}
    return RopeParameters(
        theta=_number(rope, "rope_theta", path),
        type=ROPE_TYPES[kind],
        original_length=_count(rope, "original_max_position_embeddings", path, length),
        **(numbers if kind != "default" else {}),
    )


def _count(values: Mapping[str, Any], name: str, path: Path, default: int | None = None) -> int:
    value = values.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{path}: {name} = {value!r} is no positive whole number.")
    return value


def _number(values: Mapping[str, Any], name: str, path: Path, default: float | None = None) -> float:
    value = values.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{path}: {name} = {value!r} is no positive number.")
    return float(value)
