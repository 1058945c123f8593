"""A thousand steps without growth of memory: ``pytest -m slow tests/test_soak.py``, with MALLOC_ARENA_MAX=1 or not."""

from __future__ import annotations

import gc
import os
import resource
from pathlib import Path

import pytest
import torch

from tests.jobs import job_args
from tests.ranks import run_ranks
from tests.test_train import HIDDEN, LLAMA, RING, fpdt, upipe

STEPS = 1000
METHODS = {"upipe": upipe(4, "host"), "ring": RING, "fpdt": fpdt(32, "host"), "hidden-states": HIDDEN}


def soak(args: list[str]) -> dict[int, tuple[float, int, int]]:
    """MiB of this rank's resident set, live tensors and their MiB of this rank, every 100 steps."""
    from torchtitan_upipe.job.read import read_job
    from torchtitan_upipe.titan.trainer import Trainer

    class Watched(Trainer):
        def should_continue_training(self) -> bool:
            if self.step % 100 == 0 and self.step:
                seen[self.step] = held()
            return super().should_continue_training()

    seen: dict[int, tuple[float, int, int]] = {}
    trainer = Watched(read_job(args))
    trainer.train()
    trainer.close()
    return seen


def held() -> tuple[float, int, int]:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    size = sum(t.untyped_storage().nbytes() for t in tensors if type(t) in (torch.Tensor, torch.nn.Parameter))
    return round(pages * resource.getpagesize() / 2**20, 1), len(tensors), size


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", METHODS)
def test_a_thousand_steps_hold_no_more_than_the_first_hundred(method: str, tmp_path: Path) -> None:
    options = {
        **LLAMA,
        **METHODS[method],
        "activation_checkpoint__mode": "full",
        "training__seq_len": 128,
        "training__steps": STEPS,
        "checkpoint__interval": 100,
        "checkpoint__keep_latest_k": 2,
        "metrics__log_freq": 10,
    }
    args = job_args(tmp_path, 2, "--checkpoint.enable", **options)
    for rank, seen in enumerate(run_ranks(soak, 2, args, init=False, timeout=3500)):
        print(f"{method}, rank {rank}, MALLOC_ARENA_MAX={os.environ.get('MALLOC_ARENA_MAX', 'unset')}:", seen)
        (_, tensors, size), *_ = seen.values()
        assert [(t, s) for _, t, s in seen.values()] == [(tensors, size)] * len(seen)
        assert seen[STEPS][0] - seen[200][0] < 100  # MiB; what malloc's arenas take
