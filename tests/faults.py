"""Faults in a training job, by rank, step and phase, and jobs run one after another on the same ranks."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from tests.ranks import _torchrun_environment
from tests.test_failures import last_words

# What a rank does: "start" is when its trainer is built, "second run" that of a checkpointed block. A signal in one of
# the last two leaves the step finished.
PHASES = ("start", "data", "forward", "second run", "backward", "optimizer", "save")


@dataclass(frozen=True)
class Fault:
    """What goes wrong, once: where, and ``kind``, one of the methods below or a signal's name."""

    kind: str
    rank: int
    step: int
    phase: str

    def strike(self, *_: object) -> None:
        if self.kind.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, self.kind))
        elif self.kind == "error":
            raise RuntimeError("a collective of this rank fails")
        elif self.kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
        elif self.kind == "pause":
            subprocess.Popen(["sh", "-c", f"sleep 3; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            raise AssertionError(self.kind)


def spoil(tensor: torch.Tensor) -> torch.Tensor:
    """The same with one number that is none."""
    spoilt = tensor.clone()
    spoilt.flatten()[0] = torch.nan
    return spoilt


def inject(fault: Fault) -> Any:
    """Within, a trainer that is built meets ``fault``."""
    from torchtitan_upipe.titan.trainer import Trainer

    build = Trainer.__init__

    def init(trainer: Any, config: Any) -> None:
        build(trainer, config)
        if dist.get_rank() == fault.rank:
            arm(trainer, fault)

    return patch.object(Trainer, "__init__", init)


def arm(trainer: Any, fault: Fault) -> None:
    """Let ``fault`` strike the first time that ``trainer`` comes by its phase in its step."""
    struck = []

    def here(strike: Callable[[], Any]) -> Any:
        if trainer.step != fault.step or struck:
            return None
        struck.append(True)
        return strike()

    blocks = list(trainer.model_parts[0].layers.values())
    inner = getattr(blocks[1], "_checkpoint_wrapped_module", blocks[1])
    if fault.phase == "start":
        fault.strike()
    elif fault.phase == "data":
        draw = trainer.batch_generator

        def drawn(loader: Any) -> Iterator[Any]:
            for batch in draw(loader):
                here(fault.strike)
                yield batch

        trainer.batch_generator = drawn
    elif fault.phase == "forward" and fault.kind == "nan":
        blocks[1].register_forward_hook(lambda _m, _a, output: here(lambda: spoil(output)))
    elif fault.phase == "forward":
        blocks[1].register_forward_hook(lambda *_: here(fault.strike))
    elif fault.phase == "second run":
        runs = []
        inner.register_forward_pre_hook(
            lambda *_: runs.append(trainer.step) or (runs.count(fault.step) == 2 and here(fault.strike)) or None
        )
    elif fault.phase == "backward":
        spoilt = (lambda grad: here(lambda: spoil(grad))) if fault.kind == "nan" else (lambda _: here(fault.strike))
        blocks[1].register_forward_hook(
            lambda _m, _a, output: output.register_hook(spoilt) and None if output.requires_grad else None
        )
    elif fault.phase == "optimizer":
        next(iter(trainer.optimizers)).register_step_pre_hook(lambda *_: here(fault.strike))
    elif fault.phase == "save":
        save = trainer.checkpointer.dcp_save
        trainer.checkpointer.dcp_save = lambda *args, **kwargs: (here(fault.strike), save(*args, **kwargs))[1]
    else:
        raise AssertionError(fault.phase)


def run_with_faults(rendezvous: Path, jobs: list[tuple[list[str], Fault | None]]) -> list[tuple[int, str]]:
    """Each job's exit code and what it printed to standard error, on this rank, one job after another."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results = []
    for number, (args, fault) in enumerate(jobs):
        _torchrun_environment(rank, size, rendezvous / str(number))
        with inject(fault) if fault else nullcontext():
            results.append(last_words(args))
    return results
