"""Run a function on several gloo ranks, and never hang.

Ranks are forked from a server process that has imported torch and torchtitan once, so starting them costs little. The
first failing rank fails the test with its own traceback; ranks that do not finish in time are killed.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = ["tests.preload"]
_CONTEXT.set_forkserver_preload(_PRELOADED)


class RankError(AssertionError):
    """A rank failed, died or did not finish; the message holds its traceback."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, init: bool = True
) -> list[Any]:
    """Call ``function(*args)`` on each of ``world_size`` ranks; return their results in rank order.

    Args:
        function: importable, as are its arguments picklable. ``torch.distributed`` is initialised with gloo around
            it, unless ``init`` is False; then the usual torchrun variables are set for the callee.
        timeout: seconds for the whole call.

    Raises:
        RankError: a rank raised, died or ran out of time.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_rank_main, args=(sender, rank, world_size, folder, init, function, args), daemon=True
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, time.monotonic() + timeout, timeout)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def preload(module: str) -> None:
    """Let the server import ``module``, too, where a test file that is collected asks for it: ranks then need not."""
    if module not in _PRELOADED:
        _PRELOADED.append(module)  # the list that the server reads when the first rank starts


def _collect(pipes: list[Connection], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(pipes)) if rank not in results]
            raise RankError(f"ranks {missing} did not finish within {timeout:.0f} s")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                error, results[rank] = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                raise RankError(f"rank {rank} died without a word") from None
            if error is not None:
                raise RankError(f"rank {rank} failed:\n{error}")
    return [torch.load(io.BytesIO(results[rank]), weights_only=False) for rank in range(len(pipes))]


def _rank_main(
    sender: Connection,
    rank: int,
    world_size: int,
    folder: str,
    init: bool,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    try:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        store = Path(folder) / "store"
        if init:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=60),
            )
        else:
            _torchrun_environment(rank, world_size, store)
        result = function(*args)
        if dist.is_initialized():
            dist.destroy_process_group()
        buffer = io.BytesIO()
        torch.save(result, buffer)  # by value: a rank may be gone before its shared memory is opened
        sender.send((None, buffer.getvalue()))
        if _KEEP:
            signal.pause()  # others may still need the rendezvous server; who collects results ends this rank
    except BaseException:  # a rank reports whatever ended it, SystemExit too
        sender.send((traceback.format_exc(), None))


def _torchrun_environment(rank: int, world_size: int, store: Path) -> None:
    """What torchrun sets; the callee's ``env://`` rendezvous then finds a port through a shared file."""
    rendezvous = dist.FileStore(str(store), world_size)
    if rank == 0:
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        rendezvous.set("port", str(server.port))
        _KEEP.append(server)
    port = rendezvous.get("port").decode()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
        TORCHELASTIC_USE_AGENT_STORE="True",
    )


_KEEP: list[Any] = []  # the rendezvous server lives as long as its rank
