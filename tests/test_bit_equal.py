"""A run repeats another to the last digit, whenever its ranks come, and also where it goes on in the middle of it."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from tests.job_ranks import JobRanks
from tests.jobs import Log, job_args, read_log
from tests.test_train import HIDDEN, HYBRID, QWEN, RING, ULYSSES, fpdt, upipe

METHODS = {
    "upipe": (2, upipe(4)),
    "upipe-host": (2, upipe(2, "host")),
    "upipe-none": (2, upipe(2, "none")),
    "ulysses": (2, ULYSSES),
    "ring": (2, RING),
    "hybrid": (4, upipe(4) | HYBRID),
    "fpdt": (2, fpdt(24, "host")),
    "hidden-states": (2, HIDDEN),
}
COLLECTIVES = (
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all_single",
    "batch_isend_irecv",
    "reduce_scatter_tensor",
)


def run(args: list[str], late: bool) -> tuple[int, bool]:
    """Exit code of a job, and whether it was late: its collectives by up to 2 ms each, its steps by up to 30 ms."""
    from torchtitan_upipe.titan.trainer import Trainer
    from torchtitan_upipe.train import main

    def delayed(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            time.sleep(draw.random() * seconds)
            delays.append(seconds)
            return function(*args, **kwargs)

        return call

    delays: list[float] = []
    draw = random.Random(dist.get_rank() if dist.is_initialized() else None)
    with ExitStack() as stack:
        if late:
            stack.enter_context(patch.object(Trainer, "train_step", delayed(Trainer.train_step, 0.03)))
            for name in COLLECTIVES:
                stack.enter_context(patch.object(dist, name, delayed(getattr(dist, name), 0.002)))
        return main(args), len(delays) > 20


@pytest.fixture(scope="module")
def ranks() -> Iterator[dict[int, JobRanks]]:
    with JobRanks(2) as two, JobRanks(4) as four:
        yield {2: two, 4: four}


@pytest.mark.parametrize("method", METHODS)
def test_late_and_resumed_runs_repeat_the_unbroken_one(method: str, ranks: dict[int, JobRanks], tmp_path: Path) -> None:
    """Model, optimizer, schedule and position in the data all come back, and no sum depends on who comes first."""
    world, options = METHODS[method]
    job = {**QWEN, **options, "activation_checkpoint__mode": "full", "training__seq_len": 96, "training__steps": 4}

    def log(name: str, late: bool) -> Log:
        flags = ("--checkpoint.enable", "--debug.deterministic")
        args = job_args(tmp_path / name, world, *flags, **job, checkpoint__interval=2)
        assert ranks[world](run, args, late) == [(0, late)] * world
        return read_log(tmp_path / name)

    whole = log("whole", late=False)
    shutil.copytree(tmp_path / "whole/checkpoint/step-2", tmp_path / "resumed/checkpoint/step-2")
    resumed = log("resumed", late=True)
    assert len(whole.loss) == 4
    assert (resumed.loss, resumed.grad_norm) == (whole.loss[2:], whole.grad_norm[2:])
    if method in ("upipe", "fpdt"):
        assert log("late", late=True) == whole
