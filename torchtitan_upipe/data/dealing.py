"""Which data-parallel rank reads which document, also after the number of ranks has changed. Pure Python."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Taken:
    """Documents of one pass that were read by an earlier set of ranks: all before ``start``, and ``others``, sorted."""

    start: int = 0
    others: tuple[int, ...] = ()

    def owner(self, index: int, ranks: int) -> int | None:
        """The rank that reads document ``index``: those not taken go round in turn. None if it is taken."""
        before = bisect_left(self.others, index)
        if index < self.start or (before < len(self.others) and self.others[before] == index):
            return None
        return (index - self.start - before) % ranks


@dataclass(frozen=True)
class Position:
    """Where one of ``ranks`` ranks stands in an endless repetition of the same documents.

    Attributes:
        ranks: among which documents are dealt.
        number: of the pass, from 0.
        next: index of the next document of the pass to look at.
        length: documents of a pass; 0 until one has ended.
        taken: by pass, what an earlier set of ranks has read; a pass that is not in it begins at its first document.
    """

    ranks: int
    number: int = 0
    next: int = 0
    length: int = 0
    taken: Mapping[int, Taken] = field(default_factory=dict)

    @property
    def taken_now(self) -> Taken:
        """What was taken of this pass."""
        return self.taken.get(self.number, Taken())


def deal_again(positions: Sequence[Position], ranks: int) -> Position:
    """Where each of ``ranks`` ranks begins so that together they read what ``positions`` have left, each document once.

    Args:
        positions: of all ranks of an earlier set, in their order.
        ranks: of the new set.
    """
    first = min(p.number for p in positions)
    last = max(max(p.number, *p.taken) if p.taken else p.number for p in positions)
    length = max(p.length for p in positions)
    taken = {number: _taken_together(positions, number, length) for number in range(first, last + 1)}
    start = min(p.next for p in positions if p.number == first)
    return Position(ranks, first, start, length, taken)


def _taken_together(positions: Sequence[Position], number: int, length: int) -> Taken:
    """What an earlier set and ``positions`` have read of pass ``number``."""
    before = positions[0].taken.get(number, Taken())
    ends = [_end(p, number, length, before) for p in positions]
    start = max(before.start, min(ends))  # every rank has read its own up to here
    others = {i for i in before.others if i >= start}
    for index in range(start, max(ends)):
        rank = before.owner(index, len(positions))
        if rank is not None and index < ends[rank]:
            others.add(index)
    while start in others:
        others.remove(start)
        start += 1
    return Taken(start, tuple(sorted(others)))


def _end(position: Position, number: int, length: int, before: Taken) -> int:
    if position.number == number:
        return max(position.next, before.start)
    return length if position.number > number else before.start
