"""TorchTitan's metrics, which remember the first and the last loss for a job's closing line."""

from __future__ import annotations

from typing import Any

from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims


class Metrics(MetricsProcessor):
    """TorchTitan's processor.

    Attributes:
        losses: the mean loss per token by step, of the first and of the last step logged.
    """

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims, tag: str | None = None) -> None:
        super().__init__(job_config, parallel_dims, tag)
        self.losses: dict[int, float] = {}

    def log(self, step: int, global_avg_loss: float, *args: Any, **kwargs: Any) -> None:
        """TorchTitan's line and scalars."""
        super().log(step, global_avg_loss, *args, **kwargs)
        first = min(self.losses, default=step)
        self.losses = {first: self.losses.get(first, global_avg_loss), step: global_avg_loss}


def build_metrics(
    job_config: JobConfig, parallel_dims: ParallelDims, model_args: object = None, tag: str | None = None
) -> Metrics:
    """The ``build_metrics_processor_fn`` of the plugin's train specs."""
    return Metrics(job_config, parallel_dims, tag)
