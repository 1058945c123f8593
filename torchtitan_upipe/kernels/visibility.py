"""Which keys each query sees, as few rectangles. Pure Python: no torch, no device, no group.

One rule covers causal and block-causal masks, whole sequences, query segments, query tiles and the steps of a ring: a
query sees the keys of its own document that do not come after it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

Interval = tuple[int, int]  # (start, stop)
T = TypeVar("T")
R = TypeVar("R")


class Known(tuple[T, ...]):
    """A tuple that remembers, as long as it lives, what has been worked out about it.

    Of thousands of documents the same is asked in every layer and stage of a step.
    """

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._found: dict[Hashable, Any] = {}

    @classmethod
    def of(cls, items: Iterable[T]) -> Known[T]:
        """``items`` themselves, where they are known already."""
        return items if isinstance(items, Known) else cls(items)

    def work_out(self, what: Hashable, make: Callable[[], R]) -> R:
        """The answer to ``what``; ``make`` is called where it was not asked before."""
        if what not in self._found:
            self._found[what] = make()
        found: R = self._found[what]
        return found


@dataclass(frozen=True)
class Tokens:
    """Tokens stored side by side in rising order: disjoint, rising intervals of positions in the sequence."""

    intervals: tuple[Interval, ...]

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self.intervals)

    def before(self, position: int) -> int:
        """Number of stored tokens before ``position``: the row where a token there would stand."""
        return sum(min(stop, position) - start for start, stop in self.intervals if start < position)

    def rows(self, wanted: Sequence[Interval]) -> Tokens:
        """The tokens stored in the rows ``wanted`` (disjoint, rising)."""
        found, first_row = [], 0
        for start, stop in self.intervals:
            for low, high in wanted:
                a, b = max(low - first_row, 0), min(high - first_row, stop - start)
                if a < b:
                    found.append((start + a, start + b))
            first_row += stop - start
        return Tokens(tuple(found))


@dataclass(frozen=True)
class Documents:
    """Documents packed into each sequence of a batch.

    ``starts[b]`` are the positions at which the documents of sequence ``b`` begin, rising from 0; each ends where the
    next one begins, the last with the sequence.
    """

    starts: tuple[tuple[int, ...], ...]
    _seen: Known[int] = field(default_factory=Known, compare=False, repr=False)

    def visible(self, sequence: int, queries: Tokens, keys: Tokens) -> Known[Piece]:
        """:func:`visible_pieces` in this sequence of the batch, found once and kept."""
        return self._seen.work_out(
            (sequence, queries, keys), lambda: visible_pieces(queries, keys, self.starts[sequence])
        )

    def first_seen(self, position: int) -> int:
        """The first position that a query at ``position`` sees in any sequence of the batch."""
        return min(starts[bisect_right(starts, position) - 1] for starts in self.starts)


@dataclass(frozen=True)
class Piece:
    """Query rows that see the same key rows, and what of them is causal.

    Attributes:
        rows: rows of the queries.
        keys: rows of the keys that the last of these queries sees.
        causal: the last ``len(rows)`` keys stand at the queries' own positions, and each query sees them up to itself;
            the keys before, and all keys where this is False, are seen by every query.
    """

    rows: Interval
    keys: Interval
    causal: bool

    def follows(self, other: Piece) -> bool:
        """Whether this piece and ``other``, which stands directly before it, are one."""
        if self.causal != other.causal or self.rows[0] != other.rows[1] or self.keys[0] != other.keys[0]:
            return False
        return self.keys[1] - other.keys[1] == (self.rows[1] - self.rows[0] if self.causal else 0)


def visible_pieces(queries: Tokens, keys: Tokens, starts: Sequence[int] = (0,)) -> Known[Piece]:
    """What ``queries`` see of ``keys``; every query row stands in at most one piece.

    Args:
        queries: positions of the query rows.
        keys: positions of the key rows.
        starts: where documents begin, rising from 0.
    """
    cuts = sorted({*starts, *(edge for interval in keys.intervals for edge in interval)})
    pieces: list[Piece] = []
    row = 0
    for start, stop in queries.intervals:
        inner = cuts[bisect_right(cuts, start) : bisect_left(cuts, stop)]
        for a, b in zip([start, *inner], [*inner, stop], strict=True):
            document = starts[bisect_right(starts, a) - 1]
            first, last = keys.before(document), keys.before(b)
            piece = Piece((row, row + b - a), (first, last), causal=last > keys.before(a))
            row += b - a
            if last == first:
                continue
            if pieces and piece.follows(pieces[-1]):
                earlier = pieces.pop()
                piece = Piece((earlier.rows[0], piece.rows[1]), piece.keys, piece.causal)
            pieces.append(piece)
    return Known(pieces)


def cut_rows(piece: Piece, max_rows: int | None) -> list[Piece]:
    """The same piece in tiles of at most so many query rows."""
    start, stop = piece.rows
    if max_rows is None or stop - start <= max_rows:
        return [piece]
    tiles = []
    for a in range(start, stop, max_rows):
        b = min(a + max_rows, stop)
        last = piece.keys[1] - (stop - b if piece.causal else 0)
        tiles.append(Piece((a, b), (piece.keys[0], last), piece.causal))
    return tiles
