"""The ledger's second leg: the real trainer, run on fake tensors by a child process (``simulate.py``), and measured."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchtitan_upipe.memory.prediction import Prediction

CHILD = "torchtitan_upipe.dry_run.simulate"


@dataclass(frozen=True)
class DryRun:
    """A job to run dry.

    Attributes:
        args: the job's command line.
        world_size: ranks of the job.
        rank: the one that runs.
        workspace: count what the attention kernel's backward holds beside its results (``kernels/simulated.py``).
    """

    args: tuple[str, ...]
    world_size: int
    rank: int = 0
    workspace: bool = True


def dry_run(jobs: Sequence[DryRun]) -> list[Prediction]:
    """Run two training steps of each job on fake tensors; no device is needed and no rank started.

    One child process does all jobs: starting it takes some seconds, a job of the debug models one or two.

    Raises:
        ValueError: a job is refused; the sentence of ``job/check.py``.
        RuntimeError: the child failed; its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "answers.jsonl"
        child = subprocess.run(
            [sys.executable, "-m", CHILD, str(answers)],
            input="".join(json.dumps(dataclasses.asdict(job)) + "\n" for job in jobs),
            capture_output=True,
            text=True,
            check=False,
        )
        found = [json.loads(line) for line in answers.read_text().splitlines()] if answers.exists() else []
    if child.returncode != 0 or len(found) != len(jobs):
        raise RuntimeError(f"the dry run ended with code {child.returncode}: {child.stderr.strip()[-2000:]}")
    for job, answer in zip(jobs, found, strict=True):
        if "error" in answer:
            raise ValueError(f"dry run of {' '.join(job.args)}: {answer['error']}")
    return [Prediction(**answer) for answer in found]
