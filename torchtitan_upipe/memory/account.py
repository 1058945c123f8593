"""Bytes held and freed, by category, and their peak: what the ledger's formulas are written in. Allocates nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class Block:
    """Bytes that are held."""

    category: str
    size: int
    device: bool


class Account:
    """Bytes of one rank, in the order in which a step holds and frees them.

    Attributes:
        live: device bytes by category, now.
        peak: the most device bytes so far.
        at_peak: their categories.
        peak_moment: what ran then.
        moments: the most device bytes at each moment.
        host_peak: the most host bytes so far.
    """

    def __init__(self) -> None:
        self.live: Counter[str] = Counter()
        self.peak = self.host_peak = 0
        self.at_peak: dict[str, int] = {}
        self.peak_moment = ""
        self.moments: dict[str, int] = {}
        self._total = self._host_total = 0
        self._host: Counter[str] = Counter()
        self._host_at_peak: dict[str, int] = {}
        self._moment = "batch"
        self._category = "other"

    @property
    def host_at_peak(self) -> dict[str, int]:
        """The categories of the host's peak: now, or what was noted when it was left."""
        if self._host_total < self.host_peak:
            return self._host_at_peak
        return {category: size for category, size in self._host.items() if size}

    @contextmanager
    def during(self, moment: str, category: str) -> Iterator[None]:
        """Name what runs meanwhile, and what is held meanwhile without another category."""
        before = self._moment, self._category
        self._moment, self._category = moment, category
        try:
            yield
        finally:
            self._moment, self._category = before

    def hold(self, size: float, category: str = "", *, host: bool = False) -> Block:
        """Hold ``size`` bytes."""
        block = Block(category or self._category, int(size), not host)
        if host:
            self._host[block.category] += block.size
            self._host_total += block.size
            self.host_peak = max(self.host_peak, self._host_total)
            return block
        self.live[block.category] += block.size
        self._total += block.size
        if self._total > self.moments.get(self._moment, 0):
            self.pass_by(0, {})
        return block

    def pass_by(self, size: int, categories: Mapping[str, int]) -> None:
        """Note that ``size`` bytes more, by ``categories``, are held for a moment; either may be negative."""
        total = self._total + size
        if total > self.moments.get(self._moment, 0):
            self.moments[self._moment] = total
        if total > self.peak:
            self.peak, self.peak_moment = total, self._moment
            self.at_peak = {k: v for k in {**self.live, **categories} if (v := self.live[k] + categories.get(k, 0))}

    def free(self, *blocks: Block) -> None:
        """Free what is held."""
        for block in blocks:
            if block.device:
                self.live[block.category] -= block.size
                self._total -= block.size
            elif block.size:
                self._host_at_peak = self.host_at_peak
                self._host[block.category] -= block.size
                self._host_total -= block.size

    def recast(self, block: Block, size: int) -> Block:
        """A copy of ``size`` bytes in the place of ``block``, as in another dtype; ``block`` where that is its size."""
        if block.size == size:
            return block
        copy = self.hold(size)
        self.free(block)
        return copy

    def brief(self, *sizes: float, category: str = "") -> None:
        """Hold bytes side by side for a moment."""
        self.free(*[self.hold(size, category) for size in sizes])

    def retag(self, category: str, *blocks: Block) -> None:
        """Count those of ``blocks`` that are on the device under ``category`` from now on."""
        for block in blocks:
            if not block.device:
                continue
            self.live[block.category] -= block.size
            self.live[category] += block.size
            block.category = category
