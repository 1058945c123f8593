"""The results of a sweep: one JSON line per finished run, and what they say of each arm."""

from __future__ import annotations

import fcntl
import json
import os
import statistics
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.arms import Arm

RESULTS = "results.jsonl"
STEP = "gradients, activations, exchanges"  # what of a measured peak is not parameters or optimizer state
GIB = 2**30

Record = dict[str, Any]


class ResultsFile:
    """``results.jsonl`` of a sweep's folder; only whole lines count.

    A line is written with one call and reaches the disk before the sweep goes on. A sweep that was killed in the
    middle of a line leaves a tail without its line end, which the next sweep removes: that run was not finished.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / RESULTS

    def load(self) -> list[Record]:
        """All records, oldest first.

        Raises:
            ValueError: a whole line is no JSON object.
        """
        if not self.path.exists():
            return []
        whole, _, _ = self.path.read_bytes().rpartition(b"\n")
        records = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                records.append(dict(json.loads(line)))
            except ValueError as error:
                raise ValueError(f"{self.path}, line {number} is not a result: {error}.") from error
        return records

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep other sweeps out of this folder, and repair the file's end.

        Raises:
            ValueError: another sweep writes here.
        """
        with self.path.open("ab+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another sweep is writing {self.path}; wait for it or choose another --out."
                ) from None
            content = self.path.read_bytes()
            file.truncate(content.rfind(b"\n") + 1)
            yield

    def append(self, record: Record) -> None:
        """Add one line and wait until it is on disk."""
        with self.path.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True)
class ArmResult:
    """What the runs of one arm say together.

    Attributes:
        status: ``"ok"`` if any run was, else the first run's: ``"OOM"``, ``"killed"`` or ``"failed"``.
        rates: tokens per second and rank of each run, from its median step.
        peak_device, peak_host: bytes, the largest of the runs.
        held: bytes of ``peak_device`` that outlive a step, by category.
        predicted: bytes by category; empty without a prediction.
    """

    arm: Arm
    status: str
    runs: int
    reason: str = ""
    rates: tuple[float, ...] = ()
    peak_device: int = 0
    peak_host: int = 0
    held: dict[str, int] = field(default_factory=dict)
    predicted: dict[str, int] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Per rank, of the median run."""
        return statistics.median(self.rates)

    @property
    def spread(self) -> float:
        """How far apart the runs' rates are, relative to the median."""
        return (max(self.rates) - min(self.rates)) / self.tokens_per_second

    @property
    def predicted_device(self) -> int:
        """Predicted peak of device memory in bytes; 0 without a prediction."""
        return sum(self.predicted.values())

    @property
    def measured(self) -> dict[str, int]:
        """The measured peak in bytes by category: what outlives a step, and all that a step itself needs."""
        return {**self.held, STEP: self.peak_device - sum(self.held.values())}


def summarise(records: Iterable[Record]) -> dict[Arm, ArmResult]:
    """The results by arm, in the order of first appearance."""
    by_arm: dict[Arm, list[Record]] = {}
    for record in records:
        by_arm.setdefault(Arm(**record["arm"]), []).append(record)
    return {arm: _join(arm, runs) for arm, runs in by_arm.items()}


def _join(arm: Arm, runs: list[Record]) -> ArmResult:
    predicted = dict(runs[0].get("predicted", {}).get("by_category", {}))
    good = [run for run in runs if run["status"] == "ok"]
    if not good:
        return ArmResult(arm, runs[0]["status"], len(runs), runs[0]["reason"], predicted=predicted)
    largest = max(good, key=lambda run: run["peak_device_bytes"])
    return ArmResult(
        arm,
        "ok",
        len(good),
        rates=tuple(run["tokens_per_second_per_rank"] for run in good),
        peak_device=largest["peak_device_bytes"],
        held=largest["held_bytes"],
        peak_host=max(run["peak_host_bytes"] for run in good),
        predicted=predicted,
    )
