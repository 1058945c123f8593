"""Transformers' trainer with context parallelism, and the same as a mixin for trainers built on it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import IterableDataset
from transformers import Trainer

from torchtitan_upipe.device import prepare_for_gloo
from torchtitan_upipe.huggingface.batch import shard_batch, shifted_labels
from torchtitan_upipe.huggingface.cpu import fsdp_on_cpu
from torchtitan_upipe.huggingface.loss import summed_loss
from torchtitan_upipe.huggingface.model import context_parallel as put_context_parallel
from torchtitan_upipe.tiled.loss import IGNORE_INDEX

SHARDING = ("method", "ring_degree", "sequence_chunk")  # what shard_batch must know of context_parallel's arguments


class ContextParallelMixin(Trainer):
    """Makes a trainer of Transformers spread each sequence over ranks, each of which draws the same batch.

    Put it before the trainer: ``class MyTrainer(ContextParallelMixin, SFTTrainer)``. The loss is the mean over all
    labels of a step's batches, on all ranks, accumulation included; so are its gradient and the norm of that, and the
    loss of an evaluation batch. More than one rank needs FSDP2 (``TrainingArguments(fsdp=True)``).

    Args:
        context_parallel: arguments of :func:`~torchtitan_upipe.huggingface.model.context_parallel` from ``method`` on.
        cp_size: ranks of a sequence; by default that of ``args.parallelism_config``, or all ranks.
        args: and all others, those of the trainer.

    Raises:
        ValueError: the model or the combination is not supported.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the labels of all accumulated batches

    def __init__(
        self, *args: Any, context_parallel: Mapping[str, Any] | None = None, cp_size: int | None = None, **kwargs: Any
    ) -> None:
        self._cp_options = dict(context_parallel or {})
        self._cp_size = cp_size
        super().__init__(*args, **kwargs)
        self.accelerator.state.parallelism_config = self._parallelism
        self._check_arguments()
        model: Any = self.model
        put_context_parallel(model, self._cp_mesh, device_type=self.args.device.type, **self._cp_options)

    @property
    def _cp_mesh(self) -> DeviceMesh | None:
        """The ranks of a sequence, None where there is one."""
        mesh = self.accelerator.torch_device_mesh
        return mesh["cp"] if mesh is not None and "cp" in (mesh.mesh_dim_names or ()) else None

    def create_accelerator_and_postprocess(self) -> None:
        """Transformers' own, with a dimension for context parallelism, and no rounding of a model's output.

        Accelerate's mixed precision rounds what the model returns, here its summed loss, to bfloat16. Until the trainer
        is built, Accelerate's state does not tell of context parallelism: TRL would refuse packing, for which
        Accelerate's own method has no mask.
        """
        self._parallelism = parallelism(self.args, self._cp_size)
        self.args.parallelism_config = self._parallelism
        with fsdp_on_cpu(self.args):
            super().create_accelerator_and_postprocess()
        state: Any = self.accelerator.state
        state.parallelism_config = None
        policy = getattr(getattr(state, "fsdp_plugin", None), "mixed_precision_policy", None)
        if policy is not None:
            state.fsdp_plugin.mixed_precision_policy = replace(policy, output_dtype=None)

    def _check_arguments(self) -> None:
        args: Any = self.args
        datasets = (self.train_dataset, self.eval_dataset)
        dispatched = args.accelerator_config.dispatch_batches is not False
        refused = {
            "compute_metrics: predictions are spread over ranks": self.compute_metrics is not None,
            "compute_loss_func: the loss is made in parts": self.compute_loss_func is not None,
            "label_smoothing_factor": args.label_smoothing_factor != 0,
            "use_liger_kernel": args.use_liger_kernel,
            "average_tokens_across_devices = False: the loss is a mean over all ranks": (
                not args.average_tokens_across_devices
            ),
            "include_num_input_tokens_seen: tokens would count once a rank": (
                args.include_num_input_tokens_seen not in (False, "no")
            ),
            "activation_checkpointing of fsdp_config: it keeps no stash; set gradient_checkpointing = True instead": (
                (args.fsdp_config or {}).get("activation_checkpointing", False)
            ),
            "use_reentrant = True of gradient_checkpointing_kwargs: the stash needs the other kind": (
                (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
            ),
            "loss_type other than nll": getattr(args, "loss_type", "nll") not in ("nll", "chunked_nll"),
            "activation_offloading": getattr(args, "activation_offloading", False),
            'an iterable dataset dispatched by rank 0: set accelerator_config = {"dispatch_batches": False}; else it': (
                dispatched and args.world_size > 1 and any(isinstance(data, IterableDataset) for data in datasets)
            ),
        }
        for what, asked in refused.items():
            if asked:
                raise ValueError(f"{what} is not supported with context parallelism.")

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' own, and sums that gloo has."""
        prepared = super()._prepare_for_training(*args, **kwargs)
        if dist.is_initialized():
            model: Any = self.model
            prepare_for_gloo(model)
        return prepared

    def _prepare_context_parallel_inputs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """This rank's share of a batch, in the place of Accelerate's context."""
        sharding = {name: value for name, value in self._cp_options.items() if name in SHARDING}
        return contextlib.nullcontext, shard_batch(inputs, self._cp_mesh, **sharding)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Labels of the batches of a step, on all ranks.

        Raises:
            ValueError: a batch has none.
        """
        count = torch.zeros((), dtype=torch.int64, device=device)
        for batch in batch_samples:
            labels = shifted_labels(batch)
            if labels is None:
                raise ValueError("a batch has no labels, of which the loss is made; let the collator return labels.")
            count += (labels != IGNORE_INDEX).sum().to(device)
        return self.accelerator.reduce(count, reduction="sum") // self.get_cp_size()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This rank's share of the mean loss, times the number of ranks: FSDP2 and the log take means over ranks.

        A step without a label has a loss of 0.

        Raises:
            ValueError: outputs are asked for, too.
        """
        if return_outputs:
            raise ValueError(
                "the loss is made without outputs beside it: they are spread over ranks; call the model with a batch "
                "of shard_batch for its share of the logits."
            )
        labels = torch.as_tensor(num_items_in_batch).clamp(min=1)
        return summed_loss(model, inputs) * (self.accelerator.num_processes / labels)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The mean loss of an evaluation batch, the same on all ranks.

        Raises:
            ValueError: predictions are asked for.
        """
        if not prediction_loss_only:
            raise ValueError(
                "predictions are spread over ranks; evaluate the loss alone (prediction_loss_only = True)."
            )
        count = self._get_num_items_in_batch([inputs], self.args.device)
        _, share = self._prepare_context_parallel_inputs(model, inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(share), num_items_in_batch=count)
        return self.accelerator.reduce(loss, reduction="mean"), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' own, in which the ranks of a sequence count once."""
        self.gather_function = self._gather_losses
        return super().evaluation_loop(*args, **kwargs)

    def _gather_losses(self, losses: Tensor) -> Tensor:
        """``losses [B]`` of this rank's batch to those of all ranks' batches, without samples repeated at the end."""
        gathered = self.accelerator.gather(losses).unflatten(0, (-1, self.get_cp_size(), len(losses)))
        whole = gathered[:, 0].flatten()
        state = self.accelerator.gradient_state
        return whole[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else whole


class ContextParallelTrainer(ContextParallelMixin, Trainer):
    """:class:`transformers.Trainer` with context parallelism."""


def parallelism(args: Any, cp_size: int | None) -> ParallelismConfig | None:
    """How the ranks are divided into those that share a sequence and those that draw other batches; None for one rank.

    Raises:
        ValueError: they cannot be divided so, or other parallelism is asked for.
    """
    given: ParallelismConfig | None = args.parallelism_config
    if given is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":  # accelerate launch
        given = ParallelismConfig()
    world: int = args.world_size
    if given is not None and (given.tp_size > 1 or given.sp_size > 1):
        raise ValueError(
            f"tp_size = {given.tp_size} and sp_size = {given.sp_size} do not go together with context parallelism; set "
            "both to 1."
        )
    if given is not None and cp_size not in (None, given.cp_size):
        raise ValueError(f"cp_size = {cp_size} and parallelism_config.cp_size = {given.cp_size}; give one of them.")
    size = cp_size or (world if given is None else given.cp_size)
    if world % size:
        raise ValueError(f"cp_size = {size} does not divide the {world} ranks; choose a divisor.")
    if world > 1 and args.fsdp_plugin_args is None:
        raise ValueError(
            f"{world} ranks need FSDP2, which shards the weights over them; set fsdp = True in the arguments."
        )
    if given is not None or world == 1:
        return given
    return ParallelismConfig(cp_size=size, dp_shard_size=world // size)
