"""TorchTitan's metrics, with what the ranks have to say of each other, and a line of progress in place of its own."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torchtitan.components.metrics import BaseLogger, MetricsProcessor
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

from torchtitan_upipe.device import peak_resident_bytes, resident_bytes
from torchtitan_upipe.memory.prediction import GIB
from torchtitan_upipe.titan.ranks import Lookout, RankState, Stopwatch, of_all_ranks, spread


class Metrics(MetricsProcessor):
    """TorchTitan's processor.

    Attributes:
        losses: the mean loss per token by step, of the first and of the last step logged.
        waiting: sums up this rank's waits in exchanges, where it is attached.
    """

    logger: Any

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims, tag: str | None = None) -> None:
        super().__init__(job_config, parallel_dims, tag)
        self.losses: dict[int, float] = {}
        self.waiting = Stopwatch()
        self._logged: int | None = None  # the last step logged, or the one before the first
        self._lookout = Lookout(job_config)
        self.logger = Kept(self.logger, without="mfu(%)" if device_type == "cpu" else "")

    def should_log(self, step: int) -> bool:
        """TorchTitan's answer, asked once a step."""
        if self._logged is None:
            self._logged = step - 1
        return super().should_log(step)

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """TorchTitan's scalars and more, on all ranks; a line and warnings on the console."""
        seconds = (time.perf_counter() - self.time_last_log) / max(step - (self._logged or 0), 1)
        spent = self.waiting.read()
        peak_host = peak_resident_bytes()  # before TorchTitan starts a new one
        peak = self.device_memory_monitor.get_peak_stats()
        states = of_all_ranks(
            RankState(
                own=seconds - spent.waiting / max(step - (self._logged or 0), 1),
                stage=spent.stage,
                device=peak.max_reserved_gib * GIB,
                host=resident_bytes(),
                retries=peak.num_alloc_retries,
            )
        )
        _, times_median = spread(states)
        more = {
            "ranks/own_time_max(s)": max(state.own for state in states),
            "ranks/own_time_min(s)": min(state.own for state in states),
            "ranks/slowest_over_median": times_median,
            "ranks/stage_time_max(s)": max(state.stage for state in states),
            "ranks/stage_time_min(s)": min(state.stage for state in states),
            "memory/host(GiB)": max(state.host for state in states) / GIB,
        }
        super().log(step, global_avg_loss, global_max_loss, grad_norm, {**(extra_metrics or {}), **more})
        self._logged = step
        first = min(self.losses, default=step)
        self.losses = {first: self.losses.get(first, global_avg_loss), step: global_avg_loss}
        warnings = list(self._lookout.look(states))
        if dist.get_rank() != 0:
            return
        host = "" if device_type == "cpu" else f"  host {peak_host / GIB:.2f} GiB"
        steps = self.job_config.training.steps
        logger.info(
            f"step {step}/{steps}  loss {global_avg_loss:.5f}  grad_norm {grad_norm:.4f}  {seconds:.2f} s/step  "
            f"{self._speed()}  memory {peak.max_reserved_gib:.2f} GiB ({peak.max_reserved_pct:.0f}%){host}  "
            f"{timedelta(seconds=round((steps - step) * seconds))} left"
        )
        for warning in warnings:
            logger.warning(warning)

    def _speed(self) -> str:
        logged = self.logger.newest
        mfu = f"  mfu {logged['mfu(%)']:.1f}%" if "mfu(%)" in logged else ""
        return f"{logged['throughput(tps)'] * dist.get_world_size():,.0f} tokens/s{mfu}"


class Kept(BaseLogger):
    """Hands scalars on to another logger, but for one, and remembers the newest."""

    def __init__(self, to: BaseLogger, without: str) -> None:
        self.to = to
        self.without = without
        self.newest: dict[str, Any] = {}

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Scalars of one step."""
        self.newest = {name: value for name, value in metrics.items() if name != self.without}
        self.to.log(self.newest, step)

    def close(self) -> None:
        """Close the other."""
        self.to.close()


def build_metrics(
    job_config: JobConfig, parallel_dims: ParallelDims, model_args: object = None, tag: str | None = None
) -> Metrics:
    """The ``build_metrics_processor_fn`` of the plugin's train specs."""
    return Metrics(job_config, parallel_dims, tag)
