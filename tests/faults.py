"""Faults in a training job, by rank, step and phase, and jobs run one after another on the same ranks."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import torch
import torch.distributed as dist

from tests.ranks import _torchrun_environment
from tests.test_failures import last_words

# What a rank does: "start" is when its trainer is built, "second run" that of a checkpointed block. A signal in one of
# the last two leaves the step finished, as do "evaluation", which is validation, too, and "in flight", when an
# asynchronous save goes on beside the next step.
PHASES = ("start", "data", "forward", "second run", "backward", "optimizer", "save")


@dataclass(frozen=True)
class Fault:
    """What goes wrong, where.

    ``kind`` is the name of a signal, "error", "memory", "pause", "long pause", "slow" (from ``step`` on, again and
    again), or on tensors of "forward" and "backward" "nan" (from ``step`` on) and "flip" (once).
    """

    kind: str
    rank: int
    step: int
    phase: str

    def strike(self, *_: object) -> None:
        if self.kind.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, self.kind))
            if self.phase == "save":
                time.sleep(1.5)  # all ranks have agreed meanwhile: on the begin of the next step
        elif self.kind == "error":
            raise RuntimeError("a collective of this rank fails")
        elif self.kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
        elif self.kind in ("pause", "long pause"):
            seconds = 3 if self.kind == "pause" else 20
            subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.kind == "slow":
            time.sleep(0.5)
        else:
            raise AssertionError(self.kind)


def spoil(module: Any, tensor: torch.Tensor) -> torch.Tensor | None:
    """The same with one number that is none; None where ``tensor`` stands for rows in host memory, spoilt there."""
    hidden = getattr(module, "hidden", None)
    if hidden is not None:
        rows = hidden.of(tensor)
        rows.write(slice(0, 1), tensor.new_full((*rows.shape[:1], 1, *rows.shape[2:]), torch.nan))
        return None
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
    """Let ``fault`` strike when ``trainer`` first comes by its phase in its step; "nan" and "slow" from then on."""
    struck: list[bool] = []

    def here(strike: Callable[[], Any]) -> Any:
        if trainer.step < fault.step or (struck and fault.kind not in ("nan", "slow")):
            return None
        struck.append(True)
        return strike()

    def on_tensor(tensor: torch.Tensor) -> torch.Tensor | None:
        return here(lambda: spoil(block, tensor) if fault.kind in ("nan", "flip") else fault.strike())

    block = list(trainer.model_parts[0].layers.values())[1]
    if fault.phase == "start":
        fault.strike()
    elif fault.phase == "data":
        draw = trainer.batch_generator

        def drawn(loader: Any) -> Iterator[Any]:
            for batch in draw(loader):
                here(fault.strike)
                yield batch

        trainer.batch_generator = drawn
    elif fault.phase == "forward":
        block.register_forward_hook(lambda _m, _a, output: on_tensor(output))
    elif fault.phase == "attention":
        block.attention.register_forward_pre_hook(lambda *_: here(fault.strike))
    elif fault.phase == "second run":
        runs = itertools.count()  # odd ones are second runs
        run_twice = block._checkpoint_wrapped_module
        run_twice.register_forward_pre_hook(lambda *_: here(fault.strike) if next(runs) % 2 else None)
    elif fault.phase == "backward":

        def watch(_m: object, _a: object, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(on_tensor)

        block.register_forward_hook(watch)
    elif fault.phase == "optimizer":
        next(iter(trainer.optimizers)).register_step_pre_hook(lambda *_: here(fault.strike))
    elif fault.phase == "save":
        save = trainer.checkpointer.dcp_save
        trainer.checkpointer.dcp_save = lambda *args, **kwargs: (here(fault.strike), save(*args, **kwargs))[1]
    elif fault.phase == "evaluation":
        block.register_forward_hook(lambda module, _a, output: None if module.training else on_tensor(output))
    elif fault.phase == "in flight":
        save_beside = trainer.checkpointer.dcp_save

        def sent_off(*args: Any, **kwargs: Any) -> Any:
            with_files = here(slow_files)
            saved = save_beside(*args, **kwargs)
            if with_files:
                fault.strike()
            return saved

        trainer.checkpointer.dcp_save = sent_off
    else:
        raise AssertionError(fault.phase)


def slow_files() -> bool:
    """Let the next file that this process writes out take two seconds."""
    sync = os.fsync

    def slowly(file: Any) -> None:
        os.fsync = sync
        time.sleep(2)
        sync(file)

    os.fsync = slowly
    return True


def run_with_faults(rendezvous: Path, jobs: list[tuple[list[str], Fault | None]]) -> list[tuple[int, str]]:
    """Each job's exit code and what it printed to standard error, on this rank, one job after another."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # loaders have workers
    results = []
    for number, (args, fault) in enumerate(jobs):
        _torchrun_environment(rank, size, rendezvous / str(number))
        with inject(fault) if fault else nullcontext():
            results.append(last_words(args))
        if dist.is_initialized():  # after a failure
            dist.destroy_process_group()
    return results


def run_apart(folder: Path, jobs: list[tuple[list[str], Fault | None]]) -> list[tuple[int, float, str]]:
    """Each job in a process of its own, with what torchrun does about failures: the other ranks get ``SIGTERM``.

    Returns:
        Of this rank: exit code (negative: the signal that ended it), seconds, what it printed to standard error.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    endings = []
    for number, (args, fault) in enumerate(jobs):
        place = folder / str(number)
        place.mkdir(exist_ok=True)
        _torchrun_environment(rank, size, place / "store")
        began = time.monotonic()
        process = os.fork()
        if process == 0:
            os.dup2(os.open(place / f"errors-{rank}", os.O_CREAT | os.O_WRONLY), 2)
            with inject(fault) if fault else nullcontext():
                _end_as_a_command(args)
        (place / f"process-{rank}").write_text(str(process))
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if code != 0:
            for other in place.glob("process-*"):
                with suppress(ProcessLookupError):
                    os.kill(int(other.read_text()), signal.SIGTERM)
        endings.append((code, time.monotonic() - began, (place / f"errors-{rank}").read_text()))
    return endings


def _end_as_a_command(args: list[str]) -> NoReturn:
    from torchtitan_upipe.device import leave
    from torchtitan_upipe.train import main

    try:
        code = main(args)
    except BaseException:
        traceback.print_exc()
        code = 1
    leave(code)
