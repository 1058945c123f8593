"""TorchTitan's trainer with the project's sharding, loss, data state and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchtitan.train
from torch import Tensor
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

import torchtitan_upipe.titan.specs  # noqa: F401  (registers the models)
from torchtitan_upipe.job.evaluation import check_evaluation
from torchtitan_upipe.job.results import Results
from torchtitan_upipe.titan.attention import ContextParallelAttention
from torchtitan_upipe.titan.batch import shard_batch
from torchtitan_upipe.titan.datasets import Dataloader
from torchtitan_upipe.titan.dims import TrainerDims
from torchtitan_upipe.titan.evaluation import Evaluator
from torchtitan_upipe.titan.export import model_files
from torchtitan_upipe.titan.health import Batch, Health, StepSkippedError, StepUnderWay, judged_norm
from torchtitan_upipe.titan.healthy_checkpoint import HealthyCheckpoints
from torchtitan_upipe.titan.metrics import Metrics
from torchtitan_upipe.titan.scores import Scorer
from torchtitan_upipe.titan.settings import choose_settings
from torchtitan_upipe.titan.stop import Stop, Stopped, mark_boundaries
from torchtitan_upipe.titan.tiled import summed_loss


class Trainer(torchtitan.train.Trainer):
    """TorchTitan's trainer, sharding by the method's own layout; hybrids need one that TorchTitan does not have.

    A batch's way: the data loader (``titan/datasets.py``) draws it, :meth:`post_dataloading_process` takes this rank's
    share, the model, whose attention (``titan/attention.py``) hands itself to a method (``cp/``), turns it into a loss.

    Attributes:
        stop: who may ask the job to end, if anyone.

    Raises:
        ValueError: the model was not given the plugin's attention.
    """

    stop: Stop | None = None

    def __init__(self, job_config: JobConfig) -> None:
        with _own_checkpoints():
            super().__init__(job_config)
        self._under_way = StepUnderWay(0)
        self._before: dict[str, Any] | None = None  # what a step under way changes that is no weight, before it
        self._health = self._new_health()
        if isinstance(self.metrics_processor, Metrics):  # of the plugin's own specs
            self.metrics_processor.waiting.attach(self.model_parts[0])
        self.checkpointer.model_files = model_files(job_config, self.model_args)
        method = job_config.context_parallel.method
        attached = any(isinstance(m, ContextParallelAttention) for part in self.model_parts for m in part.modules())
        if method != "torchtitan" and not attached:
            raise ValueError(
                f'model.name = {job_config.model.name!r} does not attach context_parallel.method = "{method}"; its '
                "train spec needs torchtitan_upipe.titan.parallelize.Parallelize as parallelize_fn."
            )
        self.evaluator: Evaluator | None = None
        if job_config.evaluation.enable:
            scorer = Scorer(job_config, self.parallel_dims, self.train_context, self.maybe_enable_amp)
            self.evaluator = Evaluator(job_config, self.tokenizer, scorer, self.metrics_processor)

    def should_continue_training(self) -> bool:
        """TorchTitan asks between steps, after a step's checkpoint and validation; its evaluation comes next."""
        if self.evaluator is not None and self.evaluator.due(self.step):
            self.evaluator.run(self.model_parts[0], self.step)
        return super().should_continue_training()

    def train(self) -> None:
        """TorchTitan's loop, to its end or to where it is asked to stop, and a line with what came of it."""
        began = time.monotonic()
        reason = None
        if self.stop is not None:
            self.stop.watch(self.job_config.comm.train_timeout_seconds)
            mark_boundaries(self.model_parts[0], self.stop.boundary)
        try:
            super().train()
            self.checkpointer.wait()
        except Stopped as stopped:
            reason = str(stopped)
        line = self._closing_line(time.monotonic() - began) if reason is None else self._end_early(reason)
        if dist.get_rank() == 0:
            logger.info(line)

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        """TorchTitan's step, unless all ranks are to stop; what is not finite never gets to the optimizer.

        Raises:
            ValueError: the loss or the gradient norm is not finite, and the job says to end then.
        """
        self._before = {"ntokens_seen": self.ntokens_seen}
        if self.checkpointer.saves:
            loader = self.dataloader
            mine = isinstance(loader, Dataloader)  # else of another module's train spec
            self._before["data"] = loader.position() if mine else partial(dict, loader.state_dict())
        if self.stop is not None:
            self.stop.boundary()
        self._under_way = step = StepUnderWay(self.step)
        try:
            with judged_norm(partial(self._health.judge, step)):
                super().train_step(step.noting(data_iterator))
        except StepSkippedError as skipped:
            self.lr_schedulers.step()
            if dist.get_rank() == 0:
                logger.warning(str(skipped))
        self._before = None

    def _end_early(self, reason: str) -> str:
        """Drop the step under way and save the one before, on all ranks; return the job's last sentence."""
        data = None
        if self._before is not None:
            self.step -= 1
            self.ntokens_seen, data = self._before["ntokens_seen"], self._before.get("data")
        for part in self.model_parts:
            part.state_dict()  # which makes FSDP2 put its shards back in the place of gathered weights
        self.optimizers.zero_grad()
        saved = self.checkpointer.save_now(self.step, data)
        dist.barrier()  # whoever holds the ranks' store leaves last
        return f"Stopped after {reason}, with step {self.step} finished; {saved}"

    def _closing_line(self, seconds: float) -> str:
        line = f"Finished step {self.step} after {timedelta(seconds=round(seconds))}"
        losses: dict[int, float] = getattr(self.metrics_processor, "losses", {})  # of the plugin's own specs
        if losses:
            first, last = min(losses), max(losses)
            line += f", loss {losses[last]:.4f} (at step {first}: {losses[first]:.4f})"
        config = self.job_config
        folder = Path(config.job.dump_folder)
        written = [f for f in (config.checkpoint.folder, config.metrics.save_tb_folder) if (folder / f).exists()]
        return f"{line}; outputs: {', '.join(str(folder / f) for f in written) or 'none asked for'}"

    def init_distributed(self) -> TrainerDims:
        """TorchTitan's groups, under the name that tells a model who trains it; a mesh of one for FSDP2 if it is asked.

        TorchTitan adds gloo for what is in host memory, which on CPU is there already and must not be named twice.
        """
        training = self.job_config.training
        offload = training.enable_cpu_offload
        training.enable_cpu_offload = offload and device_type != "cpu"
        dims = super().init_distributed()
        training.enable_cpu_offload = offload
        choose_settings(self.job_config, dims.world_size)
        known = {field.name: getattr(dims, field.name) for field in fields(dims) if field.init}
        return TrainerDims(**known, shard_one=offload and dims.world_size == 1)

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Any]]:
        """``input_dict["input"]`` and ``labels``, both ``[B, S]``, to this rank's ``[B, N]``."""
        inputs, labels, kwargs = shard_batch(
            input_dict["input"],
            labels,
            self.parallel_dims,
            self.job_config,
            getattr(self.tokenizer, "eos_id", None),
            input_dict.get("starts"),
        )
        return inputs, labels, {}, kwargs

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Tensor
    ) -> Tensor:
        """One micro-batch, as TorchTitan does without pipelining; a tiled model computes its loss itself.

        Returns:
            This rank's share of the mean loss per label that is not ignored, over all ranks and micro-batches of the
            step: a scalar whose sum over ranks and micro-batches is the mean, 0 where all labels are ignored.
        """
        inputs, labels, extra_inputs, kwargs = self.post_dataloading_process(input_dict, labels)
        (model,) = self.model_parts
        with self.train_context():
            with self.maybe_enable_amp:
                total = summed_loss(model, self.loss_fn, inputs, labels, **extra_inputs, **kwargs)
                loss = total / torch.as_tensor(global_valid_tokens).clamp(min=1)
            self._under_way.losses.append(loss.detach())
            loss.backward()
        return loss

    def _new_health(self) -> Health:
        config, cp_mesh = self.job_config, self.parallel_dims.get_optional_mesh("cp")
        return Health(
            self.model_parts[0],
            self._replay,
            Path(config.job.dump_folder) / "nonfinite",
            self.tokenizer,
            max_skipped=config.health.max_skipped if config.health.on_nonfinite == "skip" else 0,
            dumps=cp_mesh is None or cp_mesh.get_local_rank() == 0,
        )

    @torch.no_grad()
    def _replay(self, batch: Batch) -> Tensor:
        """This rank's loss of ``batch``, summed over its tokens."""
        inputs, labels, extra_inputs, kwargs = self.post_dataloading_process(batch[0], batch[1].to(device_type))
        (model,) = self.model_parts
        model.eval()
        with self.train_context(), self.maybe_enable_amp:
            loss = summed_loss(model, self.loss_fn, inputs, labels, **extra_inputs, **kwargs)
        model.train()
        return loss


@contextmanager
def _own_checkpoints() -> Iterator[None]:
    """Within, TorchTitan's trainer, which names the class itself, builds :class:`HealthyCheckpoints`."""
    titans = torchtitan.train.CheckpointManager
    torchtitan.train.CheckpointManager = HealthyCheckpoints
    try:
        yield
    finally:
        torchtitan.train.CheckpointManager = titans


def run_job(config: JobConfig) -> None:
    """Train as ``config`` says, or write a seed checkpoint."""
    with Stop() if config.comm.mode == "default" else nullcontext() as stop:  # else this rank has no others to ask
        trainer = Trainer(config)
        trainer.stop = stop
        try:
            if config.checkpoint.create_seed_checkpoint:
                trainer.checkpointer.save(curr_step=0, last_step=True)
                logger.info("Created seed checkpoint")
            else:
                trainer.train()
        finally:
            trainer.close()
    dist.destroy_process_group()


def evaluate_job(config: JobConfig) -> Results:
    """Evaluate the weights that the job of ``config`` would go on from, in its layout; all ranks call this.

    Returns:
        What was found, and written to :func:`~torchtitan_upipe.job.results.results_path`.

    Raises:
        ValueError: the job has no weights, or its evaluation cannot be done.
    """
    if not config.checkpoint.enable:
        raise ValueError(
            "checkpoint.enable = false: there are no weights to evaluate; set it to true, and checkpoint.load_step, or "
            "checkpoint.initial_load_path for weights from elsewhere."
        )
    config.evaluation.enable = True
    check_evaluation(config)
    trainer = Trainer(config)
    try:
        assert trainer.evaluator is not None
        step = trainer.checkpointer.load_weights(config.checkpoint.load_step)
        results = trainer.evaluator.run(trainer.model_parts[0], step)
    finally:
        trainer.close()
    dist.destroy_process_group()
    return results
