"""Validation loss under context parallelism.

TorchTitan 0.2.2 counts valid tokens after sharding and shards a second time through its own context-parallel context;
here tokens are counted first and sharded once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.components.loss import IGNORE_INDEX, LossFunction
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.components.validate import BaseValidator, ValidationContext
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.utils import device_type

from torchtitan_upipe.titan.batch import shard_batch
from torchtitan_upipe.titan.datasets import build_validation_dataloader
from torchtitan_upipe.titan.tiled import summed_loss


class ContextParallelValidator(BaseValidator):
    """TorchTitan's validator with the project's data loader and sharding, as in training; logging is TorchTitan's."""

    def __init__(
        self,
        job_config: JobConfig,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: BaseTokenizer,
        parallel_dims: ParallelDims,
        loss_fn: LossFunction,
        validation_context: ValidationContext,
        maybe_enable_amp: AbstractContextManager[None],
        metrics_processor: MetricsProcessor,
    ) -> None:
        super().__init__(job_config)
        self.tokenizer = tokenizer
        self.parallel_dims = parallel_dims
        self.loss_fn = loss_fn
        self.validation_context = validation_context
        self.maybe_enable_amp = maybe_enable_amp
        self.metrics_processor = metrics_processor
        self.dataloader = build_validation_dataloader(dp_world_size, dp_rank, tokenizer, job_config)

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Log the mean loss per token over the batch ranks, averaged over the first ``validation.steps`` batches.

        Raises:
            ValueError: the data does not fill one sequence.
        """
        (model,) = model_parts
        model.eval()
        validation = self.job_config.validation
        self.dataloader.restart()  # the same batches every time
        losses = [
            self._batch_loss(model, input_dict, labels)
            for input_dict, labels in islice(self.dataloader, validation.steps if validation.steps != -1 else None)
        ]
        if not losses:
            raise ValueError(
                f"validation data, {self.dataloader.dataset.source}, does not fill one batch of "
                f"{validation.local_batch_size} sequences of validation.seq_len = {validation.seq_len} tokens; "
                "shorten it."
            )
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
        local, local_labels, kwargs = shard_batch(
            inputs, labels, self.parallel_dims, self.job_config, eos_id, input_dict.get("starts")
        )
        with self.validation_context(), self.maybe_enable_amp:
            return summed_loss(model, self.loss_fn, local, local_labels, **kwargs) / max(float(tokens), 1.0)


def build_validator(
    *, pp_schedule: object = None, pp_has_first_stage: object = None, pp_has_last_stage: object = None, **kwargs: Any
) -> BaseValidator:
    """The ``build_validator_fn`` of the plugin's train specs; takes what TorchTitan's takes, pipelines unread."""
    return ContextParallelValidator(**kwargs)
