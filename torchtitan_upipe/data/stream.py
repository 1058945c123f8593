"""From documents to sequences of tokens, with a state that a later run goes on from, on any number of ranks."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchtitan_upipe.data.mixture import Mixture
from torchtitan_upipe.data.reader import Reader
from torchtitan_upipe.tiled.loss import IGNORE_INDEX

Example = tuple[dict[str, Tensor], Tensor]


class DocumentStream(torch.utils.data.IterableDataset[Example], ABC):
    """Sequences of tokens from this rank's documents; a subclass says how documents become sequences.

    Args:
        reader: the documents.
        endless: begin again at the end.
    """

    def __init__(self, reader: Reader | Mixture, *, endless: bool = True) -> None:
        self.reader = reader
        self.endless = endless
        self.source = reader.source
        self._waiting: list[Any] = []  # what was read and is not in a sequence yet: a part of the state

    def restart(self) -> None:
        """Begin at the first document again."""
        self._waiting = []
        self.reader.restart()

    def __iter__(self) -> Iterator[Example]:
        """``{"input": [S]}``, with what else the model needs to know, and labels ``[S]``, int64.

        Raises:
            ValueError: a pass over the data has no document for this rank, or none that can be used.
        """
        yield from self._sequences()
        while True:
            whole, used = self.reader.at_start, False
            for row in self.reader.read_pass():
                used |= self._add(row)
                yield from self._sequences()
            self._end_pass(whole and not used)
            if not self.endless:
                yield from self._rest()
                self.restart()
                return
            self.reader.next_pass()

    @abstractmethod
    def _add(self, row: Any) -> bool:
        """Let a document wait to be in a sequence; return whether it is used."""

    @abstractmethod
    def _sequences(self) -> Iterator[Example]:
        """The sequences that what waits makes; it waits no longer."""

    def _rest(self) -> Iterator[Example]:
        """What is left at the end of data that is read once; nothing of what does not fill a sequence."""
        return iter(())

    def _end_pass(self, unused: bool) -> None:
        """A pass has ended; ``unused``: it was a whole one, and no document of it was used."""

    def state_dict(self) -> dict[str, Any]:
        """Where this rank stands; see :meth:`load_state_dict`. Documents, which nothing changes, are not copied."""
        waiting = [list(item) if isinstance(item, list) else item for item in self._waiting]
        return self.reader.state_dict() | {"waiting": waiting}

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
        if not all("waiting" in state for state in states):
            raise ValueError("the checkpoint's data state was written by another data loader.")
        same = self.reader.load_states(states)
        # what was read and not yet trained on goes round, too
        mine = states if same else states[self.reader.rank :: self.reader.ranks]
        self._waiting = [item for state in mine for item in copy.deepcopy(state["waiting"])]


class TokenStream(DocumentStream):
    """Sequences of ``seq_len`` tokens from documents of text, one joined to the next as TorchTitan joins them.

    Args:
        reader: the documents.
        encode: from a document to its tokens, begin and end included.
        seq_len: ``S``.
        document_end: the token that ends a document, whose label, the first token of the next one, is ignored; None
            keeps these labels, as TorchTitan does.
        endless: begin again at the end.
    """

    def __init__(
        self,
        reader: Reader | Mixture,
        encode: Callable[[Any], list[int]],
        seq_len: int,
        *,
        document_end: int | None = None,
        endless: bool = True,
    ) -> None:
        super().__init__(reader, endless=endless)
        self.encode = encode
        self.seq_len = seq_len
        self.document_end = document_end

    def _add(self, row: Any) -> bool:
        self._waiting += self.encode(row)
        return True

    def _sequences(self) -> Iterator[Example]:
        length = self.seq_len + 1
        while len(self._waiting) >= length:
            tokens = torch.tensor(self._waiting[:length], dtype=torch.int64)
            self._waiting = self._waiting[length:]  # before the sequence leaves: a state may be asked for then
            inputs, labels = tokens[:-1], tokens[1:]
            if self.document_end is not None:
                labels = labels.masked_fill(inputs == self.document_end, IGNORE_INDEX)
            yield {"input": inputs}, labels
