"""From documents to sequences of tokens, with a state that a later run goes on from, on any number of ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from torchtitan_upipe.data.dealing import Position, Taken, deal_again
from torchtitan_upipe.tiled.loss import IGNORE_INDEX

Example = tuple[dict[str, Tensor], Tensor]


class DocumentStream(torch.utils.data.IterableDataset[Example]):
    """Sequences of tokens from this rank's documents; a subclass says how documents become sequences.

    Args:
        rows: a dataset of documents; all ranks have the same, and read every document or skip it.
        rank: data-parallel rank.
        ranks: number of them.
        endless: begin again at the end.
        source: names the data in a checkpoint, which is refused for others.
    """

    def __init__(
        self,
        rows: Dataset | IterableDataset,
        *,
        rank: int = 0,
        ranks: int = 1,
        endless: bool = True,
        source: str = "",
    ) -> None:
        self.rows = rows
        self.rank = rank
        self.endless = endless
        self.source = source
        self._position = Position(ranks)
        self._waiting: list[Any] = []  # what was read and is not in a sequence yet: a part of the state
        self._rows_state: dict[str, Any] | None = None  # loaded, and no row read since
        self._first_row = copy.deepcopy(rows.state_dict()) if isinstance(rows, IterableDataset) else None

    def restart(self) -> None:
        """Begin at the first document again."""
        self._position, self._waiting, self._rows_state = Position(self._position.ranks), [], None
        if self._first_row is not None:
            self.rows.load_state_dict(self._first_row)  # in the place of one that was loaded for this epoch

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """``{"input": [S]}``, with what else the model needs to know, and labels ``[S]``, int64.

        Raises:
            ValueError: a pass over the data has no document for this rank, or none that can be used.
        """
        yield from self._sequences()
        while True:
            whole = self._position.next == 0 and self._position.number not in self._position.taken
            read = used = False
            for row in self._documents():
                read = True
                used |= self._add(row)
                yield from self._sequences()
            at = self._position
            if whole and not read:
                raise ValueError(
                    f"{self.source}: its {at.next} documents leave data-parallel rank {self.rank} of {at.ranks} "
                    "without one; use more documents or fewer data-parallel ranks."
                )
            self._end_pass(whole and not used)
            if not self.endless:
                yield from self._rest()
                self.restart()
                return
            self._position = replace(at, number=at.number + 1, next=0, length=at.next)

    def _add(self, row: Any) -> bool:
        """Let a document wait to be in a sequence; return whether it is used."""
        raise NotImplementedError

    def _sequences(self) -> Iterator[Example]:
        """The sequences that what waits makes; it waits no longer."""
        raise NotImplementedError

    def _rest(self) -> Iterator[Example]:
        """What is left at the end of data that is read once; nothing of what does not fill a sequence."""
        return iter(())

    def _end_pass(self, unused: bool) -> None:
        """A pass has ended; ``unused``: it was a whole one, and no document of it was used."""

    def state_dict(self) -> dict[str, Any]:
        """Where this rank stands; see :meth:`load_state_dict`."""
        rows = self._rows_state  # which `datasets` does not tell before the first row
        if rows is None and isinstance(self.rows, IterableDataset):
            rows = self.rows.state_dict()
        return {
            "source": self.source,
            "position": asdict(self._position),
            "waiting": copy.deepcopy(self._waiting),
            "rows": copy.deepcopy(rows),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a stream of the same data, rank and number of ranks stood."""
        self.load_states([state])

    def load_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on where all ranks of an earlier run stood, which may have been more or fewer than now.

        Args:
            states: of all its ranks, in their order; or this rank's alone if their number is the same.

        Raises:
            ValueError: the states are of other data.
        """
        for state in states:
            self._check(state)
        positions = [_position(state) for state in states]
        ranks = self._position.ranks
        if len(states) == 1 and positions[0].ranks == ranks:
            self._position, behind = positions[0], states[0]
            self._waiting = copy.deepcopy(states[0]["waiting"])
        else:
            self._position = deal_again(positions, ranks)
            behind = min(states, key=lambda s: (s["position"]["number"], s["position"]["next"]))
            mine = states[self.rank :: ranks]  # what was read and not yet trained on goes round, too
            self._waiting = [item for state in mine for item in copy.deepcopy(state["waiting"])]
        if isinstance(self.rows, IterableDataset):
            self.rows.set_epoch(self._position.number)  # a state is honoured only in its own epoch
            self.rows.load_state_dict(behind["rows"])
            self._rows_state = behind["rows"]

    def _check(self, state: dict[str, Any]) -> None:
        if not {"position", "waiting"} <= state.keys():
            raise ValueError("the checkpoint's data state was written by another data loader.")
        if state["source"] != self.source:
            raise ValueError(f"the checkpoint was trained on {state['source']}, and this job reads {self.source}.")

    def _documents(self) -> Iterator[Any]:
        """Rows of this rank from where it stands to the end of the pass; the position moves before each."""
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
            if self._position.taken_now.owner(index, self._position.ranks) == self.rank:
                yield row


class TokenStream(DocumentStream):
    """Sequences of ``seq_len`` tokens from documents of text, one joined to the next as TorchTitan joins them.

    Args:
        rows: see :class:`DocumentStream`.
        text_of: from a row to its text.
        encode: from a text to its tokens, begin and end of the document included.
        seq_len: ``S``.
        document_end: the token that ends a document, whose label, the first token of the next one, is ignored; None
            keeps these labels, as TorchTitan does.
        others: see :class:`DocumentStream`.
    """

    def __init__(
        self,
        rows: Dataset | IterableDataset,
        text_of: Callable[[Any], str],
        encode: Callable[[str], list[int]],
        seq_len: int,
        *,
        document_end: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__(rows, **others)
        self.text_of = text_of
        self.encode = encode
        self.seq_len = seq_len
        self.document_end = document_end

    def _add(self, row: Any) -> bool:
        self._waiting += self.encode(self.text_of(row))
        return True

    def _sequences(self) -> Iterator[Example]:
        length = self.seq_len + 1
        while len(self._waiting) >= length:
            tokens = torch.tensor(self._waiting[:length], dtype=torch.int64)
            self._waiting = self._waiting[length:]
            inputs, labels = tokens[:-1], tokens[1:]
            if self.document_end is not None:
                labels = labels.masked_fill(inputs == self.document_end, IGNORE_INDEX)
            yield {"input": inputs}, labels


def _position(state: dict[str, Any]) -> Position:
    values = state["position"]
    taken = {number: Taken(t["start"], tuple(t["others"])) for number, t in values["taken"].items()}
    return Position(**{**values, "taken": taken})
