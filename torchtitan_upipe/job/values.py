"""What a single field of a job may hold, beyond its type."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torchtitan.config import JobConfig

LONGEST = 2**31 - 1  # tokens of a sequence: attention kernels count them in 32 bits

# Names end in the section that must be enabled for the field to matter: TorchTitan reads it only then.
COUNTS: dict[str, int] = {  # field -> smallest value
    "training.steps": 1,
    "training.local_batch_size": 1,
    "training.seq_len": 1,
    "training.gc_freq": 1,
    "training.dataloader.num_workers": 0,
    "metrics.log_freq": 1,
    "comm.init_timeout_seconds": 1,
    "comm.train_timeout_seconds": 1,
    "comm.trace_buf_size": 0,
    "lr_scheduler.warmup_steps": 0,
    "health.max_skipped": 1,
    "parallelism.context_parallel_degree": 1,
    "parallelism.data_parallel_replicate_degree": 1,
    "parallelism.tensor_parallel_degree": 1,
    "parallelism.pipeline_parallel_degree": 1,
    "parallelism.expert_parallel_degree": 1,
}
COUNTS_WHERE_ENABLED: dict[str, int] = {
    "validation.local_batch_size": 1,
    "validation.seq_len": 1,
    "validation.freq": 1,
    "validation.dataloader.num_workers": 0,
    "checkpoint.interval": 1,
    "checkpoint.keep_latest_k": 0,
    "checkpoint.load_step": -1,
}
NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {  # field -> test, what it asks for
    "training.max_norm": (lambda x: x > 0, "positive; inf leaves gradients unclipped"),
    "optimizer.lr": (lambda x: 0 <= x < math.inf, "a finite number of at least 0"),
    "optimizer.eps": (lambda x: 0 < x < math.inf, "a finite positive number"),
    "optimizer.beta1": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
    "optimizer.beta2": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
    "optimizer.weight_decay": (lambda x: 0 <= x < math.inf, "a finite number of at least 0"),
    "lr_scheduler.min_lr_factor": (lambda x: 0 <= x <= 1, "between 0 and 1"),
    "lr_scheduler.decay_ratio": (lambda x: 0 <= x <= 1, "between 0 and 1"),
    "context_parallel.stash_budget_gib": (lambda x: 0 <= x < math.inf, "a finite number of GiB; 0 = no limit"),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "optimizer.name": ("Adam", "AdamW"),
    "activation_checkpoint.determinism_check": ("default", "none"),
}


def check_values(config: JobConfig) -> None:
    """Refuse a value that no job can use.

    Raises:
        ValueError: the first such field, its value and what it may hold.
    """
    counts = dict(COUNTS)
    counts |= {name: least for name, least in COUNTS_WHERE_ENABLED.items() if _enabled(config, name)}
    for name, least in counts.items():
        if (count := _value(config, name)) < least:
            raise ValueError(f"{name} = {count} must be at least {least}.")
    for name, (fits, wanted) in NUMBERS.items():
        number = _value(config, name)
        if number is not None and not fits(number):  # NaN fits nothing
            raise ValueError(f"{name} = {number:g} must be {wanted}.")
    for name, choices in CHOICES.items():
        if (choice := _value(config, name)) not in choices:
            raise ValueError(f"{name} = {choice!r} is unknown; choose {' or '.join(map(repr, choices))}.")
    _check_the_rest(config)


def _check_the_rest(config: JobConfig) -> None:
    for section in ("training", "validation") if config.validation.enable else ("training",):
        length, workers = _value(config, f"{section}.seq_len"), _value(config, f"{section}.dataloader.num_workers")
        if length > LONGEST:
            raise ValueError(f"{section}.seq_len = {length} must be at most {LONGEST}, what a kernel can count.")
        if workers > 1:
            raise ValueError(
                f"{section}.dataloader.num_workers = {workers} would serve each batch {workers} times; set it to 1, "
                "a process that reads ahead, or 0."
            )
    checkpoint = config.checkpoint
    if checkpoint.enable and checkpoint.keep_latest_k == 1:
        raise ValueError(
            "checkpoint.keep_latest_k = 1 would delete the last checkpoint while the next one is written; set it to "
            "2 or more, or 0 to keep all."
        )
    total_steps, steps = config.lr_scheduler.total_steps, config.training.steps
    if total_steps is not None and total_steps < steps:
        raise ValueError(
            f"lr_scheduler.total_steps = {total_steps} must be at least training.steps = {steps}: beyond its end a "
            "schedule goes on falling, below zero; leave it out for all steps."
        )
    if config.optimizer.early_step_in_backward:
        raise ValueError(
            "optimizer.early_step_in_backward = true changes weights while backward runs, before the gradient norm by "
            "which a step is clipped or given up is known; remove it."
        )
    option, mode = config.activation_checkpoint.selective_ac_option, config.activation_checkpoint.mode
    if mode == "selective" and option != "op" and not (option.isdecimal() and int(option) > 0):
        raise ValueError(
            f'activation_checkpoint.selective_ac_option = {option!r} must be "op" or a positive number n, which '
            "checkpoints every n-th layer."
        )


def _enabled(config: JobConfig, name: str) -> bool:
    return bool(_value(config, f"{name.partition('.')[0]}.enable"))


def _value(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config
