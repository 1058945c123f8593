"""What checks find, and who has found it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchtitan.tools.utils import device_type

SLOW = 3.0  # times what is usual, from which on a rank, or a pair, is called slow
SLACK = {"cpu": 0.02, "cuda": 2e-4}  # seconds, beside that: what a scheduler may take from whoever is timed


@dataclass(frozen=True)
class Hosts:
    """The hosts of all ranks, by name."""

    names: Sequence[str]

    def of(self, ranks: Iterable[int]) -> str:
        """Ranks with their hosts, e.g. ``"rank 2 (n1)"`` or ``"ranks 0, 1 (n1) and 4 (n2)"``."""
        found = sorted(set(ranks))
        by_host: defaultdict[str, list[str]] = defaultdict(list)
        for rank in found:
            by_host[self.names[rank]].append(str(rank))
        parts = [f"{', '.join(numbers)} ({host})" for host, numbers in by_host.items()]
        listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
        return f"rank{'s' if len(found) > 1 else ''} {listed}"

    def together(self, ranks: Iterable[int]) -> bool:
        """Whether ``ranks`` share a host."""
        return len({self.names[rank] for rank in ranks}) <= 1


@dataclass(frozen=True)
class Verdict:
    """What all ranks' findings of one check come to.

    Attributes:
        measured: one line with figures.
        failures: one sentence for each, with the ranks and hosts that it concerns.
    """

    measured: str
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """A :class:`Verdict` with the check's name and the seconds it took."""

    name: str
    measured: str
    failures: list[str]
    seconds: float


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        measure: runs on all ranks at once; returns a rank's findings, and reports nothing itself.
        judge: the findings of all ranks, by rank, to a verdict; runs on rank 0, without any device.
        together: whether it needs the job's collectives: left out once those have failed.
    """

    name: str
    measure: Callable[[Any], Any]
    judge: Callable[[list[Any], Hosts], Verdict]
    together: bool = True


def spell_seconds(seconds: float) -> str:
    """E.g. ``"0.21 s"`` or ``"19,900 s"``."""
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def usual(seconds: Iterable[float]) -> float:
    """A time that a quarter of ``seconds`` are below: of all pairs of four ranks, one slow rank makes half slow."""
    found = sorted(seconds)
    return found[len(found) // 4]


def slow_ones(seconds: Mapping[Any, float], fewest: int = 3) -> list[Any]:
    """Those that take :data:`SLOW` times what is usual; none where fewer than ``fewest`` are there to compare."""
    if len(seconds) < fewest:
        return []
    limit = SLOW * usual(seconds.values()) + SLACK[device_type]
    return [key for key, value in seconds.items() if value > limit]
