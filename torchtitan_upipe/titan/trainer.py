"""TorchTitan's trainer with the project's sharding, loss, data state and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
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
from torchtitan_upipe.titan.checkpoint import Checkpoints
from torchtitan_upipe.titan.dims import TrainerDims
from torchtitan_upipe.titan.evaluation import Evaluator
from torchtitan_upipe.titan.export import model_files
from torchtitan_upipe.titan.scores import Scorer
from torchtitan_upipe.titan.settings import choose_settings
from torchtitan_upipe.titan.tiled import summed_loss


class Trainer(torchtitan.train.Trainer):
    """TorchTitan's trainer, sharding by the method's own layout; hybrids need one that TorchTitan does not have.

    A batch's way: the data loader (``titan/datasets.py``) draws it, :meth:`post_dataloading_process` takes this rank's
    share, the model, whose attention (``titan/attention.py``) hands itself to a method (``cp/``), turns it into a loss.

    Raises:
        ValueError: the model was not given the plugin's attention.
    """

    def __init__(self, job_config: JobConfig) -> None:
        with _own_checkpoints():
            super().__init__(job_config)
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
        """TorchTitan's loop, and a line with what came of it."""
        began = time.monotonic()
        super().train()
        self.checkpointer.wait()
        if dist.get_rank() == 0:
            logger.info(self._closing_line(time.monotonic() - began))

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
            loss.backward()
        return loss


@contextmanager
def _own_checkpoints() -> Iterator[None]:
    """Within, TorchTitan's trainer, which names the class itself, builds :class:`Checkpoints`."""
    titans = torchtitan.train.CheckpointManager
    torchtitan.train.CheckpointManager = Checkpoints
    try:
        yield
    finally:
        torchtitan.train.CheckpointManager = titans


def run_job(config: JobConfig) -> None:
    """Train as ``config`` says, or write a seed checkpoint."""
    trainer = Trainer(config)
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
