"""Validation loss under context parallelism.

TorchTitan 0.2.2 counts valid tokens after sharding and shards a second time through its own context-parallel context;
here tokens are counted first and sharded once.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.validate import BaseValidator, Validator
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.utils import device_type

from torchtitan_upipe.data.batch import shard_batch
from torchtitan_upipe.models.tiled import summed_loss


class ContextParallelValidator(Validator):
    """TorchTitan's validator with its own loop, sharding as in training; data and logging are inherited."""

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Log the mean loss per token over the batch ranks, averaged over ``validation.steps`` batches."""
        (model,) = model_parts
        model.eval()
        steps = self.job_config.validation.steps
        losses = [
            self._batch_loss(model, input_dict, labels)
            for input_dict, labels in islice(self.validation_dataloader, steps if steps != -1 else None)
        ]
        loss = torch.stack(losses).mean()
        if self.parallel_dims.dp_cp_enabled:
            mean = dist_utils.dist_sum(loss, self.parallel_dims.get_optional_mesh("loss"))
        else:
            mean = loss.item()
        self.metrics_processor.log_validation(loss=mean, step=step)
        model.train()

    def _batch_loss(self, model: nn.Module, input_dict: dict[str, Tensor], labels: Tensor) -> Tensor:
        """This rank's share of the batch's mean loss per token: a scalar whose sum over ranks is the mean."""
        self.metrics_processor.ntokens_since_last_log += labels.numel()
        labels = labels.to(device_type)
        tokens: float | Tensor = (labels != IGNORE_INDEX).sum()
        if self.parallel_dims.dp_enabled:
            tokens = dist_utils.dist_sum(tokens, self.parallel_dims.get_mesh("batch"))
        inputs = input_dict["input"].to(device_type)
        eos_id = getattr(self.tokenizer, "eos_id", None)
        local, local_labels, kwargs = shard_batch(inputs, labels, self.parallel_dims, self.job_config, eos_id)
        with self.validation_context(), self.maybe_enable_amp:
            return summed_loss(model, self.loss_fn, local, local_labels, **kwargs) / tokens


def build_validator(**kwargs: Any) -> BaseValidator:
    """The ``build_validator_fn`` of the plugin's train specs; takes what TorchTitan's takes."""
    return ContextParallelValidator(**kwargs)
