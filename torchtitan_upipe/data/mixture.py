"""Several datasets read as one, each with its share of the tokens."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torchtitan_upipe.data.reader import Reader


@dataclass(frozen=True)
class Source:
    """A table ``[[source]]`` of a mixture's file.

    Attributes:
        dataset: name, as in ``training.dataset``.
        dataset_path: as in ``training.dataset_path``.
        weight: share of the mixture's tokens, relative to the other sources' weights.
        min_tokens: documents with fewer are passed over.
        max_tokens: documents with more are passed over; 0 = no limit. One dataset may be two sources, its long
            documents with a greater weight than their number.
    """

    dataset: str
    dataset_path: str = ""
    weight: float = 1.0
    min_tokens: int = 0
    max_tokens: int = 0


def read_mixture(path: str) -> list[Source]:
    """The sources of a TOML file.

    Raises:
        ValueError: the file, the table and the field that is wrong.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # of which broken TOML and text are kinds
        raise ValueError(f"the mixture {path!r} cannot be read ({error}).") from error
    tables = values.pop("source", None)
    if values or not isinstance(tables, list) or not tables:
        raise ValueError(f"the mixture {path!r} must consist of tables [[source]], and of nothing else.")
    return [_source(table, f"the mixture {path!r}, source {number}") for number, table in enumerate(tables, 1)]


def _source(table: dict[str, Any], place: str) -> Source:
    kinds: dict[str, Any] = {"dataset": str, "dataset_path": str, "weight": int | float}
    kinds |= {"min_tokens": int, "max_tokens": int}
    for name, value in table.items():
        if name not in kinds:
            raise ValueError(f"{place}: unknown field {name}; known are {', '.join(f.name for f in fields(Source))}.")
        if isinstance(value, bool) or not isinstance(value, kinds[name]):
            raise ValueError(f"{place}: {name} = {value!r} is of the wrong type.")
    if "dataset" not in table:
        raise ValueError(f"{place}: it names no dataset.")
    source = Source(**table)
    if not 0 < source.weight < math.inf:
        raise ValueError(f"{place}: weight = {source.weight:g} must be a finite positive number.")
    if source.min_tokens < 0 or source.max_tokens < 0 or 0 < source.max_tokens < source.min_tokens:
        raise ValueError(
            f"{place}: min_tokens = {source.min_tokens} and max_tokens = {source.max_tokens} must not be negative, and "
            "the first not above the second."
        )
    return source


class Part:
    """One source of a :class:`Mixture`: documents as tokens, again and again.

    Args:
        reader: its rows.
        encode: from a row to its tokens.
        source: weight and limits.
    """

    def __init__(self, reader: Reader, encode: Callable[[Any], list[int]], source: Source) -> None:
        self.reader = reader
        self.encode = encode
        self.weight = source.weight
        self.least, self.most = source.min_tokens, source.max_tokens or math.inf

    def documents(self) -> Iterator[list[int]]:
        """Tokens of each document that is neither too short nor too long, for ever.

        Raises:
            ValueError: a whole pass has none.
        """
        while True:
            empty = self.reader.at_start
            for row in self.reader.read_pass():
                tokens = self.encode(row)
                if self.least <= len(tokens) <= self.most:
                    empty = False
                    yield tokens
            if empty:
                raise ValueError(
                    f"{self.reader.source}: no document of data-parallel rank {self.reader.rank} has at least "
                    f"{self.least} and at most {self.most} tokens; change min_tokens or max_tokens of the mixture."
                )
            self.reader.next_pass()


class Mixture:
    """Reads documents of several sources in the place of a :class:`Reader`, without an end.

    The next document is of the source that lags most behind its share of the tokens read so far: no chance is in it,
    and shares are off by less than a document. Each rank mixes on its own.
    """

    at_start = False  # it has no passes

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.rank, self.ranks = parts[0].reader.rank, parts[0].reader.ranks
        self.source = "a mixture of " + " and ".join(part.reader.source for part in parts)
        self._drawn = [0.0] * len(parts)  # tokens

    def restart(self) -> None:
        """Begin at the first documents again."""
        self._drawn = [0.0] * len(self.parts)
        for part in self.parts:
            part.reader.restart()

    def read_pass(self) -> Iterator[list[int]]:
        """Tokens of one document after another."""
        documents = [part.documents() for part in self.parts]
        while True:
            index = max(range(len(self.parts)), key=self._lag)
            tokens = next(documents[index])
            self._drawn[index] += len(tokens)
            yield tokens

    def _lag(self, index: int) -> float:
        share = self.parts[index].weight / sum(part.weight for part in self.parts)
        return share * sum(self._drawn) - self._drawn[index]

    def next_pass(self) -> None:
        """Not called: a pass does not end."""
        raise AssertionError("a mixture has no end")

    def state_dict(self) -> dict[str, Any]:
        """Where this rank stands in every source."""
        parts = [part.reader.state_dict() for part in self.parts]
        return {"source": self.source, "parts": parts, "drawn": list(self._drawn)}

    def load_states(self, states: Sequence[dict[str, Any]]) -> bool:
        """Go on where all ranks of an earlier run stood; see :meth:`Reader.load_states`. Weights may have changed."""
        for state in states:
            if state["source"] != self.source:
                raise ValueError(f"the checkpoint was trained on {state['source']}, and this job reads {self.source}.")
        same = [p.reader.load_states([state["parts"][i] for state in states]) for i, p in enumerate(self.parts)]
        drawn = zip(*(state["drawn"] for state in states), strict=True)
        self._drawn = [sum(tokens) / (1 if all(same) else self.ranks) for tokens in drawn]
        return all(same)
