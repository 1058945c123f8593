"""TorchTitan's models with the plugin's attention, registered as ``llama3_upipe`` and ``qwen3_upipe``."""

from __future__ import annotations

from dataclasses import replace

from torchtitan.models import llama3, qwen3
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from torchtitan_upipe.titan.adapter import AnyDegreeLlama3Adapter
from torchtitan_upipe.titan.datasets import build_dataloader, register_datasets
from torchtitan_upipe.titan.flavors import LLAMA3_DEBUG, QWEN3_DEBUG
from torchtitan_upipe.titan.metrics import build_metrics
from torchtitan_upipe.titan.parallelize import Parallelize
from torchtitan_upipe.titan.pretrained import FLAVOR, Llama, PretrainedLlamaArgs, PretrainedQwenArgs
from torchtitan_upipe.titan.rope import LLAMA_ROPE, QWEN_ROPE
from torchtitan_upipe.titan.validator import build_validator


def llama3_spec() -> TrainSpec:
    """TorchTitan's Llama3, its flavors and adapters, with the plugin's parallelize function and debug flavors."""
    spec = llama3.get_train_spec()
    return replace(
        spec,
        model_cls=Llama,
        model_args={**spec.model_args, **LLAMA3_DEBUG, FLAVOR: PretrainedLlamaArgs()},
        parallelize_fn=Parallelize(spec.parallelize_fn, LLAMA_ROPE),
        pipelining_fn=None,
        build_dataloader_fn=build_dataloader,
        build_validator_fn=build_validator,
        build_metrics_processor_fn=build_metrics,
        state_dict_adapter=AnyDegreeLlama3Adapter,
    )


def qwen3_spec() -> TrainSpec:
    """TorchTitan's Qwen3, its flavors and adapters, with the plugin's parallelize function and debug flavors."""
    spec = qwen3.get_train_spec()
    return replace(
        spec,
        model_args={**spec.model_args, **QWEN3_DEBUG, FLAVOR: PretrainedQwenArgs()},
        parallelize_fn=Parallelize(spec.parallelize_fn, QWEN_ROPE),
        build_dataloader_fn=build_dataloader,
        build_validator_fn=build_validator,
        build_metrics_processor_fn=build_metrics,
    )


SPECS = {"llama3_upipe": llama3_spec, "qwen3_upipe": qwen3_spec}

register_datasets()
for _name, _spec in SPECS.items():
    register_train_spec(_name, _spec())
