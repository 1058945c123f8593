"""Which model a job trains, and its RoPE."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torchtitan.config import JobConfig
from torchtitan.protocols import BaseModelArgs
from torchtitan.protocols.train_spec import _extra_train_specs, get_train_spec

from torchtitan_upipe.cp.frequencies import RopeParameters
from torchtitan_upipe.job.pretrained import CONFIG, MODEL_NAMES, PretrainedArgs, read_config, read_pretrained
from torchtitan_upipe.job_config import RopeScaling

USED = {  # fields of [model.rope_scaling], by type
    "model": (),
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
}


def model_args(config: JobConfig) -> BaseModelArgs:
    """TorchTitan's arguments of the job's model and flavor; see :func:`args_of`."""
    return args_of(config.model.name, config.model.flavor, config.model.hf_assets_path)


def args_of(name: str, flavor: str, assets: str) -> Any:
    """TorchTitan's arguments of a model and flavor, ``assets`` being ``model.hf_assets_path``.

    Raises:
        ValueError: no such model, no such flavor, or a ``config.json`` that is not supported.
    """
    if name not in _extra_train_specs:  # TorchTitan's own models do not attach the plugin's methods
        raise ValueError(
            f"model.name = {name!r} is unknown here; choose one of {', '.join(_extra_train_specs)}, or name the module "
            "that registers it in experimental.custom_import."
        )
    flavors = get_train_spec(name).model_args
    if flavor not in flavors:
        raise ValueError(f"model.flavor = {flavor!r} is unknown for {name}; choose one of {', '.join(flavors)}.")
    args = flavors[flavor]
    return args.filled(assets) if isinstance(args, PretrainedArgs) else args


def own_rope(args: Any) -> RopeParameters:
    """The RoPE that a model's arguments name: ``rope``, or what TorchTitan's Llama3 and Qwen3 have."""
    if isinstance(rope := getattr(args, "rope", None), RopeParameters):
        return rope
    scaling = getattr(args, "rope_scaling_args", None)
    if scaling is None:
        return RopeParameters(args.rope_theta)
    return RopeParameters(
        args.rope_theta,
        "llama3",
        scaling.scaling_factor,
        scaling.original_max_position_embeddings,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )


def job_rope(config: JobConfig, args: BaseModelArgs) -> RopeParameters:
    """The RoPE that the job trains with: the model's own, as far as ``[model]`` does not say otherwise.

    Raises:
        ValueError: a field that has no meaning for the type, is missing, or out of its range.
    """
    own, theta, scaling = own_rope(args), config.model.rope_theta, config.model.rope_scaling
    own = own if theta is None else replace(own, theta=theta)
    _check_rope(config, own)
    if scaling.type == "model":
        return own
    return RopeParameters(
        own.theta,
        scaling.type,
        scaling.factor or 1.0,
        scaling.original_max_position_embeddings or own.original_length,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
        scaling.beta_fast,
        scaling.beta_slow,
        scaling.attention_factor,
    )


def check_rope_of_weights(config: JobConfig, args: BaseModelArgs) -> None:
    """Refuse Hugging Face weights that were trained with another RoPE than the flavor's, if the job names none.

    Raises:
        ValueError: such weights; TorchTitan's Llama3, for example, always turns as Llama 3.1 does, never as 3.0.
    """
    checkpoint, model = config.checkpoint, config.model
    folder = Path(checkpoint.initial_load_path or model.hf_assets_path)
    if not (checkpoint.enable and checkpoint.initial_load_in_hf) or isinstance(args, PretrainedArgs):
        return
    if model.rope_theta is not None or model.rope_scaling.type != "model" or not (folder / CONFIG).is_file():
        return
    if read_config(folder / CONFIG).get("model_type") not in MODEL_NAMES:
        return  # of a model of the user's
    own, theirs = own_rope(args), read_pretrained(str(folder)).rope
    if own.scale != theirs.scale or not torch.equal(own.frequencies(128), theirs.frequencies(128)):
        raise ValueError(
            f"the weights in {folder} have RoPE of theta {theirs.theta:g} and type {theirs.type!r}, and model.flavor = "
            f'{model.flavor!r} another, of theta {own.theta:g} and type {own.type!r}; set model.flavor = "hf", or '
            "model.rope_theta and model.rope_scaling."
        )


def _check_rope(config: JobConfig, own: RopeParameters) -> None:
    scaling, section = config.model.rope_scaling, "model.rope_scaling"
    if config.model.rope_theta is not None and not 1 < config.model.rope_theta < math.inf:
        raise ValueError(f"model.rope_theta = {config.model.rope_theta:g} must be a finite number above 1.")
    if scaling.type not in USED:
        raise ValueError(f"{section}.type = {scaling.type!r} is unknown; choose one of {', '.join(USED)}.")
    used = USED[scaling.type]
    for field in fields(RopeScaling):
        if field.name not in ("type", *used) and getattr(scaling, field.name) != field.default:
            raise ValueError(
                f"{section}.{field.name} = {getattr(scaling, field.name):g} has no meaning for type = "
                f'"{scaling.type}"; remove it, or set {section}.type.'
            )
    limits = {
        "factor": (1 <= scaling.factor < math.inf, "a finite number of at least 1"),
        "low_freq_factor": (0 < scaling.low_freq_factor < scaling.high_freq_factor, "between 0 and high_freq_factor"),
        "beta_slow": (0 < scaling.beta_slow < scaling.beta_fast, "between 0 and beta_fast"),
        "attention_factor": (0 <= scaling.attention_factor < math.inf, "a finite number; 0 = 0.1 ln(factor) + 1"),
        "original_max_position_embeddings": (
            (scaling.original_max_position_embeddings or own.original_length) > 0,
            "the model's context before; its flavor names none",
        ),
    }
    for name, (fits, wanted) in limits.items():
        if name in used and not fits:
            raise ValueError(f"{section}.{name} = {getattr(scaling, name):g} must be {wanted}.")
