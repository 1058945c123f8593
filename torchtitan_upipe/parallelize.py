"""Attach the context-parallel method to a model, then hand over to TorchTitan's own parallelize function."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate import DDP
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import ParallelizeFunction
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

from torchtitan_upipe.cp.build import build_method
from torchtitan_upipe.cp.upipe import UPipe
from torchtitan_upipe.data.sharding import degrees, load_balancer
from torchtitan_upipe.device import prepare_for_gloo
from torchtitan_upipe.kernels.select import build_kernel
from torchtitan_upipe.memory.stash import Stash
from torchtitan_upipe.models.attention import ContextParallelAttention, RopeFromTable
from torchtitan_upipe.validate import validate_job


class AttachedDims:
    """TorchTitan's parallel dimensions once context parallelism is attached.

    TorchTitan's parallelize functions would attach their own and ask for twice the divisor of the sequence; everything
    else, FSDP over the context-parallel ranks included, goes on as before.
    """

    cp_enabled = False

    def __init__(self, dims: ParallelDims) -> None:
        self._dims = dims
        self.seq_len_divisor = 1  # the plugin's trainer pads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dims, name)


class Parallelize:
    """The ``parallelize_fn`` of a train spec.

    Args:
        titan_parallelize: TorchTitan's function for the same model.
        rope_from_table: how the model's position table is read.
    """

    def __init__(self, titan_parallelize: ParallelizeFunction, rope_from_table: RopeFromTable) -> None:
        self.titan_parallelize = titan_parallelize
        self.rope_from_table = rope_from_table

    def __call__(self, model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
        """Parallelize ``model`` (on the meta device) in place.

        Raises:
            ValueError: see :func:`~torchtitan_upipe.validate.validate_job`; the stock ``torchtitan.train`` has not
                asked before.
        """
        model_args: Any = model.model_args
        validate_job(job_config, model_args, parallel_dims.world_size, device_type)
        cp = job_config.context_parallel  # the stock trainer shards by the field set here
        job_config.parallelism.context_parallel_load_balancer = load_balancer(cp.method, cp.ring_degree)
        dims: Any = parallel_dims
        if cp.method != "torchtitan":
            dims = AttachedDims(parallel_dims)
            self._attach(model, parallel_dims, job_config)
            if job_config.activation_checkpoint.mode == "full":
                job_config = _checkpoint_blocks(model, job_config)
        with _tied_weights_sharded(model, parallel_dims, job_config):
            model = self.titan_parallelize(model, dims, job_config)
        _sum_replicated_gradients(model)
        prepare_for_gloo(model)
        return model

    def _attach(self, model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> None:
        cp = job_config.context_parallel
        ulysses_group, ring_group = _groups(parallel_dims, *degrees(cp.method, parallel_dims.cp, cp.ring_degree))
        kernel = build_kernel(cp.attention_kernel, device_type)
        blocks: Any = model.layers
        for block in blocks.values():
            method = build_method(
                cp.method,
                num_heads=block.attention.n_heads,
                num_kv_heads=block.attention.n_kv_heads,
                head_chunk=cp.head_chunk,
                stash=cp.stash,
                ulysses_group=ulysses_group,
                ring_group=ring_group,
                kernel=kernel,
            )
            block.attention = ContextParallelAttention(
                block.attention, method, self.rope_from_table, job_config.training.document_mask
            )
        logger.info(
            f"Attached context parallelism to the model: {cp.method} over {parallel_dims.cp} ranks, "
            f"attention kernel {kernel.name}" + (f", {_describe(method)}" if isinstance(method, UPipe) else "")
        )
        if isinstance(method, UPipe) and cp.head_chunk not in (0, method.schedule.head_chunk):
            logger.warning(
                f"head_chunk = {cp.head_chunk} is rounded to {method.schedule.head_chunk}, which keeps the "
                f"{method.exchange.size} ranks of the all-to-all equally busy"
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
    batch = parallel_dims.world_size // parallel_dims.cp
    grid = parallel_dims.world_mesh._unflatten(0, (batch, ring_degree, ulysses_degree), ("batch", "ring", "ulysses"))
    return grid["ulysses"].get_group(), grid["ring"].get_group()


def _describe(upipe: UPipe) -> str:
    schedule = upipe.schedule
    return (
        f"head chunk {schedule.head_chunk} of {schedule.num_heads} ({len(schedule.stages)} stages), "
        f"stash on {'device' if upipe.keep_stash else 'none'}"
    )


def _checkpoint_blocks(model: nn.Module, job_config: JobConfig) -> JobConfig:
    """Full activation checkpointing with one stash for both runs of a block; TorchTitan's takes no ``context_fn``.

    Returns:
        The job for TorchTitan's parallelize function, which must not checkpoint again.
    """
    options = job_config.activation_checkpoint
    blocks: Any = model.layers
    for name, block in list(blocks.items()):
        method = block.attention.method
        extra: dict[str, Any] = (
            {"context_fn": _StashForBothRuns(method)} if isinstance(method, UPipe) and method.keep_stash else {}
        )
        blocks[name] = checkpoint_wrapper(
            block,
            preserve_rng_state=options.preserve_rng_state,
            determinism_check=options.determinism_check,
            early_stop=options.early_stop,
            debug=options.debug,
            **extra,
        )
    logger.info("Applied full activation checkpointing to the model")
    job_config = copy.deepcopy(job_config)
    job_config.activation_checkpoint.mode = "none"
    return job_config


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


class _StashForBothRuns:
    """``context_fn`` of ``torch.utils.checkpoint``: called once per forward pass of a block."""

    def __init__(self, upipe: UPipe) -> None:
        self.upipe = upipe

    def __call__(self) -> tuple[Any, Any]:
        stash = Stash()
        return self.upipe.using(stash), self.upipe.using(stash)
