"""The same model on one rank alone: what the ranks together must come to."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torchtitan.config import JobConfig
from torchtitan.tools.utils import set_default_dtype

from torchtitan_upipe.checks.short import Batch, ShortTrainer, inputs_of
from torchtitan_upipe.titan.batch import shard_batch
from torchtitan_upipe.titan.dims import TrainerDims
from torchtitan_upipe.titan.tiled import summed_loss


class OneRankDims(TrainerDims):
    """The dimensions of one rank, in a process that has others beside it: no mesh, no group."""

    def __init__(self) -> None:
        super().__init__(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)

    def get_optional_mesh(self, dims: str | list[str]) -> DeviceMesh | None:
        """None."""
        return None


@dataclass
class Step:
    """What one rank found in one step: the mean loss, the gradients, their norm (summed in float64)."""

    loss: float
    grad_norm: float
    gradients: dict[str, Tensor]


class OneRank:
    """All weights and all tokens on this rank: attention written out in float32, no tiles, no stash, no checkpointing.

    Args:
        trainer: whose weights, optimizer and schedule it takes.
    """

    def __init__(self, trainer: ShortTrainer) -> None:
        self.trainer, self.dims = trainer, OneRankDims()
        self.config = _plain(trainer.job_config)
        spec = trainer.train_spec
        with torch.device("meta"), set_default_dtype(torch.float32):
            model: Any = spec.model_cls(trainer.model_args)
        self.model: nn.Module = spec.parallelize_fn(model, self.dims, self.config)
        self.model.to_empty(device=trainer.device)
        with torch.no_grad():
            self.model.init_weights(buffer_device=None)
        self.optimizers = spec.build_optimizers_fn([self.model], self.config.optimizer, self.dims)
        steps = self.config.training.steps
        self.take_weights()
        self.schedulers = spec.build_lr_schedulers_fn(self.optimizers, self.config.lr_scheduler, steps)

    @torch.no_grad()
    def take_weights(self) -> None:
        """Copy the job's: a collective."""
        own = dict(self.model.named_parameters())
        for name, weight in whole_tensors(self.trainer, "weights"):
            own[name].copy_(weight)

    def narrowed(self, dtype: torch.dtype) -> nn.Module:
        """A copy of the model in ``dtype`` throughout: plain low precision."""
        return copy.deepcopy(self.model).to(dtype)

    def forward_backward(self, batch: Batch, model: nn.Module | None = None) -> Step:
        """Loss and gradients of the whole batch, one sequence after the other."""
        model, total = model or self.model, 0.0
        parameters = dict(model.named_parameters())
        for parameter in parameters.values():
            parameter.grad = None
        count = int((batch.labels != -100).sum())
        for row in range(len(batch.tokens)):
            loss = self._loss(model, batch.rows(row, row + 1)) / count
            loss.backward()
            total += float(loss.detach())
        gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        norm = sum(float(gradient.double().square().sum()) for gradient in gradients.values()) ** 0.5
        return Step(total, norm, gradients)

    def update(self) -> None:
        """The optimizer's step, by the gradients found last."""
        self.optimizers.step()
        self.schedulers.step()

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        device = self.trainer.device
        given = {name: tensor.to(device) for name, tensor in inputs_of(batch, self.trainer.documents).items()}
        inputs, labels, kwargs = shard_batch(
            given["input"], batch.labels.to(device), self.dims, self.config, None, given.get("starts")
        )
        return summed_loss(model, self.trainer.loss_fn, inputs, labels, **kwargs)


def _plain(config: JobConfig) -> JobConfig:
    """The job of one rank, in which nothing saves memory."""
    plain = copy.deepcopy(config)
    cp, training, parallelism = plain.context_parallel, plain.training, plain.parallelism
    cp.method, cp.attention_kernel, cp.head_chunk, cp.ring_degree = "ulysses", "reference", 0, 1
    cp.tile_size, cp.hidden_states, cp.query_tiles, cp.stash = 0, "device", 1, "device"
    plain.activation_checkpoint.mode, plain.activation_checkpoint.offload = "none", False
    training.enable_cpu_offload, training.mixed_precision_param, training.dtype = False, "float32", "float32"
    parallelism.context_parallel_degree = parallelism.data_parallel_replicate_degree = 1
    parallelism.data_parallel_shard_degree = 1
    return plain


def whole_tensors(trainer: ShortTrainer, kind: str) -> Iterator[tuple[str, Tensor]]:
    """Weights or gradients of the job, gathered one after the other: a collective for each."""
    for name, parameter in trainer.model_parts[0].named_parameters():
        value: Any = parameter.detach() if kind == "weights" else parameter.grad
        if value is None:
            continue
        value, name = value.to(trainer.device), name.replace(_CHECKPOINT_PREFIX, "")
        yield name, value.full_tensor() if isinstance(value, DTensor) else value
