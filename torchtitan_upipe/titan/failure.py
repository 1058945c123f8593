"""How a job that has started ends when it cannot go on: one sentence, and the traceback in a file."""

from __future__ import annotations

from pathlib import Path

from torchtitan.config import JobConfig

from torchtitan_upipe.device import is_out_of_memory
from torchtitan_upipe.launch import keep_traceback
from torchtitan_upipe.memory.remedies import explain_out_of_memory

LOST = ("Connection closed by peer", "Connection reset by peer", "remote process exited or there was a network error")
EXPLAINED = (ValueError, AssertionError, OSError)  # what the project, TorchTitan and torch refuse a job with


def explain(config: JobConfig, error: Exception) -> str | None:
    """One sentence for what ended the job, or None where only a traceback says it: an error of the program."""
    if is_out_of_memory(error):
        return f"OutOfMemoryError: {explain_out_of_memory(config, error)}"
    lost = isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST)
    if not lost and not isinstance(error, EXPLAINED):
        return None
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["it gave no reason"]
    path = keep_traceback(error, Path(config.job.dump_folder))
    where = f" (traceback: {path})" if path else ""
    if lost:
        return f"ConnectionError: another rank ended, or its node cannot be reached; its own words say why{where}"
    name = type(error).__name__
    said = lines[-1].removeprefix(f"{name}: ") if "in DataLoader worker process" in lines[0] else lines[0]
    return f"{name}: {said}{where}"
