"""Checks across fields, made before anything is allocated. Every refusal is one sentence with numbers and a remedy."""

from __future__ import annotations

from typing import Any, cast

import torch
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.protocols import BaseModelArgs

from torchtitan_upipe.cp.head_schedule import check_heads
from torchtitan_upipe.data.sharding import load_balancer
from torchtitan_upipe.device import SIMULATED
from torchtitan_upipe.job.evaluation import check_evaluation
from torchtitan_upipe.job.files import check_files
from torchtitan_upipe.job.model import check_rope_of_weights, job_rope, own_rope
from torchtitan_upipe.job.pretrained import PretrainedArgs
from torchtitan_upipe.job.shape import HIDDEN_ON_HOST
from torchtitan_upipe.job.values import check_values
from torchtitan_upipe.job_config import ContextParallel, Health
from torchtitan_upipe.kernels.select import check_kernel


def validate_job(config: JobConfig, model_args: BaseModelArgs, world_size: int, device_type: str) -> None:
    """Refuse a job that cannot run as written.

    Args:
        config: the whole job, with the plugin's sections.
        model_args: TorchTitan's arguments of the chosen flavor.
        world_size: number of ranks.
        device_type: ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: the first thing that is wrong.
    """
    check_values(config)
    _check_unsupported(config, model_args)
    _check_parallelism(config, world_size)
    _check_batch(config, world_size)
    _check_sequence(config)
    _check_heads(config, model_args)
    _check_settings(config)
    _check_health(config)
    job_rope(config, model_args)
    _check_offload(config, world_size)
    _check_hidden_states(config, world_size)
    _check_seed_checkpoint(config, world_size)
    _check_device(config, device_type)
    if config.evaluation.enable:
        check_evaluation(config)
    if device_type != SIMULATED:  # which stands for a machine that may have what this one lacks
        check_files(config, vocab_size=cast(Any, model_args).vocab_size)
        check_rope_of_weights(config, model_args)
    kernel = config.context_parallel.attention_kernel
    check_kernel(kernel, device_type, _attention_dtype(config), config.debug.deterministic)


def _attention_dtype(config: JobConfig) -> torch.dtype:
    """The dtype of hidden states and of the weights that meet them."""
    training = config.training
    return TORCH_DTYPE_MAP["bfloat16" if training.dtype == "bfloat16" else training.mixed_precision_param]


def _check_parallelism(config: JobConfig, world_size: int) -> None:
    p = config.parallelism
    used = p.context_parallel_degree * p.data_parallel_replicate_degree
    if p.context_parallel_degree > world_size:
        raise ValueError(
            f"context_parallel_degree = {p.context_parallel_degree} is larger than the world of {world_size} ranks; "
            f"start {p.context_parallel_degree} ranks (--nproc_per_node) or set the degree to {world_size}."
        )
    shard = p.data_parallel_shard_degree
    if shard == -1 and world_size % used == 0:
        return
    if shard == -1 or shard < 1 or used * shard != world_size:
        raise ValueError(
            f"context_parallel_degree = {p.context_parallel_degree} x data_parallel_replicate_degree = "
            f"{p.data_parallel_replicate_degree} x data_parallel_shard_degree = {shard} do not make the world of "
            f"{world_size} ranks; set data_parallel_shard_degree = -1 to use what is left, "
            "or change the number of ranks."
        )


def _check_batch(config: JobConfig, world_size: int) -> None:
    training, tile_size = config.training, config.context_parallel.tile_size
    if tile_size < 0:
        raise ValueError(f"context_parallel.tile_size = {tile_size} must be a number of rows, or 0 for no tiling.")
    batch_ranks = world_size // config.parallelism.context_parallel_degree
    per_pass = training.local_batch_size * batch_ranks
    if training.global_batch_size >= 0 and (training.global_batch_size < 1 or training.global_batch_size % per_pass):
        near = max(training.global_batch_size // per_pass, 1) * per_pass
        raise ValueError(
            f"training.global_batch_size = {training.global_batch_size} must be a multiple of local_batch_size = "
            f"{training.local_batch_size} x {batch_ranks} data-parallel ranks; nearest: {near} or {near + per_pass}."
        )
    if config.validation.enable and config.validation.steps == -1 and batch_ranks > 1:
        raise ValueError(
            f"validation.steps = -1 takes all data, of which the {batch_ranks} data-parallel ranks may hold unequal "
            "numbers of batches and wait for each other; set validation.steps."
        )


def _check_sequence(config: JobConfig) -> None:
    cp, degree = config.context_parallel, config.parallelism.context_parallel_degree
    if cp.ring_degree < 1 or degree % cp.ring_degree or (cp.method == "ring" and cp.ring_degree not in (1, degree)):
        raise ValueError(
            f"ring_degree = {cp.ring_degree} must divide context_parallel_degree = {degree}; "
            'with method = "ring" leave it out, since all ranks are in the ring.'
        )
    if cp.method in ("torchtitan", "fpdt") and cp.ring_degree != 1:
        raise ValueError(
            f'ring_degree = {cp.ring_degree} has no meaning for method = "{cp.method}"; remove it, or use "ulysses".'
        )
    if cp.method != "fpdt" and cp.sequence_chunk != ContextParallel.sequence_chunk:
        raise ValueError(
            f'sequence_chunk = {cp.sequence_chunk} has no meaning for method = "{cp.method}", which takes the sequence '
            'as a whole; remove it or set method = "fpdt".'
        )
    if cp.method == "fpdt" and cp.sequence_chunk < degree:
        raise ValueError(
            f"sequence_chunk = {cp.sequence_chunk} leaves some of the {degree} context-parallel ranks without a token "
            f"of each chunk; set it to {degree} or more."
        )
    lengths = {"training.seq_len": config.training.seq_len}
    if config.validation.enable:
        lengths["validation.seq_len"] = config.validation.seq_len
    for name, length in lengths.items():
        if length < degree:
            raise ValueError(
                f"{name} = {length} leaves some of the {degree} context-parallel ranks without a token; "
                f"set it to {degree} or more."
            )
        if cp.method == "torchtitan" and length % (2 * degree):
            near = max(length // (2 * degree), 1) * 2 * degree
            raise ValueError(
                f"{name} = {length} must be a multiple of {2 * degree} (twice context_parallel_degree) for method = "
                f'"torchtitan", which does not pad; nearest: {near} or {near + 2 * degree}.'
            )
    balancer = config.parallelism.context_parallel_load_balancer
    if degree > 1 and balancer not in (None, load_balancer(cp.method, cp.ring_degree)):
        raise ValueError(
            f"context_parallel_load_balancer = {balancer!r} permutes the sequence, but method = {cp.method!r} with "
            f"ring_degree = {cp.ring_degree} shards it in its own way; remove the field."
        )


def _check_heads(config: JobConfig, model_args: BaseModelArgs) -> None:
    args: Any = model_args
    cp = config.context_parallel
    num_heads, num_kv_heads = args.n_heads, args.n_kv_heads or args.n_heads
    if cp.method != "upipe" and cp.head_chunk not in (0, num_heads):
        raise ValueError(
            f'head_chunk = {cp.head_chunk} has no meaning for method = "{cp.method}", which handles all {num_heads} '
            'heads at once; remove it or set method = "upipe".'
        )
    check_heads(num_heads, num_kv_heads, cp.head_chunk or num_heads)
    tokens = config.training.seq_len // config.parallelism.context_parallel_degree
    if not 1 <= cp.query_tiles <= tokens:
        raise ValueError(
            f"query_tiles = {cp.query_tiles} must be between 1 and {tokens}, the tokens of a rank; "
            f"nearest: {min(max(cp.query_tiles, 1), tokens)}."
        )
    if cp.query_tiles > 1 and cp.method != "upipe":
        raise ValueError(
            f'query_tiles = {cp.query_tiles} has no meaning for method = "{cp.method}"; remove it or set '
            'method = "upipe".'
        )
    if cp.stash_budget_gib and cp.stash != "host":
        raise ValueError(
            f'stash_budget_gib = {cp.stash_budget_gib:g} limits host memory for stash = "host", and stash = '
            f'"{cp.stash}"; set it to a positive number with stash = "host", or remove it.'
        )


def _check_settings(config: JobConfig) -> None:
    cp = config.context_parallel
    if cp.settings != "auto":
        return
    if cp.method == "torchtitan":
        raise ValueError(
            'settings = "auto" has nothing to choose for method = "torchtitan"; remove it, or choose another method.'
        )
    planned: list[tuple[str, object, tuple[str, ...]]] = [
        (
            "context_parallel",
            cp,
            ("head_chunk", "query_tiles", "sequence_chunk", "stash", "stash_budget_gib", "tile_size", "hidden_states"),
        ),
        ("activation_checkpoint", config.activation_checkpoint, ("mode", "offload")),
    ]
    by_hand = [
        f"{section}.{name} = {getattr(fields, name)!r}"
        for section, fields, names in planned
        for name in names
        if getattr(fields, name) != getattr(type(fields)(), name)
    ]
    if by_hand:
        raise ValueError(
            f'context_parallel.settings = "auto" chooses what is set by hand as well: {", ".join(by_hand)}; remove '
            "these, or settings."
        )


def _check_health(config: JobConfig) -> None:
    health = config.health
    if health.on_nonfinite == "stop" and health.max_skipped != Health.max_skipped:
        raise ValueError(
            f'health.max_skipped = {health.max_skipped} has no meaning for on_nonfinite = "stop"; remove it, or set '
            'health.on_nonfinite = "skip".'
        )


def _check_unsupported(config: JobConfig, model_args: BaseModelArgs) -> None:
    p = config.parallelism
    refusals = {
        "tensor parallelism": (p.tensor_parallel_degree > 1, "set parallelism.tensor_parallel_degree = 1"),
        "pipeline parallelism": (p.pipeline_parallel_degree > 1, "set parallelism.pipeline_parallel_degree = 1"),
        "expert parallelism": (p.expert_parallel_degree > 1, "set parallelism.expert_parallel_degree = 1"),
        "a mixture of experts": (getattr(model_args, "moe_enabled", False), "choose a dense flavor"),
        "torch.compile": (config.compile.enable, "set compile.enable = false"),
        "activation_checkpoint.mode = 'memory_budget'": (
            config.activation_checkpoint.mode == "memory_budget",
            'it needs torch.compile; use "full", "selective" or "none"',
        ),
        "model converters": (bool(config.model.converters), "remove model.converters"),
        'comm.mode = "local_tensor"': (config.comm.mode == "local_tensor", 'set comm.mode = "default"'),
        "fault tolerance": (config.fault_tolerance.enable, "set fault_tolerance.enable = false"),
        "training.document_mask with TorchTitan's own context parallelism": (
            config.training.document_mask and config.context_parallel.method == "torchtitan",
            'set context_parallel.method = "upipe", "ulysses", "ring" or "fpdt"',
        ),
        "a RoPE of the job's or of a config.json with TorchTitan's own context parallelism": (
            config.context_parallel.method == "torchtitan" and _own_rope_differs(config, model_args),
            'set context_parallel.method = "upipe", "ulysses", "ring" or "fpdt"',
        ),
    }
    for feature, (asked, remedy) in refusals.items():
        if asked:
            raise ValueError(f"{feature} does not work with {config.model.name} yet; {remedy}.")
    attention = getattr(model_args, "attn_type", "sdpa")
    if attention != "sdpa":
        raise ValueError(
            f"model.flavor = {config.model.flavor!r} uses {attention} attention, which the plugin replaces; "
            "choose the flavor without the suffix."
        )


def _own_rope_differs(config: JobConfig, model_args: BaseModelArgs) -> bool:
    """Whether TorchTitan's table of angles, which only its own method reads, is not what the job asks for."""
    return isinstance(model_args, PretrainedArgs) or job_rope(config, model_args) != own_rope(model_args)


def _check_offload(config: JobConfig, world_size: int) -> None:
    checkpointing = config.activation_checkpoint
    replicas = config.parallelism.data_parallel_replicate_degree
    if config.training.enable_cpu_offload and 1 < world_size == replicas:
        raise ValueError(
            f"training.enable_cpu_offload = true moves what FSDP2 holds, nothing where each of the {replicas} ranks is "
            "a replica; remove it, or set data_parallel_shard_degree or context_parallel_degree above 1."
        )
    if checkpointing.offload and checkpointing.mode != "full":
        raise ValueError(
            f"activation_checkpoint.offload = true moves the inputs of checkpointed blocks, but mode = "
            f'{checkpointing.mode!r} does not checkpoint every block; set activation_checkpoint.mode = "full" '
            "or remove offload."
        )


def _check_hidden_states(config: JobConfig, world_size: int) -> None:
    cp, checkpointing, training = config.context_parallel, config.activation_checkpoint, config.training
    if cp.hidden_states == "device":
        return
    fsdp = training.enable_cpu_offload or world_size > config.parallelism.data_parallel_replicate_degree
    needs = {
        f'method = "{cp.method}"': (cp.method not in HIDDEN_ON_HOST, 'use "upipe", "ulysses" or "ring"'),
        "tile_size = 0": (cp.tile_size == 0, "set the rows that the device has at once, e.g. tile_size = 8192"),
        'stash = "device"': (cp.stash == "device", 'set stash = "host" or "none"'),
        f"activation_checkpoint.mode = {checkpointing.mode!r}": (
            checkpointing.mode != "full",
            'set it to "full": a block keeps its input and its stash alone',
        ),
        "activation_checkpoint.offload = true": (checkpointing.offload, "remove it: block inputs are there already"),
        f"training.mixed_precision_param = {training.mixed_precision_param!r} without FSDP2": (
            not fsdp and training.mixed_precision_param != training.dtype,
            "set training.enable_cpu_offload = true, or both dtypes alike",
        ),
    }
    for what, (wrong, remedy) in needs.items():
        if wrong:
            raise ValueError(f'context_parallel.hidden_states = "host" does not go with {what}; {remedy}.')


def _check_seed_checkpoint(config: JobConfig, world_size: int) -> None:
    if not config.checkpoint.create_seed_checkpoint:
        return
    if not config.checkpoint.enable:
        raise ValueError("checkpoint.create_seed_checkpoint = true writes nothing without checkpoint.enable = true.")
    if world_size != 1:
        raise ValueError(
            f"checkpoint.create_seed_checkpoint = true is for one rank, and this job has {world_size}; start it "
            "without torchrun, with all degrees 1."
        )


def _check_device(config: JobConfig, device_type: str) -> None:
    if device_type != "cpu":
        return
    cuda_only = {
        'context_parallel.method = "torchtitan"': config.context_parallel.method == "torchtitan",
        "training.dataloader.pin_memory = true": config.training.dataloader.pin_memory,
        'checkpoint.async_mode = "async_with_pinned_mem"': config.checkpoint.async_mode == "async_with_pinned_mem",
        "profiling.enable_profiling = true": config.profiling.enable_profiling,  # TorchTitan names no CPU activity
        "profiling.enable_memory_snapshot = true": config.profiling.enable_memory_snapshot,
        "training.gc_debug = true": config.training.gc_debug,  # which records CUDA's allocations
    }
    for option, asked in cuda_only.items():
        if asked:
            raise ValueError(f"{option} works on CUDA only and this job runs on cpu; remove it.")
