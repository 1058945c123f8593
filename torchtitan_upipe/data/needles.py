"""Prompts that hide a fact, a needle, in a long text and ask for it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchtitan_upipe.data.scored import Scored, one_document

CITIES = """
Amsterdam Athens Bangkok Berlin Bogota Boston Brussels Cairo Chicago Copenhagen Dakar Delhi Dublin Geneva Hanoi
Helsinki Istanbul Jakarta Karachi Lagos Lima Lisbon London Madrid Manila Melbourne Mexico Milan Montreal Moscow
Nairobi Osaka Oslo Ottawa Paris Prague Rome Santiago Seoul Stockholm Sydney Tokyo Vienna Warsaw
"""
NAMES = tuple(CITIES.split())
NUMBERS = range(100_000, 1_000_000)
SENTENCE_ENDS = (".", "!", "?", "\n")
LOOK_BACK = 20  # the part of the text in which a sentence's end is looked for before the depth asked for


@dataclass(frozen=True)
class Cell:
    """Prompts of one kind: ``length`` tokens, the needle at ``depth`` of the text, ``keys`` needles in all."""

    length: int
    depth: float
    keys: int


class Needles:
    """Makes prompts: text, with needles in it, and a question; of the same arguments the same ones.

    A prompt's inputs are ``length`` tokens, and the tokens scored are the answer's.

    Args:
        encode: from text to tokens, nothing added.
        haystack: token ids ``[n]``, as many as the longest prompt.
        sentence_end: ``[n]`` bool: which of them end a sentence.
        begin: tokens before all text.
        needle, question: templates; see :class:`~torchtitan_upipe.job_config.Evaluation`.
        names: keys, all different.
        values: all different.
        seed: of keys, values and which part of the text.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        haystack: Tensor,
        sentence_end: Tensor,
        begin: Sequence[int],
        *,
        needle: str,
        question: str,
        names: Sequence[str] = NAMES,
        values: Sequence[object] = NUMBERS,
        seed: int = 0,
    ) -> None:
        self._encode = encode
        self._haystack, self._sentence_end = haystack, sentence_end
        self._begin = list(begin)
        self._needle, self._question = needle, question
        self._names, self._values = names, values
        self._seed = seed

    def prompt(self, cell: Cell, trial: int) -> Scored:
        """One prompt.

        Raises:
            ValueError: needles, question and answer leave no room for text, or the answer has no token.
        """
        draw = random.Random(f"{self._seed} {cell.length} {cell.depth} {cell.keys} {trial}")
        keys = draw.sample(self._names, cell.keys)
        values = [str(value) for value in draw.sample(self._values, cell.keys)]
        needles = [self._encode(_fill(self._needle, *pair)) for pair in zip(keys, values, strict=True)]
        question, answer = self._ask(keys[0], values[0])
        others = len(self._begin) + sum(map(len, needles)) + len(question) + len(answer)
        room = cell.length + 1 - others
        if room < 1:
            raise ValueError(
                f"evaluation.needle_lengths = {cell.length} leaves no room for text beside {cell.keys} needles, "
                f"question and answer, which have {others} tokens; set it to {others} or more."
            )
        first = draw.randrange(len(self._haystack))
        at = (first + torch.arange(room)) % len(self._haystack)  # the text begins again where it ends
        depths = [cell.depth, *(draw.random() for _ in needles[1:])]
        places = [self._place(depth, self._sentence_end[at]) for depth in depths]
        text, parts, begun = self._haystack[at], [_tokens(self._begin)], 0
        for place, needle in sorted(zip(places, needles, strict=True), key=lambda pair: pair[0]):
            parts += [text[begun:place], _tokens(needle)]
            begun = place
        return one_document(torch.cat([*parts, text[begun:], _tokens(question + answer)]), len(answer))

    def _ask(self, key: str, value: str) -> tuple[list[int], list[int]]:
        """Tokens of the question, and of the answer: what both together have after the question's own beginning."""
        asked = _fill(self._question, key)
        question, whole = self._encode(asked), self._encode(asked + value)
        same = 0
        while same < min(len(question), len(whole)) and question[same] == whole[same]:
            same += 1
        if same == len(whole):
            raise ValueError(f"evaluation.needle_values: {value!r} has no token of its own; remove it.")
        return whole[:same], whole[same:]

    @staticmethod
    def _place(depth: float, sentence_end: Tensor) -> int:
        """Tokens of the text before the needle: up to the last sentence's end a little before ``depth``, if any is."""
        room = len(sentence_end)
        place = round(depth * room)
        if place in (0, room):
            return place
        least = max(place - room // LOOK_BACK, 0)
        ends = sentence_end[least:place].nonzero()
        return least + int(ends[-1]) + 1 if len(ends) else place


def _tokens(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _fill(template: str, key: str, value: str = "") -> str:
    """``template`` with its fields; other braces stay as they are."""
    return template.replace("{key}", key).replace("{value}", value)


def sentence_ends(tokens: Tensor, decode: Callable[[list[int]], str]) -> Tensor:
    """``[n]`` bool: which of ``tokens [n]`` end a sentence or a line."""
    kinds, kind = tokens.unique(return_inverse=True)
    ends = [decode([token]).rstrip(" ").endswith(SENTENCE_ENDS) for token in kinds.tolist()]
    return torch.tensor(ends, dtype=torch.bool)[kind]
