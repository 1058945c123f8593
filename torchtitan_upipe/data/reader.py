"""This rank's rows of a dataset, pass after pass, with a state that any number of ranks goes on from."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset

from torchtitan_upipe.data.dealing import Position, Taken, deal_again


class Reader:
    """Rows of this rank.

    Args:
        rows: a dataset; all ranks have the same, and read every row or skip it.
        rank: data-parallel rank.
        ranks: number of them.
        source: names the data in a checkpoint, which is refused for others.
    """

    def __init__(self, rows: Dataset | IterableDataset, *, rank: int = 0, ranks: int = 1, source: str = "") -> None:
        self.rows = rows
        self.rank = rank
        self.source = source
        self._position = Position(ranks)
        self._rows_state: dict[str, Any] | None = None  # loaded, and no row read since
        self._first_row = copy.deepcopy(rows.state_dict()) if isinstance(rows, IterableDataset) else None

    @property
    def ranks(self) -> int:
        """Data-parallel ranks that share the rows."""
        return self._position.ranks

    @property
    def at_start(self) -> bool:
        """Whether the next row is the first of a pass of which no other set of ranks has read."""
        return self._position.next == 0 and self._position.number not in self._position.taken

    def restart(self) -> None:
        """Begin at the first row again."""
        self._position, self._rows_state = Position(self.ranks), None
        if self._first_row is not None:
            self.rows.load_state_dict(self._first_row)  # in the place of one that was loaded for this epoch

    def read_pass(self) -> Iterator[Any]:
        """Rows from where this rank stands to the end of the pass; the position moves before each.

        Raises:
            ValueError: a whole pass has no row for this rank.
        """
        empty = self.at_start
        rows: Any = self.rows
        if isinstance(self.rows, IterableDataset):
            self.rows.set_epoch(self._position.number)  # which also lets go of a state that was loaded
            rows = islice(rows, 0 if self._rows_state else self._position.next, None)
        else:
            rows = self.rows.skip(self._position.next)
        for row in rows:
            self._rows_state = None
            index = self._position.next
            self._position = replace(self._position, next=index + 1)
            if self._position.taken_now.owner(index, self.ranks) == self.rank:
                empty = False
                yield row
        if empty:
            raise ValueError(
                f"{self.source}: its {self._position.next} documents leave data-parallel rank {self.rank} of "
                f"{self.ranks} without one; use more documents or fewer data-parallel ranks."
            )

    def next_pass(self) -> None:
        """Go on to the first row, after the last."""
        at = self._position
        self._position = replace(at, number=at.number + 1, next=0, length=at.next)

    def state_dict(self) -> dict[str, Any]:
        """Where this rank stands; see :meth:`load_states`."""
        rows = self._rows_state  # which `datasets` does not tell before the first row
        if rows is None and isinstance(self.rows, IterableDataset):
            rows = self.rows.state_dict()
        return {"source": self.source, "position": asdict(self._position), "rows": copy.deepcopy(rows)}

    def load_states(self, states: Sequence[dict[str, Any]]) -> bool:
        """Go on where all ranks of an earlier run stood, which may have been more or fewer than now.

        Args:
            states: of all its ranks, in their order; or this rank's alone if their number is the same.

        Returns:
            Whether it was this rank's alone.

        Raises:
            ValueError: the states are of other data.
        """
        for state in states:
            if state["source"] != self.source:
                raise ValueError(f"the checkpoint was trained on {state['source']}, and this job reads {self.source}.")
        positions = [_position(state) for state in states]
        same = len(states) == 1 and positions[0].ranks == self.ranks
        behind = min(states, key=lambda s: (s["position"]["number"], s["position"]["next"]))
        self._position = positions[0] if same else deal_again(positions, self.ranks)
        if isinstance(self.rows, IterableDataset):
            self.rows.set_epoch(self._position.number)  # a state is honoured only in its own epoch
            self.rows.load_state_dict(behind["rows"])
            self._rows_state = behind["rows"]
        return same


def _position(state: dict[str, Any]) -> Position:
    values = state["position"]
    taken = {number: Taken(t["start"], tuple(t["others"])) for number, t in values["taken"].items()}
    return Position(**{**values, "taken": taken})
