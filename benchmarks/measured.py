"""The real trainer with a stopwatch: ``torchrun ... -m benchmarks.measured --result FILE --warmup 2 --steps 5 JOB...``.

Writes one JSON object: what was measured, or why nothing was.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchtitan.config import JobConfig
from torchtitan.tools.logging import init_logger
from torchtitan.tools.utils import device_module, device_type

from benchmarks.environment import environment
from torchtitan_upipe.cp.collectives import HeadExchange, RingExchange, Traffic
from torchtitan_upipe.device import is_out_of_memory
from torchtitan_upipe.dry_run.peak import CpuMeter, CudaMeter, PeakMeter, storage_bytes
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.titan.attention import ContextParallelAttention
from torchtitan_upipe.titan.trainer import Trainer


@dataclass(frozen=True)
class RankMeasurement:
    """What one rank measured. Times in seconds, memory in bytes.

    Attributes:
        step_seconds: the timed steps.
        loss: the logged loss of every step, warm-up included.
        sent: calls and bytes of one step, by kind of exchange; what FSDP sends is not in it.
            Empty where the method does not count (TorchTitan's own).
        peak_device: see :class:`~torchtitan_upipe.dry_run.peak.PeakMeter`.
        peak_host: largest resident set of the process during the timed steps.
        held: the parts of ``peak_device`` that outlive a step: parameters (with buffers), optimizer state.
    """

    step_seconds: list[float]
    loss: list[float]
    sent: dict[str, Traffic]
    peak_device: int
    peak_host: int
    held: dict[str, int]


class MeasuredTrainer(Trainer):
    """The project's trainer; every step between two barriers and device synchronisations.

    Args:
        config: its ``training.steps`` and ``metrics.log_freq`` are set here.
        warmup: first steps that are not timed.
        steps: timed steps.
    """

    def __init__(self, config: JobConfig, warmup: int, steps: int) -> None:
        self.meter: PeakMeter = CpuMeter() if device_type == "cpu" else CudaMeter()
        config.training.steps = warmup + steps + int(self.meter.own_step)
        config.metrics.log_freq = 1
        super().__init__(config)
        self._timed = range(warmup + 1, warmup + steps + 1)
        self._step_seconds: list[float] = []
        self._loss: list[float] = []
        self._sent: dict[str, Traffic] = {}
        self._peak_host = 0
        self._log = self.metrics_processor.log
        self.metrics_processor.log = self._record_and_log

    def train_step(self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]) -> None:
        """One step of TorchTitan's, measured."""
        watched = self.step > self._timed[-1] if self.meter.own_step else self.is_timed
        before = sent_so_far(self.model_parts)
        self._synchronise()
        started = time.perf_counter()
        with self.meter.watch() if watched else nullcontext():
            super().train_step(data_iterator)
        self._synchronise()
        if self.is_timed:
            self._step_seconds.append(time.perf_counter() - started)
            self._sent = {
                kind: Traffic(total.calls - before[kind].calls, total.bytes - before[kind].bytes)
                for kind, total in sent_so_far(self.model_parts).items()
            }

    @property
    def is_timed(self) -> bool:
        """Whether the step under way is one of those timed."""
        return self.step in self._timed

    def measurement(self) -> RankMeasurement:
        """Of this rank, once training has ended."""
        return RankMeasurement(
            self._step_seconds, self._loss, self._sent, self.meter.peak, self._peak_host, self.held()
        )

    def held(self) -> dict[str, int]:
        """Bytes that a step finds and leaves allocated on this rank, by what they are for."""
        parameters = [p for part in self.model_parts for p in part.parameters()]
        buffers = [b for part in self.model_parts for b in part.buffers()]
        return {
            "parameters": storage_bytes([*parameters, *buffers]),
            "optimizer": storage_bytes(self.optimizer_state(parameters)),
        }

    def optimizer_state(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """What the optimizer keeps for ``parameters`` from step to step."""
        states = [optimizer.state.get(p, {}) for optimizer in self.optimizers for p in parameters]
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]

    def _synchronise(self) -> None:
        dist.barrier()
        device_module.synchronize()

    def _record_and_log(self, step: int, loss: float, *args: Any, **kwargs: Any) -> None:
        self.meter.before_log()
        if step in self._timed:  # before TorchTitan logs: on CPU it then starts a new peak
            self._peak_host = max(self._peak_host, peak_resident_bytes())
        self._loss.append(float(loss))
        self._log(step, loss, *args, **kwargs)


def peak_resident_bytes() -> int:
    """Largest resident set of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def sent_so_far(model_parts: Sequence[nn.Module]) -> dict[str, Traffic]:
    """What the attention layers of this rank have sent: by all-to-alls, and around rings."""
    totals: dict[str, Traffic] = {}
    layers = [m for part in model_parts for m in part.modules() if isinstance(m, ContextParallelAttention)]
    for layer in layers:
        for kind, owner in {"all_to_all": layer.method, "ring": layer.method.attention}.items():
            exchange: HeadExchange | RingExchange | None = getattr(owner, "exchange", None)
            if exchange is not None:
                total = totals.setdefault(kind, Traffic())
                total.calls += exchange.traffic.calls
                total.bytes += exchange.traffic.bytes
    return totals


def run(config: JobConfig, warmup: int, steps: int) -> list[RankMeasurement]:
    """Train and measure; the measurements of all ranks, on each of them."""
    trainer = MeasuredTrainer(config, warmup, steps)
    try:
        trainer.train()
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, trainer.measurement())
    finally:
        trainer.close()
    dist.destroy_process_group()
    return ranks


def summary(config: JobConfig, ranks: Sequence[RankMeasurement], warmup: int, how: str) -> dict[str, Any]:
    """The JSON object of a run that went well. A step takes as long as its slowest rank."""
    seconds = [max(times) for times in zip(*(rank.step_seconds for rank in ranks), strict=True)]
    quartiles = torch.tensor(seconds).quantile(torch.tensor([0.25, 0.5, 0.75]))
    largest = max(ranks, key=lambda rank: rank.peak_device)
    p, training = config.parallelism, config.training
    batch_ranks = len(ranks) // p.context_parallel_degree
    sequences = (
        training.global_batch_size if training.global_batch_size > 0 else training.local_batch_size * batch_ranks
    )
    return {
        "status": "ok",
        "warmup_steps": warmup,
        "step_seconds": seconds,
        "step_seconds_quartiles": quartiles.tolist(),
        "tokens_per_second_per_rank": sequences * training.seq_len / float(quartiles[1]) / len(ranks),
        "peak_device_bytes": largest.peak_device,
        "held_bytes": largest.held,
        "peak_device_bytes_of_ranks": [rank.peak_device for rank in ranks],
        "peak_device_is": how,
        "peak_host_bytes": max(rank.peak_host for rank in ranks),
        "peak_host_is": "largest resident set of a rank's process over the timed steps",
        "sent_per_step": {kind: asdict(sent) for kind, sent in ranks[0].sent.items()},
        "sent_per_step_is": "by rank 0 to other ranks for attention; FSDP's traffic is not counted",
        "loss": ranks[0].loss,
    }


def failure(error: BaseException) -> dict[str, Any]:
    """The JSON object of a run that failed: ``"OOM"`` for device or host memory, else ``"failed"``."""
    text = str(error).strip().partition("\n")[0]
    reason = text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
    return {"status": "OOM" if is_out_of_memory(error) else "failed", "reason": reason}


def write_first(path: Path, result: dict[str, Any]) -> None:
    """Write ``path`` whole, unless another rank has: the first failure is the cause of the others."""
    temporary = path.with_suffix(f".rank{os.environ.get('RANK', '0')}")
    temporary.write_text(json.dumps(result) + "\n")
    with suppress(FileExistsError):
        os.link(temporary, path)
    temporary.unlink()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the job of the command line; return the exit code."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("--result", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--warmup", type=int, required=True, help="steps that are not timed")
    parser.add_argument("--steps", type=int, required=True, help="timed steps")
    options, job = parser.parse_known_args(arguments)
    init_logger()
    about = {"ranks": int(os.environ["WORLD_SIZE"]), **environment(device_type)}
    try:
        config = read_job(job)
        about["config"] = config.to_dict()
        ranks = run(config, options.warmup, options.steps)
    except ValueError as error:
        write_first(options.result, {**failure(error), **about})
        print(f"ValueError: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        write_first(options.result, {**failure(error), **about})
        raise
    if int(os.environ["RANK"]) == 0:
        how = (CpuMeter if device_type == "cpu" else CudaMeter).how
        write_first(options.result, {**summary(config, ranks, options.warmup, how), **about})
    return 0


if __name__ == "__main__":
    sys.exit(main())
