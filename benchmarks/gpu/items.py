"""What the command is made of: items that are measured in turn, and the lines that they leave."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.environment import environment
from benchmarks.measured import failure
from benchmarks.processes import STOPPED, Worker
from benchmarks.results import Record, ResultsFile

SKIPPED = "skipped"  # of a line whose item another start may still measure


@dataclass(frozen=True)
class Sizes:
    """How large things are.

    Attributes:
        toy: so small that a CPU shows that the command works; the figures mean nothing.
        tests: arguments of pytest.
        kernels: attention kernels to time.
        tokens: of the sequences that are timed.
        heads: query and KV heads of them.
        head_dim: width of a head.
        products: ``(m, k, n)`` of matrix products ``[m, k] x [k, n]``.
        copied: bytes of a copy.
        timed: seconds for which a function is called again and again.
        startup: seconds until a process of its own has begun to measure.
        ranks: of the rehearsed jobs.
        rehearsals: arms of ``benchmarks.ab``, each with its job file and tokens.
        one_gpu: job file of the training on one GPU.
        flavors: of its model, largest first.
        lengths: tokens of its sequences, longest first.
        traced: tokens of the traced layer's sequence, over ``ranks`` ranks.
        traced_heads: query heads, KV heads, head chunk of that layer.
    """

    toy: bool
    tests: tuple[str, ...]
    kernels: tuple[str, ...]
    tokens: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]
    head_dim: int
    products: tuple[tuple[int, int, int], ...]
    copied: int
    timed: float
    startup: float
    ranks: int
    rehearsals: tuple[tuple[str, int, str], ...]
    one_gpu: str
    flavors: tuple[str, ...]
    lengths: tuple[int, ...]
    traced: int
    traced_heads: tuple[int, int, int]


def newest_lines(folder: Path, retry_before: int = 0) -> dict[str, Record]:
    """The newest line of each key, failures among the first ``retry_before`` lines left out.

    Raises:
        ValueError: a line is none.
    """
    found: dict[str, Record] = {}
    for number, line in enumerate(ResultsFile(folder).load()):
        if number >= retry_before or line["status"] in ("ok", SKIPPED):
            found[line["key"]] = line
    return found


@dataclass(frozen=True)
class Setup:
    """A start of the command: where it writes, what is there already, and on what it measures."""

    folder: Path
    sizes: Sizes
    device_type: str
    retry_before: int = 0  # failures among so many first lines do not count
    lines: dict[str, Record] = field(default_factory=dict)  # by key, the newest
    worker: Worker = field(default_factory=Worker)

    def read(self) -> None:
        """Take up the lines of earlier starts, and of the processes of this one.

        Raises:
            ValueError: they are of the other sizes.
        """
        found = newest_lines(self.folder, self.retry_before)
        for line in found.values():
            if line["toy"] != self.sizes.toy:
                kind, flag = ("a toy run", "with") if line["toy"] else ("a real run", "without")
                raise ValueError(f"{self.folder} holds lines of {kind}; choose another --out, or start {flag} --toy.")
        self.lines.update(found)

    def add(self, key: str, outcome: Record) -> Record:
        """Append a line."""
        line = {"key": key, "toy": self.sizes.toy, **outcome}
        if outcome["status"] != SKIPPED:
            line |= environment(self.device_type)
        ResultsFile(self.folder).append(line)
        self.lines[key] = line
        return line

    def measured(self, prefix: str) -> list[Record]:
        """The lines of what went well whose keys begin with ``prefix``, in order."""
        return [line for key, line in self.lines.items() if key.startswith(prefix) and line["status"] == "ok"]


@dataclass(frozen=True)
class Item:
    """One thing to measure.

    Attributes:
        key: names it in the lines.
        run: measures it within so many seconds; its outcome has ``status`` and, unless that is ``"ok"``, ``reason``.
        estimate: seconds that it will take, by what the lines say so far; 0 where nothing is known.
        most: seconds that it may take beside three times that; what takes longer hangs.
    """

    key: str
    run: Callable[[float], Record]
    estimate: Callable[[], float] = lambda: 0.0
    most: float = math.inf


@dataclass(frozen=True)
class Part:
    """Items that share a part of the time.

    Attributes:
        share: of the time, against the shares of the other parts; what one leaves over goes to those after it.
    """

    name: str
    share: float
    items: Sequence[Item]


def skip(reason: str) -> Record:
    """The outcome of an item that was not measured."""
    return {"status": SKIPPED, "reason": reason}


def run_parts(setup: Setup, parts: Sequence[Part], seconds: float, say: Callable[[str], None]) -> None:
    """Measure what has no line yet, part by part, and give each outcome a line at once."""
    end = time.monotonic() + seconds
    for index, part in enumerate(parts):
        now = time.monotonic()
        deadline = now + (end - now) * part.share / sum(p.share for p in parts[index:])
        say(f"{part.name}: up to {max(deadline - now, 0) / 60:.1f} min")
        for item in sorted(part.items, key=lambda item: "stopped" in setup.lines.get(item.key, {})):  # those come last
            if setup.lines.get(item.key, {}).get("status", SKIPPED) != SKIPPED:
                continue
            began = time.monotonic()
            outcome = _run(item, deadline - began)
            line = setup.add(item.key, {"part": part.name, "seconds": round(time.monotonic() - began, 3), **outcome})
            say(f"  {item.key}: {line['status']}" + (f": {line['reason']}" if line["status"] != "ok" else ""))
        setup.worker.end()  # its context takes memory of the device


def _run(item: Item, left: float) -> Record:
    try:
        needed = item.estimate()
        if left <= 0:
            return skip("no time of this part is left")
        if needed >= left:
            return skip(f"about {needed:.0f} s, and {left:.0f} s of this part are left")
        hangs_after = item.most + 3 * needed
        outcome = item.run(min(left, hangs_after))
    except Exception as error:  # whatever one item meets, the others are measured
        return failure(error)
    if left < hangs_after and str(outcome.get("reason", "")).startswith(STOPPED):
        return {**outcome, **skip(f"{outcome['reason']}, with which the time of this part ended"), "stopped": True}
    return outcome
