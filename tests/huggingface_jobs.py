"""Small trainings with Transformers' trainers, on one rank or as one of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from tests.ranks import preload
from torchtitan_upipe.huggingface.trainer import ContextParallelTrainer

preload(__name__)

SMALL = {"vocab_size": 128, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
Log = list[dict[str, float]]


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=6, num_key_value_heads=2, use_cache=False, **SMALL))


def qwen2() -> PreTrainedModel:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1}
    return Qwen2ForCausalLM(Qwen2Config(use_cache=False, tie_word_embeddings=True, **heads, **SMALL))


def mistral() -> PreTrainedModel:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}
    return MistralForCausalLM(MistralConfig(sliding_window=None, use_cache=False, **heads, **SMALL))


def qwen3() -> PreTrainedModel:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16}
    return Qwen3ForCausalLM(Qwen3Config(use_cache=False, **heads, **SMALL))


def conversations(number: int = 48) -> list[dict[str, list[int]]]:
    """Token ids of many lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(10, 40, (number,), generator=generator).tolist()
    return [{"input_ids": torch.randint(1, 128, (n,), generator=generator).tolist()} for n in lengths]


def padded(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(value: int, fill: int) -> Tensor:
        ids = [row["input_ids"] if value < 0 else [value] * len(row["input_ids"]) for row in rows]
        return torch.tensor([row + [fill] * (longest - len(row)) for row in ids])

    return {"input_ids": pad(-1, 0), "labels": pad(-1, -100), "attention_mask": pad(1, 0)}


def packed(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    ids = torch.tensor([token for row in rows for token in row["input_ids"]])
    positions = torch.tensor([place for row in rows for place in range(len(row["input_ids"]))])
    return {
        "input_ids": ids[None],
        "labels": ids.masked_fill(positions == 0, -100)[None],
        "position_ids": positions[None],
    }


COLLATORS = {"padded": padded, "packed": packed}


def arguments(folder: Path, ranks: int, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "max_steps": 10,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": 5,
        "learning_rate": 1e-3,
    }
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        fsdp=ranks > 1,
        **(defaults | options),
    )


def train(
    folder: Path,
    ranks: int,
    model: PreTrainedModel,
    collator: str,
    context_parallel: dict[str, Any] | None,
    cp_size: int | None = None,
    resume: str | None = None,
    callbacks: list[TrainerCallback] | None = None,
    evaluated: int = 7,
    **options: Any,
) -> Trainer:
    """Train; with ``context_parallel`` None by Transformers' own trainer."""
    common: dict[str, Any] = {
        "model": model,
        "args": arguments(folder, ranks, **options),
        "train_dataset": conversations(),
        "eval_dataset": conversations(evaluated),
        "data_collator": COLLATORS[collator],
        "callbacks": callbacks,
    }
    if context_parallel is None:
        trainer = Trainer(**common)
    else:
        trainer = ContextParallelTrainer(**common, context_parallel=context_parallel, cp_size=cp_size)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def log_of(trainer: Trainer) -> Log:
    """Loss and gradient norm of every step, and the evaluations' losses."""
    kept = ("step", "loss", "grad_norm", "eval_loss")
    lines = [{key: value for key, value in line.items() if key in kept} for line in trainer.state.log_history]
    return [line for line in lines if len(line) > 1]
