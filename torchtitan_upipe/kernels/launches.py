"""Which rectangles of a list of pieces go to the kernel together. Pure Python: no torch, no device, no group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torchtitan_upipe.kernels.visibility import Interval, Known, Piece, cut_rows

Rectangle = tuple[Interval, Interval, bool]  # query rows, key rows, causal (then equally many)
Run = tuple[slice, slice]  # rows of a tensor, and where they stand in a launch
LONG = 8192  # rows of a call that keep a GPU busy
LARGEST = 2**31 - 1  # elements of a launch
MOST_STRETCHES = 65535 // 2  # of a launch, whose grid has 65,535 places in that direction; half for a batch of two


@dataclass(frozen=True)
class Launch:
    """Rectangles that one kernel call does, all of them causal or none. Neither their rows nor their keys overlap.

    Attributes:
        row_runs, key_runs: their rows and keys, those that stand side by side as one.
        row_lengths, key_lengths: rows and keys of each rectangle.
        alone: the runs of rows that no other launch has.
        shared: the others, rectangle by rectangle: their rows, where they stand in this launch, and whether no later
            launch has them.
    """

    causal: bool
    row_runs: tuple[Run, ...]
    key_runs: tuple[Run, ...]
    row_lengths: Known[int]
    key_lengths: Known[int]
    alone: tuple[Run, ...]
    shared: tuple[tuple[Interval, slice, bool], ...]

    @property
    def rows(self) -> int:
        """Query rows of all rectangles."""
        return sum(self.row_lengths)

    @property
    def keys(self) -> int:
        """Keys of all rectangles."""
        return sum(self.key_lengths)

    @property
    def is_one(self) -> bool:
        """Whether this is a single rectangle."""
        return len(self.row_lengths) == 1

    def covers(self, rows: int, keys: int) -> bool:
        """Whether these are all rows and all keys, in their order."""
        whole = [((slice(0, count), slice(0, count)),) for count in (rows, keys)]
        return [self.row_runs, self.key_runs] == whole


def plan_launches(
    pieces: Sequence[Piece], elements: int | None, max_keys: int | None = None, max_rows: int | None = None
) -> tuple[Launch, ...]:
    """The kernel calls that attention on ``pieces`` takes.

    Args:
        elements: see :func:`together`; None for a kernel that does one rectangle a call.
        max_keys: see :func:`rectangles`.
        max_rows: query rows of a call, at most.
    """

    def make() -> tuple[Launch, ...]:
        tiles = [tile for piece in pieces for tile in cut_rows(piece, max_rows)]
        calls = [call for tile in tiles for call in rectangles(tile, max_keys)]
        return tuple(_launches([[call] for call in calls] if elements is None else together(calls, elements)))

    return Known.of(pieces).work_out((elements, max_keys, max_rows), make)


def rectangles(piece: Piece, max_keys: int | None = None) -> list[Rectangle]:
    """What kernels can do: the causal square on the diagonal first, then the full rectangle of the keys before it.

    The rectangle may be cut into several of ``max_keys`` keys.
    """
    first, last = piece.keys
    diagonal = last - (piece.rows[1] - piece.rows[0]) if piece.causal else last
    square: list[Rectangle] = [(piece.rows, (diagonal, last), True)] if piece.causal else []
    step = max_keys or max(diagonal - first, 1)
    return square + [(piece.rows, (key, min(key + step, diagonal)), False) for key in range(first, diagonal, step)]


def together(calls: Sequence[Rectangle], elements: int) -> list[list[Rectangle]]:
    """What a variable-length kernel computes together: many short squares, or many short full rectangles.

    Neither rows nor keys of a batch overlap: keys that several calls see would be copied once for each, and their
    gradients, too. Calls of ``LONG`` rows or more stand alone, since packing them saves nothing.

    Args:
        elements: of one row of queries over the whole batch of sequences; the rows of a launch, and its keys with as
            many heads, have fewer than 2^31, which is as far as FlashAttention-2's backward counts (torch 2.11,
            flash-attn 2.8.3; mended in torch 2.13).
    """
    batches = [[call] for call in calls if _length(call[0]) >= LONG]
    most = max(LARGEST // elements, 1)
    for causal in (True, False):
        open_: list[_Batch] = []
        for call in sorted((c for c in calls if c[2] == causal and _length(c[0]) < LONG), key=lambda c: c[1]):
            home = next((batch for batch in open_ if batch.takes(call, most)), None)
            if home is None:
                open_.append(home := _Batch())
            home.add(call)
        batches += [batch.calls for batch in open_]
    return batches


class _Batch:
    """Calls that go to the kernel together, added in the order of their keys."""

    def __init__(self) -> None:
        self.calls: list[Rectangle] = []
        self._rows: set[Interval] = set()
        self._row_count = self._key_count = 0

    def takes(self, call: Rectangle, most: int) -> bool:
        """Whether ``call`` overlaps none of these, and ``most`` rows and keys are enough."""
        return (
            self.calls[-1][1][1] <= call[1][0]
            and call[0] not in self._rows
            and len(self.calls) < MOST_STRETCHES
            and self._row_count + _length(call[0]) <= most
            and self._key_count + _length(call[1]) <= most
        )

    def add(self, call: Rectangle) -> None:
        self.calls.append(call)
        self._rows.add(call[0])
        self._row_count += _length(call[0])
        self._key_count += _length(call[1])


def _launches(batches: Sequence[Sequence[Rectangle]]) -> Iterator[Launch]:
    left = Counter(rows for batch in batches for rows, _, _ in batch)  # launches that a stretch of rows still needs
    shared = {rows for rows, count in left.items() if count > 1}
    for batch in batches:
        rows, keys = [call[0] for call in batch], [call[1] for call in batch]
        places = _side_by_side(rows)
        left.subtract(rows)
        alone = [(interval, at) for interval, at in zip(rows, places, strict=True) if interval not in shared]
        yield Launch(
            causal=batch[0][2],
            row_runs=_runs(list(zip(rows, places, strict=True))),
            key_runs=_runs(list(zip(keys, _side_by_side(keys), strict=True))),
            row_lengths=Known(map(_length, rows)),
            key_lengths=Known(map(_length, keys)),
            alone=_runs(alone),
            shared=tuple(
                (interval, slice(*at), left[interval] == 0)
                for interval, at in zip(rows, places, strict=True)
                if interval in shared
            ),
        )


def _side_by_side(intervals: Sequence[Interval]) -> list[Interval]:
    ends = [0, *accumulate(map(_length, intervals))]
    return list(pairwise(ends))


def _runs(places: Sequence[tuple[Interval, Interval]]) -> tuple[Run, ...]:
    """Intervals of a tensor and their places in a launch, joined where both go on."""
    joined: list[tuple[Interval, Interval]] = []
    for there, here in places:
        if joined and joined[-1][0][1] == there[0] and joined[-1][1][1] == here[0]:
            before = joined.pop()
            there, here = (before[0][0], there[1]), (before[1][0], here[1])
        joined.append((there, here))
    return tuple((slice(*there), slice(*here)) for there, here in joined)


def _length(interval: Interval) -> int:
    return interval[1] - interval[0]
