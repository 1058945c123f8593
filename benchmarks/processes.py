"""Processes that measure: a command with its output in a file, and a worker that calls functions elsewhere."""

from __future__ import annotations

import gc
import multiprocessing
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

from benchmarks.arms import launch_environment
from benchmarks.results import Record

KILLED = "Signal 9 (SIGKILL)"  # torchrun's words for it
STOPPED = "stopped after"  # begins the reason of what took too long
PATIENCE = 30.0  # seconds that an ended command has to end its own children


def run_logged(
    command: Sequence[str], log: Path, timeout: float, environment: Mapping[str, str] | None = None
) -> Record | None:
    """Run ``command`` with its output in ``log``; end it with this process.

    Args:
        timeout: seconds.
        environment: variables beside those of ``launch_environment``.

    Returns:
        None, or the outcome where the ranks themselves cannot tell it.
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**launch_environment(), **(environment or {})},
            preexec_fn=lambda: _prctl_pr_set_pdeathsig(signal.SIGTERM),  # torchrun then ends its ranks
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            return {"status": "failed", "reason": f"{STOPPED} {timeout:.0f} s"}
        finally:
            _end(process)
    if process.returncode and KILLED in log.read_text(errors="replace"):  # its neighbours only see it gone
        return {"status": "killed", "reason": "a rank was killed, as the system does where host memory runs out"}
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        process.kill()  # one that hangs in a driver does not hear SIGTERM
        process.wait()


class Worker:
    """Calls functions in a process of its own, so that a device error or a crash ends no more than one call.

    The process starts with the first call, and anew after a call that failed: a device error outlives its cause.
    """

    def __init__(self) -> None:
        self._process: Any = None
        self._pipe: Connection | None = None

    def call(self, seconds: float, function: Callable[..., Record], arguments: tuple[Any, ...]) -> Record:
        """``function(*arguments)``, both importable, with ``status``; or the status and reason of a failure.

        Args:
            seconds: after which the call counts as failed and its process is ended.
        """
        pipe = self._pipe or self._start()
        pipe.send((function, arguments))
        try:
            if pipe.poll(seconds):
                record: Record = pipe.recv()
            else:
                record = {"status": "failed", "reason": f"{STOPPED} {seconds:.0f} s"}
        except (EOFError, ConnectionError):
            self._process.join(PATIENCE)
            record = {"status": "failed", "reason": f"its process ended with code {self._process.exitcode}"}
        if record["status"] == "failed":
            self.end()
        return record

    def end(self) -> None:
        """End the process."""
        if self._pipe is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._pipe = None

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        return self._pipe


def _serve(pipe: Connection) -> None:
    from benchmarks.measured import failure

    with suppress(EOFError):  # the other end is gone
        while True:
            function, arguments = pipe.recv()
            try:
                record = {"status": "ok", **function(*arguments)}
            except Exception as error:
                record = failure(error)
            gc.collect()
            if torch.cuda.is_available() and record["status"] != "failed":
                torch.cuda.empty_cache()
            pipe.send(record)
