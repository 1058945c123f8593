"""Prompts with needles, and the sequences and positions of losses."""

from __future__ import annotations

import pytest
import torch

from torchtitan_upipe.data.needles import Cell, Needles, sentence_ends
from torchtitan_upipe.data.scored import by_position, longest_first

DOT = ord(".")
TEXT = torch.tensor([ord(letter) for letter in "aaaa bbb. " * 40])  # a sentence every ten tokens


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def decode(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


def make(**changes: object) -> Needles:
    options = {"needle": "<{key}={value}>", "question": "#{key}? ", "seed": 3, **changes}
    return Needles(encode, TEXT, sentence_ends(TEXT, decode), [1], **options)  # type: ignore[arg-type]


def spelled(cell: Cell, trial: int = 0, **changes: object) -> tuple[str, str]:
    """Inputs, and the answer."""
    prompt = make(**changes).prompt(cell, trial)
    assert len(prompt.inputs) == len(prompt.labels) == cell.length
    assert prompt.starts.nonzero().flatten().tolist() == [0]
    assert not prompt.scored[: -int(prompt.scored.sum())].any()  # the answer is the end
    return decode(prompt.inputs.tolist()), decode(prompt.labels[prompt.scored].tolist())


@pytest.mark.parametrize("keys", [1, 3])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_prompt_asks_for_a_needle_in_it(depth: float, keys: int) -> None:
    inputs, answer = spelled(Cell(300, depth, keys))
    assert inputs[0] == "\x01"
    assert len(answer) == 6
    assert inputs.endswith("? " + answer[:-1])  # the last token of the answer is predicted, not read
    text, _, key = inputs[1:].rpartition("? ")[0].partition("#")
    needle = f"<{key}={answer}>"
    assert inputs.count(needle) == 1
    assert inputs.count("<") == keys
    assert len({part.split(">")[0] for part in inputs.split("<")[1:]}) == keys  # names and values are different
    whole, before = (
        "".join(part.rpartition(">")[2] for part in some.split("<")) for some in (text, text[: text.index(needle)])
    )
    assert depth - 0.05 <= len(before) / len(whole) <= depth
    assert depth in (0.0, 1.0) or before.endswith(".")


def test_prompts_are_repeated_and_differ_between_trials() -> None:
    cell = Cell(200, 0.5, 2)
    assert spelled(cell) == spelled(cell)
    assert len({spelled(cell, trial) for trial in range(4)} | {spelled(cell, seed=4)}) == 5


def test_question_and_answer_are_tokenized_together() -> None:
    """A tokenizer that joins a blank with what follows: the question alone ends with a token that is not in both."""

    def joins(text: str) -> list[int]:
        return [ord(c) for c in text.replace(" 7", "\x07")]

    needles = Needles(joins, TEXT, sentence_ends(TEXT, decode), [], needle="{key}{value}", question="?", values=["7"])
    assert needles._ask("x", "7") == ([ord("?")], [ord("7")])
    needles = Needles(joins, TEXT, sentence_ends(TEXT, decode), [], needle="{key}{value}", question="? ", values=["7"])
    assert needles._ask("x", "7") == ([ord("?")], [7])


def test_a_prompt_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needle_lengths = 20 leaves no room .* 2 needles.* which have \d+ tokens"):
        make().prompt(Cell(20, 0.5, 2), 0)


def test_losses_are_of_the_longest_documents() -> None:
    documents = [torch.full((n,), n) for n in (3, 12, 5, 30)]
    third, first, second, fourth, *others = longest_first(documents, 10, 9)
    assert others == []  # what is left fills no sequence
    assert fourth.inputs.tolist() == [30] * 8 + [5] * 2
    for sequence in (first, second):  # of the longest, cut
        assert sequence.inputs.tolist() == [30] * 10
        assert sequence.positions().tolist() == list(range(10))
        assert sequence.scored.all()
    assert third.inputs.tolist() == [12] * 10
    (joined,) = longest_first([torch.full((n,), n) for n in (3, 5, 4)], 9, 2)
    assert joined.inputs.tolist() == [5] * 5 + [4] * 4
    assert joined.positions().tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert joined.scored.nonzero().flatten().tolist() == [0, 1, 2, 3, 5, 6, 7]  # 3 begins where the labels end


def test_the_end_alone() -> None:
    (sequence,) = longest_first([torch.arange(11)], 10, 1)
    end = sequence.last(4, 2)
    assert end.inputs.tolist() == [6, 7, 8, 9]
    assert end.labels.tolist() == [-100, -100, 9, 10]
    assert end.starts.tolist() == [True, False, False, False]


def test_positions_are_doubled() -> None:
    rows = by_position(torch.tensor([0, 1, 2, 3, 3, 9]), torch.tensor([1.0, 2.0, 3.0, 4.0, 8.0, 7.0]))
    assert rows == [(0, 1, 1, 1.0), (1, 2, 1, 2.0), (2, 4, 3, 5.0), (8, 16, 1, 7.0)]
