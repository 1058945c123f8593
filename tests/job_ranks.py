"""Ranks that are kept alive over jobs, which share the world's process group: starting them costs once.

A rank that fails, dies or hangs costs new ones.
"""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.ranks import _CONTEXT, RankError, _torchrun_environment


class JobRanks:
    """``world_size`` ranks; a context manager."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def __enter__(self) -> JobRanks:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.processes, self.pipes = [], []

    def __call__(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """``function(*args)`` of every rank, in their order.

        Raises:
            RankError: a rank raised, died or ran out of time; the next call starts new ones.
        """
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(results) < self.world_size:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            for pipe in ready:
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    error, results[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    error = "it died without a word"
                if error is not None:
                    self.stop()
                    raise RankError(f"rank {rank} failed:\n{error}")
            if not ready:
                self.stop()
                raise RankError(f"not all ranks finished within {timeout:.0f} s")
        return [results[rank] for rank in range(self.world_size)]

    def _start(self) -> None:
        folder = tempfile.mkdtemp()
        for rank in range(self.world_size):
            here, there = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(there, rank, self.world_size, folder), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)


def _serve(pipe: Connection, rank: int, world_size: int, folder: str) -> None:
    import torch

    torch.set_num_threads(1)
    _torchrun_environment(rank, world_size, Path(folder) / "store")
    # TorchTitan uses a group that is there; one that is destroyed and made anew sometimes hangs in gloo
    torch.distributed.destroy_process_group = lambda *_: None
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((None, function(*args)))
        except BaseException:  # a rank reports whatever ended it, SystemExit too
            pipe.send((traceback.format_exc(), None))
