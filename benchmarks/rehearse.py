"""Rehearse a job of many ranks on one device: one rank's real work, over a few layers.

    python -m benchmarks.rehearse --job.config_file train_configs/llama3_8b_3m.toml --rank 0 --world-size 8 --layers 2

The trainer, shapes, kernels and allocations are the job's own. What other ranks would send is filled with local copies
of the same size (``local_group.py``), so that loss and gradients mean nothing and exchanges cost next to no time. The
text is the shipped one, which needs no download; ``--training.dataset`` and ``--model.hf_assets_path`` choose another.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.logging import init_logger
from torchtitan.tools.utils import device_module, device_type

from benchmarks.arms import spell_length
from benchmarks.environment import environment
from benchmarks.local_group import join_alone
from benchmarks.measured import MeasuredTrainer, failure
from benchmarks.prediction import predict
from benchmarks.tables import EXTRAPOLATED, MEASURED, markdown, spell_bytes, spell_prediction, spell_rate
from torchtitan_upipe.device import refuse_idle_gpus
from torchtitan_upipe.dry_run.peak import storage_bytes
from torchtitan_upipe.job.model import model_args
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.launch import refuse

ROOT = Path(__file__).parent.parent
TEXT = ["--training.dataset", "stdlib", "--model.hf_assets_path", str(ROOT / "torchtitan_upipe/assets/tokenizer")]


@dataclass(frozen=True)
class Rehearsal:
    """What one rank measured over ``layers`` layers. Times in seconds, memory in bytes.

    Attributes:
        layers: how many were run.
        full_layers: how many the model has.
        tokens: per step and rank.
        step_seconds: median of the timed steps.
        forward_seconds, backward_seconds: of one layer, median; backward includes what is computed again.
        peak_device: see :class:`~torchtitan_upipe.dry_run.peak.PeakMeter`.
        peak_host: largest resident set of the process during the timed steps.
        predicted, predicted_full: peaks of the device by the ledger, with these layers and with all.
        state: parameters and optimizer state of one layer.
        gradients: of one layer.
        kept: what the forward run of one layer leaves allocated for its backward run.
    """

    layers: int
    full_layers: int
    tokens: float
    step_seconds: float
    forward_seconds: float
    backward_seconds: float
    peak_device: int
    peak_host: int
    state: int
    gradients: int
    kept: int
    predicted: int
    predicted_full: int

    @property
    def full_step_seconds(self) -> float:
        """Extrapolated: further layers cost what one was measured to; their share of the optimizer is not in it."""
        return self.step_seconds + self._further * (self.forward_seconds + self.backward_seconds)

    @property
    def full_peak_device(self) -> int:
        """Extrapolated: a further layer has its state, and at the peak either what it kept or its gradients."""
        return self.peak_device + self._further * (self.state + max(self.kept, self.gradients))

    @property
    def _further(self) -> int:
        return self.full_layers - self.layers


class BlockWatch:
    """Notes when each block runs, and what is allocated before and after its forward run."""

    def __init__(self, trainer: RehearsalTrainer) -> None:
        self.forward_seconds: list[float] = []
        self.backward_seconds: list[float] = []
        self._trainer = trainer
        self._started: dict[tuple[int, str], float] = {}
        for index, block in enumerate(blocks(trainer)):
            # outside FSDP's own hooks, which gather and release the block's weights
            block.register_forward_pre_hook(self._before(index), prepend=True)
            block.register_forward_hook(self._after(index))

    def _before(self, index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._trainer.meter.mark(f"before {index}")
            args[0].register_hook(lambda _: self._end(index, "backward", self.backward_seconds))
            self._start(index, "forward")

        return hook

    def _after(self, index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            self._end(index, "forward", self.forward_seconds)
            out.register_hook(lambda _: self._start(index, "backward"))
            self._trainer.meter.mark(f"after {index}")

        return hook

    def _start(self, index: int, direction: str) -> None:
        device_module.synchronize()
        self._started[index, direction] = time.perf_counter()

    def _end(self, index: int, direction: str, seconds: list[float]) -> None:
        device_module.synchronize()
        if self._trainer.is_timed:
            seconds.append(time.perf_counter() - self._started[index, direction])

    def kept(self) -> int:
        """Bytes that the last block's forward run has left; the first one also meets the embeddings' buffers."""
        live, last = dict(self._trainer.meter.marks), len(blocks(self._trainer)) - 1
        return live[f"after {last}"] - live[f"before {last}"]


class RehearsalTrainer(MeasuredTrainer):
    """The measured trainer, with an eye on its blocks."""

    def __init__(self, config: JobConfig, warmup: int, steps: int) -> None:
        super().__init__(config, warmup, steps)
        self.watch = BlockWatch(self)

    def rehearsal(self, full_layers: int, predicted: int, predicted_full: int) -> Rehearsal:
        """What was measured, once training has ended."""
        measured, sequences = self.measurement(), self.job_config.training.local_batch_size
        parameters = list(blocks(self)[-1].parameters())
        return Rehearsal(
            layers=len(blocks(self)),
            full_layers=full_layers,
            tokens=sequences
            * self.gradient_accumulation_steps
            * self.job_config.training.seq_len
            / self.job_config.parallelism.context_parallel_degree,
            step_seconds=statistics.median(measured.step_seconds),
            forward_seconds=statistics.median(self.watch.forward_seconds),
            backward_seconds=statistics.median(self.watch.backward_seconds),
            peak_device=measured.peak_device,
            peak_host=measured.peak_host,
            state=storage_bytes([*parameters, *self.optimizer_state(parameters)]),
            gradients=storage_bytes(p.grad for p in parameters if p.grad is not None),
            kept=self.watch.kept(),
            predicted=predicted,
            predicted_full=predicted_full,
        )


def blocks(trainer: MeasuredTrainer) -> list[nn.Module]:
    """The layers of the trainer's model, first to last."""
    layers: Any = trainer.model_parts[0].layers
    return list(layers.values())


def with_layers(config: JobConfig, layers: int) -> int:
    """Let the job's model have ``layers`` layers, as a flavor of this process alone; return how many it has in full.

    Raises:
        ValueError: more layers than the model has, or less than two.
    """
    flavors: Any = get_train_spec(config.model.name).model_args
    full: Any = model_args(config)
    if not 2 <= layers <= full.n_layers:
        raise ValueError(
            f"--layers {layers} must be at least 2, of which the second is like all that follow, and at most the "
            f"{full.n_layers} of {config.model.name} {config.model.flavor}."
        )
    config.model.flavor = f"{config.model.flavor} with {layers} layers"
    flavors[config.model.flavor] = replace(full, n_layers=layers)
    return int(full.n_layers)


def rehearse(arguments: Sequence[str], rank: int, world_size: int, layers: int, warmup: int, steps: int) -> Rehearsal:
    """Run rank ``rank`` of the job that ``arguments`` describe. It takes this process's ``torch.distributed``.

    Raises:
        ValueError: the job cannot run as written, or a number is out of range.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"--rank {rank} must be at least 0 and below --world-size {world_size}.")
    if steps < 1 or warmup < 0:
        raise ValueError(f"--steps {steps} must be at least 1 and --warmup {warmup} at least 0.")
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE="1")
    config = read_job([*TEXT, *arguments])
    predicted_full = _predicted(config)
    full_layers = with_layers(config, layers)
    config.checkpoint.enable = config.validation.enable = config.evaluation.enable = False
    config.metrics.enable_tensorboard = False
    join_alone(rank, world_size)
    try:
        with tempfile.TemporaryDirectory() as folder:
            config.job.dump_folder = folder
            trainer = RehearsalTrainer(config, warmup, steps)
            if warmup == 0:
                trainer.optimizers.state_dict()  # makes the optimizer's state, which a later step finds
            trainer.train()
            trainer.close()
            return trainer.rehearsal(full_layers, _predicted(config), predicted_full)
    finally:
        dist.destroy_process_group()


def _predicted(config: JobConfig) -> int:
    """Peak of a rank's device memory by the ledger; 0 where nothing predicts. CPU kernels have no workspace."""
    prediction = predict(config, workspace=device_type != "cpu")
    return 0 if prediction is None else prediction.device_bytes


def page(result: Rehearsal, title: str) -> str:
    """The rehearsal in Markdown; every cell says whether it was measured or extrapolated."""

    def row(name: str, few: str, full: str) -> list[str]:
        return [name, f"{few} {MEASURED}", f"{full} {EXTRAPOLATED}"]

    seconds, full_seconds = result.step_seconds, result.full_step_seconds
    rows = [
        row("peak device memory", spell_bytes(result.peak_device), spell_bytes(result.full_peak_device)),
        [
            "peak device memory by the ledger",
            spell_prediction(result.predicted, result.peak_device),
            spell_prediction(result.predicted_full, result.full_peak_device),
        ],
        row("step [s]", f"{seconds:.3g}", f"{full_seconds:.3g}"),
        row("tokens/s/rank, exchanges not counted", *(spell_rate(result.tokens / s) for s in (seconds, full_seconds))),
    ]
    layer = (
        f"One layer, {MEASURED}: forward {result.forward_seconds:.3g} s, backward {result.backward_seconds:.3g} s; "
        f"{spell_bytes(result.kept)} kept from forward to backward, {spell_bytes(result.gradients)} of gradients, "
        f"{spell_bytes(result.state)} of parameters and optimizer state.\n"
    )
    header = [title, f"{result.layers} layers", f"{result.full_layers} layers"]
    return f"{markdown(header, rows)}\n{layer}\nPeak host memory, {MEASURED}: {spell_bytes(result.peak_host)}.\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Rehearse the job of the command line and print what it needed; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rehearse",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rank", type=int, default=0, help="the rank to run (0)")
    parser.add_argument("--world-size", type=int, required=True, help="ranks of the whole job")
    parser.add_argument("--layers", type=int, default=2, help="layers to run, at least 2 (2)")
    parser.add_argument("--warmup", type=int, default=1, help="first steps, not timed; 0 for steps of minutes (1)")
    parser.add_argument("--steps", type=int, default=1, help="timed steps (1)")
    parser.add_argument("--result", type=Path, help="JSON lines file to append to")
    options, job = parser.parse_known_args(arguments)
    init_logger()
    try:
        refuse_idle_gpus()
        result = rehearse(job, options.rank, options.world_size, options.layers, options.warmup, options.steps)
    except Exception as error:
        if options.result:
            _append(options.result, failure(error))
        if not isinstance(error, ValueError):
            raise
        return refuse(error)
    config = read_job([*TEXT, *job])
    cp, title = config.context_parallel, f"{config.model.name} {config.model.flavor}"
    title += f", {spell_length(config.training.seq_len)}, {cp.method}, rank {options.rank} of {options.world_size}"
    print(page(result, title))
    if options.result:
        of = {"rank": options.rank, "world_size": options.world_size, "warmup_steps": options.warmup}
        record = {"status": "ok", "rehearsal": asdict(result), **of, "config": config.to_dict()}
        _append(options.result, {**record, **environment(device_type)})
    return 0


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    sys.exit(main())
