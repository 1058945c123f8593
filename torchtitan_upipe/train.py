"""Entry point: ``torchrun --nproc_per_node 4 -m torchtitan_upipe.train --job.config_file train_configs/....toml``.

A batch's way from here: TorchTitan's trainer draws it (``data/text.py``), shards it over the context-parallel ranks and
runs the model, whose attention (``models/attention.py``) hands itself to a method (``cp/``).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchtitan_upipe.device import enable_cpu

enable_cpu()  # before any torchtitan import: see device.py

import torch.distributed as dist  # noqa: E402
import torchtitan.train  # noqa: E402
from torch import Tensor  # noqa: E402
from torchtitan.config import JobConfig  # noqa: E402
from torchtitan.protocols.train_spec import get_train_spec  # noqa: E402
from torchtitan.tools.logging import init_logger, logger  # noqa: E402
from torchtitan.tools.utils import device_type  # noqa: E402

from torchtitan_upipe.config import load_config  # noqa: E402
from torchtitan_upipe.data.batch import shard_batch  # noqa: E402
from torchtitan_upipe.models.tiled import summed_loss  # noqa: E402
from torchtitan_upipe.train_spec import SPECS  # noqa: E402
from torchtitan_upipe.validate import validate_job  # noqa: E402


class Trainer(torchtitan.train.Trainer):
    """TorchTitan's trainer, sharding by the method's own layout; hybrids need one that TorchTitan does not have."""

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Any]]:
        """``input_dict["input"]`` and ``labels``, both ``[B, S]``, to this rank's ``[B, N]``."""
        eos_id = getattr(self.tokenizer, "eos_id", None)
        inputs, labels, kwargs = shard_batch(input_dict["input"], labels, self.parallel_dims, self.job_config, eos_id)
        return inputs, labels, {}, kwargs

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Tensor
    ) -> Tensor:
        """One micro-batch, as TorchTitan does without pipelining; a tiled model computes its loss itself.

        Returns:
            This rank's share of the mean loss per token: a scalar whose sum over ranks is the mean.
        """
        inputs, labels, extra_inputs, kwargs = self.post_dataloading_process(input_dict, labels)
        (model,) = self.model_parts
        with self.train_context():
            with self.maybe_enable_amp:
                loss = summed_loss(model, self.loss_fn, inputs, labels, **extra_inputs, **kwargs) / global_valid_tokens
            loss.backward()
        return loss


def read_job(args: Sequence[str]) -> JobConfig:
    """Read and check the job that the command line describes.

    Raises:
        ValueError: with one sentence that says what is wrong and how to mend it.
    """
    config = load_config(args)
    if config.model.name not in SPECS:
        raise ValueError(f"model.name = {config.model.name!r} is unknown here; choose one of {', '.join(SPECS)}.")
    flavors = get_train_spec(config.model.name).model_args
    if config.model.flavor not in flavors:
        raise ValueError(
            f"model.flavor = {config.model.flavor!r} is unknown for {config.model.name}; "
            f"choose one of {', '.join(flavors)}."
        )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if config.comm.mode != "default":
        world_size = int(os.environ.get("NGPU", world_size))
    validate_job(config, flavors[config.model.flavor], world_size, device_type)
    return config


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


def refuse(error: ValueError) -> int:
    """Report a refused job once per node, where torchrun's closing summary shows it; return the exit code.

    torchrun prints the message of the first failing rank's error file last of all. The other ranks wait to be ended
    by torchrun, so that theirs is not the failure it reports.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) != 0:
        time.sleep(30)
        return 1
    print(f"ValueError: {error}", file=sys.stderr, flush=True)
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        Path(error_file).write_text(json.dumps({"message": f"ValueError: {error}", "timestamp": int(time.time())}))
    return 1


def main(args: Sequence[str] | None = None) -> int:
    """Run the job of the command line; return the exit code."""
    init_logger()
    try:
        config = read_job(sys.argv[1:] if args is None else args)
    except ValueError as error:
        return refuse(error)
    run_job(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
