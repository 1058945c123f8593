"""Documents packed into sequences whole, each into the first of a few open ones that has room."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from torchtitan_upipe.data.mixture import Mixture
from torchtitan_upipe.data.reader import Reader
from torchtitan_upipe.data.stream import DocumentStream, Example
from torchtitan_upipe.tiled.loss import IGNORE_INDEX

OPEN = 4  # sequences that wait for documents that fit
Packed = tuple[list[int], list[int]]  # tokens of a document, or of a piece of one, and their labels


class PackedStream(DocumentStream):
    """Sequences of ``seq_len`` tokens, padded, of documents that a subclass hands to :meth:`_place`.

    The last token of a document predicts nothing, and is left out.

    Args:
        reader: the documents.
        seq_len: ``S``.
        open_sequences: that wait for more; 0 = each document has its own.
        marks: whether an example says where documents begin: ``"starts" [S]`` bool, padding being one more.
        padding: a token.
        endless: begin again at the end.
    """

    def __init__(
        self,
        reader: Reader | Mixture,
        seq_len: int,
        *,
        open_sequences: int = OPEN,
        marks: bool,
        padding: int = 0,
        endless: bool = True,
    ) -> None:
        super().__init__(reader, endless=endless)
        self.seq_len = seq_len
        self.open_sequences = open_sequences
        self.marks = marks
        self.padding = padding

    def _place(self, document: Packed) -> None:
        """``self._waiting`` are open sequences, each a list of documents."""
        for others in self._waiting if self.open_sequences else ():
            if _length(others) + len(document[0]) <= self.seq_len:
                others.append(document)
                return
        self._waiting.append([document])

    def _sequences(self) -> Iterator[Example]:
        while len(self._waiting) > self.open_sequences:
            fullest = max(self._waiting, key=_length)  # the oldest of them
            self._waiting.remove(fullest)
            yield self._example(fullest)

    def _rest(self) -> Iterator[Example]:
        while self._waiting:
            yield self._example(self._waiting.pop(0))

    def _example(self, documents: Sequence[Packed]) -> Example:
        inputs = torch.full((self.seq_len,), self.padding)
        labels = torch.full((self.seq_len,), IGNORE_INDEX)
        starts = torch.zeros(self.seq_len, dtype=torch.bool)
        at = 0
        for tokens, targets in documents:
            inputs[at : at + len(tokens)] = torch.tensor(tokens)
            labels[at : at + len(tokens)] = torch.tensor(targets)
            starts[at] = True
            at += len(tokens)
        starts[at : at + 1] = True  # padding
        return {"input": inputs} | ({"starts": starts} if self.marks else {}), labels


class PackedTexts(PackedStream):
    """Documents of text. What is longer than a sequence is cut into pieces, each of which predicts the next's first.

    Args:
        reader: the documents.
        encode: from a document to its tokens, begin and end included.
        seq_len: ``S``.
        others: see :class:`PackedStream`.
    """

    def __init__(
        self, reader: Reader | Mixture, encode: Callable[[Any], list[int]], seq_len: int, **others: Any
    ) -> None:
        super().__init__(reader, seq_len, **others)
        self.encode = encode

    def _add(self, row: Any) -> bool:
        tokens = self.encode(row)
        for at in range(0, len(tokens) - 1, self.seq_len):
            piece = tokens[at : at + self.seq_len + 1]
            self._place((piece[:-1], piece[1:]))
        return len(tokens) > 1


def _length(documents: Sequence[Packed]) -> int:
    return sum(len(tokens) for tokens, _ in documents)
