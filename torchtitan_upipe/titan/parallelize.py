"""Attach the context-parallel method to a model, then hand over to TorchTitan's own parallelize function."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate import DDP
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import ParallelizeFunction
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

from torchtitan_upipe.cp.build import build_method
from torchtitan_upipe.cp.fpdt import FPDT
from torchtitan_upipe.cp.stashing import StashForBothRuns, StashingMethod
from torchtitan_upipe.cp.strategy import ContextParallelMethod
from torchtitan_upipe.cp.upipe import UPipe
from torchtitan_upipe.data.sharding import chunk_of, degrees, length_divisor, load_balancer
from torchtitan_upipe.device import prepare_for_gloo
from torchtitan_upipe.job.check import validate_job
from torchtitan_upipe.job.model import job_rope
from torchtitan_upipe.job.shape import job_shape
from torchtitan_upipe.kernels.select import build_kernel
from torchtitan_upipe.stash.hidden import HiddenStates
from torchtitan_upipe.stash.host_pool import HostPool
from torchtitan_upipe.stash.offload import BlockOffload, OffloadedBlock
from torchtitan_upipe.stash.stash import Stash
from torchtitan_upipe.titan.attention import ContextParallelAttention
from torchtitan_upipe.titan.dims import AttachedDims, TrainerDims
from torchtitan_upipe.titan.hidden import hide_states
from torchtitan_upipe.titan.rope import RopeOfModel
from torchtitan_upipe.titan.settings import choose_settings
from torchtitan_upipe.titan.tiled import tile_model

NewStash = Callable[[], Stash]


class Parallelize:
    """The ``parallelize_fn`` of a train spec.

    Args:
        titan_parallelize: TorchTitan's function for the same model.
        rope: how the model rotates.
    """

    def __init__(self, titan_parallelize: ParallelizeFunction, rope: RopeOfModel) -> None:
        self.titan_parallelize = titan_parallelize
        self.rope = rope

    def __call__(self, model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
        """Parallelize ``model`` (on the meta device) in place.

        Raises:
            ValueError: see :func:`~torchtitan_upipe.job.check.validate_job`; the stock ``torchtitan.train`` has not
                asked before.
        """
        model_args: Any = model.model_args
        if not isinstance(parallel_dims, TrainerDims):
            _check_for_stock_trainer(job_config, parallel_dims.world_size)
            validate_job(job_config, model_args, parallel_dims.world_size, device_type)
        choose_settings(job_config, parallel_dims.world_size)
        cp = job_config.context_parallel  # the stock trainer shards by the field set here
        job_config.parallelism.context_parallel_load_balancer = load_balancer(cp.method, cp.ring_degree)
        dims: Any = parallel_dims
        pool = HostPool()
        if cp.method != "torchtitan":
            dims = AttachedDims(parallel_dims)
            self._attach(model, parallel_dims, job_config, pool)
        if cp.hidden_states == "host":
            job_config = _hide_states(model, job_config, parallel_dims.world_size, pool)
        elif cp.tile_size:
            tile_model(model, cp.tile_size)
            logger.info(f"Norm, feed-forward and loss work in tiles of {cp.tile_size} rows")
        if job_config.activation_checkpoint.mode == "full":
            job_config = _checkpoint_blocks(model, job_config, pool)
        with _tied_weights_sharded(model, parallel_dims, job_config):
            model = self.titan_parallelize(model, dims, job_config)
        _sum_replicated_gradients(model)
        prepare_for_gloo(model)
        return model

    def _attach(self, model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig, pool: HostPool) -> None:
        cp = job_config.context_parallel
        ulysses_group, ring_group = _groups(parallel_dims, *degrees(cp.method, parallel_dims.cp, cp.ring_degree))
        stashes = _stashes(job_config, parallel_dims.world_size, pool)
        blocks: Any = model.layers
        head_dim = next(iter(blocks.values())).attention.head_dim
        model_args: Any = model.model_args
        rope = job_rope(job_config, model_args)
        frequencies = rope.frequencies(head_dim).to(device_type)  # once: a copy makes the host wait
        self.rope.drop_table(model)
        kernel = build_kernel(cp.attention_kernel, device_type, head_dim)
        for block, new_stash in zip(blocks.values(), stashes, strict=True):
            method = build_method(
                cp.method,
                num_heads=block.attention.n_heads,
                num_kv_heads=block.attention.n_kv_heads,
                head_chunk=cp.head_chunk,
                new_stash=new_stash,
                query_tiles=cp.query_tiles,
                put_away=pool.put,
                sequence_chunk=chunk_of(cp.method, parallel_dims.cp, cp.sequence_chunk),
                staged=cp.hidden_states == "host",
                ulysses_group=ulysses_group,
                ring_group=ring_group,
                kernel=kernel,
            )
            block.attention = ContextParallelAttention(
                block.attention, method, self.rope, frequencies, rope.scale, job_config.training.document_mask
            )
        logger.info(
            f"Attached context parallelism to the model: {cp.method} over {parallel_dims.cp} ranks, "
            f"attention kernel {kernel.name}{_describe(method)}"
            + (f", {_describe_stash(cp.stash, stashes)}" if isinstance(method, StashingMethod) else "")
        )
        if isinstance(method, UPipe) and cp.head_chunk not in (0, method.schedule.head_chunk):
            logger.warning(
                f"head_chunk = {cp.head_chunk} is rounded to {method.schedule.head_chunk}, which keeps the "
                f"{method.exchange.size} ranks of the all-to-all equally busy"
            )
        if isinstance(method, FPDT) and cp.sequence_chunk != method.sequence_chunk:
            logger.warning(
                f"sequence_chunk = {cp.sequence_chunk} is rounded to {method.sequence_chunk}, of which each of the "
                f"{method.exchange.size} ranks holds equally many tokens"
            )


def _check_for_stock_trainer(config: JobConfig, world_size: int) -> None:
    """Refuse what needs this project's trainer, before TorchTitan's would abort in the middle of a collective.

    Raises:
        ValueError: the field, and the command that does it.
    """
    cp, degree, length = config.context_parallel, config.parallelism.context_parallel_degree, config.training.seq_len
    divisor = length_divisor(*degrees(cp.method, degree, cp.ring_degree))
    needs = {
        f"training.seq_len = {length}, no multiple of {divisor}, is padded": length % divisor != 0,
        f"context_parallel.tile_size = {cp.tile_size} computes the loss in tiles": cp.tile_size > 0,
        f"context_parallel.ring_degree = {cp.ring_degree} shards for a hybrid": cp.ring_degree not in (1, degree),
        'context_parallel.settings = "auto" may choose tiles': cp.settings == "auto",
        'context_parallel.method = "fpdt" shards each chunk of the sequence': cp.method == "fpdt" and degree > 1,
        "training.document_mask = true finds documents": config.training.document_mask,
        "evaluation.enable = true evaluates": config.evaluation.enable,
        "training.enable_cpu_offload = true gives one rank to FSDP2": (
            config.training.enable_cpu_offload and world_size == 1
        ),
    }
    for need, asked in needs.items():
        if asked:
            raise ValueError(
                f"{need}, which TorchTitan's own trainer does not do; start the job with "
                "`torchrun -m torchtitan_upipe.train`."
            )


def _groups(
    parallel_dims: ParallelDims, ulysses_degree: int, ring_degree: int
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """The groups of the all-to-alls (neighbouring ranks) and of the ring (across), None where there is one rank."""
    mesh = parallel_dims.get_optional_mesh("cp")
    if mesh is None:
        return None, None
    if ring_degree == 1:
        return mesh.get_group(), None
    if ulysses_degree == 1:
        return None, mesh.get_group()
    assert isinstance(parallel_dims, TrainerDims)  # the stock trainer's are refused
    return parallel_dims.hybrid_groups(ulysses_degree, ring_degree)


def _describe(method: ContextParallelMethod) -> str:
    if isinstance(method, FPDT):
        return f", chunks of {method.sequence_chunk} tokens"
    if isinstance(method, UPipe):
        schedule = method.schedule
        chunk = f"{schedule.head_chunk} of {schedule.num_heads} ({len(schedule.stages)} stages)"
        return f", head chunk {chunk}, query tiles {method.tiles}"
    return ""


def _describe_stash(stash: str, stashes: Sequence[NewStash | None]) -> str:
    kept = sum(new_stash is not None for new_stash in stashes)
    return f"stash {stash} for {kept} of {len(stashes)} layers"


def _stashes(job_config: JobConfig, world_size: int, pool: HostPool) -> list[NewStash | None]:
    """What makes each layer's stash; None where attention is computed again in backward."""
    job = job_shape(job_config, world_size)
    makers: dict[str, NewStash | None] = {"none": None, "device": Stash, "host": partial(Stash, pool.put)}
    return [makers[job.stash_of(layer)] for layer in range(job.model.layers)]


def _hide_states(model: nn.Module, job_config: JobConfig, world_size: int, pool: HostPool) -> JobConfig:
    """Hidden states in host memory, from embedding to loss.

    Returns:
        The job for TorchTitan's parallelize function, which must not checkpoint: a block keeps its input and its stash.
    """
    tile_size = job_config.context_parallel.tile_size
    keeps = [new_stash is not None for new_stash in _stashes(job_config, world_size, pool)]
    hide_states(model, HiddenStates(pool, tile_size), partial(Stash, pool.put), keeps, tile_size)
    logger.info(f"Hidden states are in host memory; the device works on tiles of {tile_size} rows")
    return _not_checkpointed(job_config)


def _not_checkpointed(job_config: JobConfig) -> JobConfig:
    job_config = copy.deepcopy(job_config)
    job_config.activation_checkpoint.mode = "none"
    return job_config


def _checkpoint_blocks(model: nn.Module, job_config: JobConfig, pool: HostPool) -> JobConfig:
    """Full activation checkpointing with one stash for both runs of a block, and block inputs on the host if asked.

    TorchTitan's takes no ``context_fn``.

    Returns:
        The job for TorchTitan's parallelize function, which must not checkpoint again.
    """
    options = job_config.activation_checkpoint
    offload = BlockOffload(pool) if options.offload else None
    blocks: Any = model.layers
    for name, block in list(blocks.items()):
        arguments: dict[str, Any] = {
            "preserve_rng_state": options.preserve_rng_state,
            "determinism_check": options.determinism_check,
            "early_stop": options.early_stop,
            "debug": options.debug,
        }
        method = getattr(block.attention, "method", None)  # TorchTitan's own attention has none
        if isinstance(method, StashingMethod):
            arguments["context_fn"] = StashForBothRuns(method)
        blocks[name] = OffloadedBlock(block, offload, **arguments) if offload else CheckpointWrapper(block, **arguments)
    logger.info(
        "Applied full activation checkpointing to the model" + (", block inputs in host memory" if offload else "")
    )
    return _not_checkpointed(job_config)


@contextmanager
def _tied_weights_sharded(model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> Iterator[None]:
    """Shard a weight that embedding and output share, in one FSDP group, and hide both from TorchTitan meanwhile.

    TorchTitan 0.2.2 shards them in two groups, which FSDP2 refuses for a shared parameter.
    """
    model_args: Any = model.model_args
    if not (getattr(model_args, "enable_weight_tying", False) and parallel_dims.fsdp_enabled):
        yield
        return
    training = job_config.training
    names = ("tok_embeddings", "norm", "output")
    modules: list[Any] = [getattr(model, name) for name in names]
    fully_shard(
        modules,
        mesh=parallel_dims.get_mesh(["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]),
        mp_policy=MixedPrecisionPolicy(
            param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        ),
        offload_policy=CPUOffloadPolicy() if training.enable_cpu_offload else OffloadPolicy(),
    )
    for name, module in zip(names, modules, strict=True):
        module.set_gradient_divide_factor(1.0)  # as TorchTitan does: the loss is already normalised
        setattr(model, name, None)
    try:
        yield
    finally:
        for name, module in zip(names, modules, strict=True):
            setattr(model, name, module)


def _sum_replicated_gradients(model: nn.Module) -> None:
    """Let plain data parallel (DDP) sum gradients over all ranks, of which each is a replica.

    TorchTitan 0.2.2 divides the loss by the global number of tokens and leaves DDP its division by the number of
    replicas, which makes gradients that many times too small.
    """
    if isinstance(model, DDP):
        model.register_comm_hook(None, lambda _, bucket: _all_reduce_sum(bucket))


def _all_reduce_sum(bucket: Any) -> torch.futures.Future[torch.Tensor]:
    work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
