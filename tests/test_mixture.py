"""Mixtures: shares of tokens by weight, long documents more often, everything once a pass, also after a restart."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import job_args, train
from torchtitan_upipe.data.mixture import Mixture, Part, Source, read_mixture
from torchtitan_upipe.data.reader import Reader
from torchtitan_upipe.data.stream import TokenStream
from torchtitan_upipe.data.text import load_local, text_of
from torchtitan_upipe.job.read import read_job

LENGTH = 20


def encode(row: Any) -> list[int]:
    return [*map(ord, text_of(row)), 0]


def documents(folder: Path, letter: str, count: int, length: int) -> Path:
    """Documents of one letter and a number, ``length`` tokens each with the one that ends it."""
    file = folder / f"{letter}{length}.jsonl"
    lines = [json.dumps({"text": f"{i:03}".rjust(length - 1, letter)}) for i in range(count)]
    file.write_text("\n".join(lines))
    return file


def stream(sources: list[Source], rank: int = 0, ranks: int = 1) -> TokenStream:
    def reader(source: Source) -> Reader:
        return Reader(load_local(source.dataset_path), rank=rank, ranks=ranks, source=source.dataset_path)

    parts = [Part(reader(source), encode, source) for source in sources]
    return TokenStream(Mixture(parts), lambda tokens: tokens, LENGTH)


def tokens(data: TokenStream, count: int | None) -> list[int]:
    found = []
    for item, labels in islice(data, count):
        found += [*item["input"].tolist(), int(labels[-1])]
    return found


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    paths = [documents(tmp_path, "a", 40, 10), documents(tmp_path, "b", 30, 50), documents(tmp_path, "c", 25, 7)]
    return [Source("local", str(path), weight) for path, weight in zip(paths, (3, 1, 2), strict=True)]


def test_tokens_come_by_weight(sources: list[Source]) -> None:
    """Whatever the documents' lengths, and at every moment; each source goes round in order."""
    for count in (40, 200):
        found = "".join(map(chr, tokens(stream(sources), count)))
        drawn = Counter()
        for text in found.split("\0")[:-1]:
            drawn[text[0]] += len(text) + 1
        total = sum(drawn.values())
        for letter, share in (("a", 3 / 6), ("b", 1 / 6), ("c", 2 / 6)):
            assert abs(drawn[letter] - share * total) <= 50  # the longest document
    numbers = [int(text[-3:]) for text in found.split("\0")[:-1] if text[0] == "a"]
    assert numbers == [i % 40 for i in range(len(numbers))]


def test_long_documents_of_one_dataset_come_more_often(tmp_path: Path) -> None:
    for letter, count, length in (("s", 90, 10), ("l", 10, 30)):
        documents(tmp_path, letter, count, length)
    short = Source("local", str(tmp_path), 0.4, max_tokens=29)
    long = Source("local", str(tmp_path), 0.6, min_tokens=30)
    found = "".join(map(chr, tokens(stream([short, long]), 150))).split("\0")[:-1]
    by_length = Counter({n: sum(len(t) + 1 for t in found if len(t) + 1 == n) for n in (10, 30)})
    assert by_length[30] / by_length.total() == pytest.approx(0.6, abs=0.02)  # of 25% in the files
    with pytest.raises(ValueError, match=r"no document of data-parallel rank 0 has at least 31 and at most inf tokens"):
        tokens(stream([Source("local", str(tmp_path), min_tokens=31)]), 1)


@pytest.mark.parametrize("stop", [1, 9, 60])
def test_a_resumed_mixture_goes_on_where_it_was(stop: int, sources: list[Source]) -> None:
    whole = tokens(stream(sources), stop + 40)
    first = stream(sources)
    begun = tokens(first, stop)
    resumed = stream(sources)
    resumed.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    assert begun + tokens(resumed, 40) == whole


@pytest.mark.parametrize("before, after", [(1, 2), (3, 2)])
def test_more_or_fewer_ranks_go_on_with_what_is_left(before: int, after: int, sources: list[Source]) -> None:
    """Within the first pass of each source no document comes twice."""
    seen: Counter[str] = Counter()
    states = []
    for rank in range(before):
        old = stream(sources, rank, before)
        seen.update("".join(map(chr, tokens(old, 3))).split("\0"))
        states.append(old.state_dict())
    for rank in range(after):
        new = stream(sources, rank, after)
        new.load_states(states)
        seen.update("".join(map(chr, tokens(new, 3))).split("\0"))
    whole = {text: n for text, n in seen.items() if len(text) + 1 in (10, 50, 7) and text[0] in "abc"}
    assert len(whole) > 10
    assert set(whole.values()) == {1}


def test_another_mixture_is_refused(sources: list[Source]) -> None:
    with pytest.raises(ValueError, match=r"was trained on a mixture of .*, and this job reads a mixture of"):
        stream(sources[:2]).load_state_dict(stream(sources).state_dict())


def test_a_job_trains_on_a_mixture_and_goes_on(tmp_path: Path) -> None:
    documents(tmp_path, "x", 50, 200)
    file = tmp_path / "mixture.toml"
    file.write_text(
        f"[[source]]\ndataset = 'local'\ndataset_path = '{tmp_path}'\nweight = 0.7\n[[source]]\ndataset = 'stdlib'\n"
    )
    options = {"training__dataset": "mixture", "training__dataset_path": file, "training__steps": 4}
    flags = ["--checkpoint.enable", "--checkpoint.no-last_save_model_only"]
    whole = train(tmp_path / "whole", 2, *flags, checkpoint__interval=2, **options)
    again = train(tmp_path / "whole", 2, *flags, "--checkpoint.load_step", "2", **options)
    assert again.loss[-2:] == whole.loss[-2:]


@pytest.mark.parametrize(
    "text, sentence",
    [
        (None, r"the mixture '.*m.toml' cannot be read"),
        ("a = ", r"the mixture '.*m.toml' cannot be read"),
        ("a = 1", r"must consist of tables \[\[source\]\], and of nothing else"),
        ("[[source]]\ndataset = 'stdlib'\nwieght = 1", r"source 1: unknown field wieght; known are dataset,"),
        ("[[source]]\nweight = 1", r"source 1: it names no dataset"),
        ("[[source]]\ndataset = 'stdlib'\nweight = 0", r"weight = 0 must be a finite positive number"),
        ("[[source]]\ndataset = 'stdlib'\nweight = '1'", r"weight = '1' is of the wrong type"),
        ("[[source]]\ndataset = 'stdlib'\nmin_tokens = 9\nmax_tokens = 8", r"min_tokens = 9 and max_tokens = 8"),
    ],
)
def test_a_file_that_is_no_mixture_is_refused(text: str | None, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "m.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_mixture(str(file))


def test_a_source_that_is_not_there_is_refused_before_the_job(tmp_path: Path) -> None:
    file = tmp_path / "m.toml"
    options = {"training__dataset": "mixture", "training__dataset_path": file}
    for source, sentence in (
        ("dataset = 'local'", r"m.toml, source 1.dataset = \"local\" needs"),
        ("dataset = 'local'\ndataset_path = 'no'", r"source 1.dataset_path = 'no' does not exist"),
        ("dataset = 'chat'\ndataset_path = '.'", r"source 1: a mixture is of texts"),
        ("dataset = 'x'", r"source 1.dataset = 'x' is unknown"),
    ):
        file.write_text(f"[[source]]\n{source}\n")
        with pytest.raises(ValueError, match=sentence):
            read_job(job_args(tmp_path, 1, **options))
