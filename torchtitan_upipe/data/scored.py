"""Sequences of which some tokens are scored: what the model thinks of the next token there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchtitan_upipe.data.documents import documents_at, positions_in_documents
from torchtitan_upipe.tiled.loss import IGNORE_INDEX


@dataclass(frozen=True)
class Scored:
    """One sequence.

    Attributes:
        inputs: token ids ``[S]`` int64.
        labels: ``[S]`` int64, of the tokens that are scored; -100 elsewhere.
        starts: ``[S]`` bool, where documents begin.
    """

    inputs: Tensor
    labels: Tensor
    starts: Tensor

    @property
    def scored(self) -> Tensor:
        """``[S]`` bool: which labels count."""
        return self.labels != IGNORE_INDEX

    def unscored(self) -> Scored:
        """The same sequence for a rank that must compute something, and of which nothing counts."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE_INDEX))

    def positions(self) -> Tensor:
        """``[S]`` int64: of each token within its document."""
        return positions_in_documents(documents_at(self.starts[None]), len(self.inputs))[0]

    def last(self, context: int, rows: int) -> Scored:
        """The last ``context`` tokens alone, of which those of the last ``rows`` rows are scored."""
        starts = self.starts[-context:].clone()
        starts[0] = True
        labels = self.labels[-context:].clone()
        labels[:-rows] = IGNORE_INDEX
        return Scored(self.inputs[-context:], labels, starts)


def one_document(tokens: Tensor, scored: int) -> Scored:
    """``tokens [S + 1]`` as one document, of which the last ``scored`` tokens are scored."""
    labels = tokens[1:].clone()
    labels[:-scored] = IGNORE_INDEX
    return Scored(tokens[:-1], labels, torch.arange(len(labels)) == 0)


def longest_first(documents: Sequence[Tensor], length: int, count: int) -> list[Scored]:
    """Sequences of ``length`` tokens that begin with the longest documents, all tokens within documents scored.

    A longer document is cut into as many as fill sequences; where the end of a sequence cuts one, its rest is left out,
    so that every token stands where its document's beginning is known.

    Args:
        documents: token ids.
        count: sequences to make; fewer are made where the documents do not fill them.
    """
    pieces = [piece for document in documents for piece in document.split(length + 1)]
    pieces.sort(key=len, reverse=True)  # stable: the same order everywhere
    made: list[Scored] = []
    parts: list[Tensor] = []
    for piece in pieces:
        if len(made) == count:
            break
        parts.append(piece[: length + 1 - sum(map(len, parts))])
        if sum(map(len, parts)) == length + 1:
            made.append(_joined(parts))
            parts = []
    return made


def _joined(parts: Sequence[Tensor]) -> Scored:
    tokens = torch.cat(list(parts)).long()
    starts = torch.zeros(len(tokens), dtype=torch.bool)
    starts[torch.tensor([0, *(len(part) for part in parts[:-1])]).cumsum(0)] = True
    labels = tokens[1:].masked_fill(starts[1:], IGNORE_INDEX)  # a document does not predict the next one
    return Scored(tokens[:-1], labels, starts[:-1])


def by_position(positions: Tensor, losses: Tensor) -> list[tuple[int, int, int, float]]:
    """``(from, to, tokens, mean loss)`` of the tokens at positions ``from`` to ``to - 1``.

    Bounds are 0 and powers of two; stretches without a token are left out.

    Args:
        positions: ``[n]`` int64.
        losses: ``[n]``.
    """
    rows = []
    low, high = 0, 1
    while low <= int(positions.max()):
        here = losses[(positions >= low) & (positions < high)]
        if len(here):
            rows.append((low, high, len(here), float(here.double().mean())))
        low, high = high, 2 * high
    return rows
