"""Documents to ranks and tokens: everything once, also across a pass, a restart and another number of ranks."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torchdata.stateful_dataloader import StatefulDataLoader
from torchtitan.components.tokenizer import build_hf_tokenizer

from tests.jobs import job_args
from tests.strategies import patient
from torchtitan_upipe.data.dealing import Position, Taken, deal_again
from torchtitan_upipe.data.reader import Reader
from torchtitan_upipe.data.stream import TokenStream
from torchtitan_upipe.data.text import load_local, text_of
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.titan.datasets import Dataloader, build_dataloader

DOCUMENTS = 7


class OneRank:
    """A rank of the simplest kind: reads ``steps`` documents of its own, over passes of ``DOCUMENTS``."""

    def __init__(self, rank: int, position: Position) -> None:
        self.rank = rank
        self.position = position
        self.read: list[tuple[int, int]] = []

    def run(self, steps: int) -> None:
        while steps:
            p = self.position
            if p.next == DOCUMENTS:
                self.position = Position(p.ranks, p.number + 1, 0, DOCUMENTS, p.taken)
                continue
            if p.taken_now.owner(p.next, p.ranks) == self.rank:
                self.read.append((p.number, p.next))
                steps -= 1
            self.position = Position(p.ranks, p.number, p.next + 1, p.length, p.taken)


@given(st.data())
@patient
def test_every_document_is_read_once_whatever_the_ranks_do(data: st.DataObject) -> None:
    """Ranks go at their own speeds, a pass or more apart, and are dealt anew several times."""
    position = Position(data.draw(st.integers(1, 4)))
    read: Counter[tuple[int, int]] = Counter()
    for _ in range(data.draw(st.integers(1, 4))):
        readers = [OneRank(rank, position) for rank in range(position.ranks)]
        for reader in readers:
            reader.run(data.draw(st.integers(0, 9)))
            read.update(reader.read)
        positions = [reader.position for reader in readers]
        position = deal_again(positions, data.draw(st.integers(1, 4)))
        assert pickle.loads(pickle.dumps(position)) == position
    last = position.number + 3
    readers = [OneRank(rank, position) for rank in range(position.ranks)]
    for reader in readers:
        while reader.position.number < last:
            reader.run(1)
        read.update(reader.read)
    assert set(read.values()) == {1}
    assert {item for item in read if item[0] < last} == {(p, i) for p in range(last) for i in range(DOCUMENTS)}


def test_what_is_not_taken_goes_round() -> None:
    taken = Taken(2, (3, 4))
    assert [taken.owner(i, 2) for i in range(8)] == [None, None, 0, None, None, 1, 0, 1]


# --- the stream ------------------------------------------------------------------------------------------------------

TEXTS = [f"{i:02d}" + "x" * (3 * i) for i in range(9)]  # lengths 2 to 26


@pytest.fixture(params=["txt", "jsonl", "parquet", "map"])
def rows(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """The same documents in every format, in two files where it takes more than one document a file."""

    def make() -> Any:
        if request.param == "map":
            return Dataset.from_dict({"text": TEXTS})
        return load_local(str(tmp_path))

    for i, text in enumerate(TEXTS):
        if request.param == "txt":
            (tmp_path / f"{i}.txt").write_text(text)
    for part, texts in enumerate((TEXTS[:4], TEXTS[4:])):
        if request.param == "jsonl":
            (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        if request.param == "parquet":
            pq.write_table(pa.table({"text": texts}), tmp_path / f"{part}.parquet")
    return make


def encode(text: str) -> list[int]:
    return [*map(ord, text), 0]


def stream(rows: Any, rank: int = 0, ranks: int = 1, source: str = "these", **options: Any) -> TokenStream:
    reader = Reader(rows(), rank=rank, ranks=ranks, source=source)
    return TokenStream(reader, lambda row: encode(text_of(row)), 10, **options)


def sequences(iterator: Iterator[Any], count: int) -> list[list[int]]:
    return [[*item["input"].tolist(), int(labels[-1])] for item, labels in islice(iterator, count)]


@pytest.mark.parametrize("stop", [1, 5, 13, 14, 20, 33])  # a pass has 117 tokens: 10.6 sequences of 11
def test_a_resumed_stream_goes_on_where_it_was_also_after_a_pass(rows: Any, stop: int) -> None:
    whole = sequences(iter(stream(rows)), stop + 30)
    first = stream(rows)
    assert sequences(iter(first), stop) == whole[:stop]
    resumed = stream(rows)
    resumed.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    assert sequences(iter(resumed), 30) == whole[stop:]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_goes_on_where_it_was(rows: Any, workers: int) -> None:
    def loader() -> Dataloader:
        return Dataloader(stream(rows), dp_rank=0, dp_world_size=1, batch_size=2, num_workers=workers)

    whole = [batch[0]["input"].tolist() for batch in islice(loader(), 12)]
    first = loader()
    assert [batch[0]["input"].tolist() for batch in islice(first, 7)] == whole[:7]
    resumed = loader()
    resumed.load_state_dict(first.state_dict())
    assert [batch[0]["input"].tolist() for batch in islice(resumed, 5)] == whole[7:]


@pytest.mark.parametrize("before, after", [(0, 1), (1, 0)])
def test_a_worker_process_may_come_or_go(rows: Any, before: int, after: int) -> None:
    def loader(workers: int) -> Dataloader:
        return Dataloader(stream(rows), dp_rank=0, dp_world_size=1, batch_size=1, num_workers=workers)

    first = loader(before)
    whole = [batch[0]["input"].tolist() for batch in islice(loader(0), 9)]
    assert [batch[0]["input"].tolist() for batch in islice(first, 4)] == whole[:4]
    resumed = loader(after)
    resumed.state_dict()  # as a checkpoint asks before it loads
    resumed.load_state_dict(first.state_dict())
    assert [batch[0]["input"].tolist() for batch in islice(resumed, 5)] == whole[4:]
    resumed.restart()
    assert [batch[0]["input"].tolist() for batch in islice(resumed, 5)] == whole[:5]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("before, after", [(1, 3), (2, 1), (2, 3), (3, 2)])
def test_more_or_fewer_ranks_go_on_with_what_is_left(rows: Any, before: int, after: int, workers: int) -> None:
    """Over one pass every token is trained on once, but for what does not fill a sequence."""

    def loader(rank: int, ranks: int) -> Dataloader:
        data = stream(rows, rank, ranks, endless=False)
        return Dataloader(data, dp_rank=rank, dp_world_size=ranks, batch_size=1, num_workers=workers)

    seen: list[int] = []
    state: dict[str, Any] = {}
    for rank in range(before):
        old = loader(rank, before)
        for _, (item, labels) in zip(range(2 - rank % 2), old, strict=False):
            seen += [*item["input"].flatten().tolist(), int(labels[0, -1])]
        state |= old.state_dict()
    for rank in range(after):
        new = loader(rank, after)
        new.expect(before)
        assert {name for name in new.state_dict() if name != "world_size"} == {f"dp_rank_{r}" for r in range(before)}
        new.load_state_dict(state)
        for item, labels in new:
            seen += [*item["input"].flatten().tolist(), int(labels[0, -1])]
    available = Counter(token for text in TEXTS for token in encode(text))
    assert not Counter(seen) - available
    assert sum(available.values()) - len(seen) <= 10 * after


def test_a_state_saved_before_the_next_document_is_read(rows: Any) -> None:
    """Right after a load, while sequences come from tokens that were read before: twice in a row."""
    first = stream(rows)
    iterator = iter(first)
    sequences(iterator, 8)  # within the longest documents
    state = first.state_dict()
    expected = sequences(iterator, 20)
    for _ in range(2):
        again = stream(rows)
        again.load_state_dict(state)
        state = pickle.loads(pickle.dumps(again.state_dict()))
    last = stream(rows)
    last.load_state_dict(state)
    assert sequences(iter(last), 20) == expected


def test_ranks_that_are_passes_apart_are_dealt_anew(rows: Any) -> None:
    """In a pass of which little is left some ranks have no document; that is no reason to stop."""
    states = []
    for rank, steps in ((0, 1), (1, 40)):
        old = stream(rows, rank, 2)
        sequences(iter(old), steps)
        states.append(old.state_dict())
    for rank in range(4):
        new = stream(rows, rank, 4)
        new.load_states(states)
        assert len(sequences(iter(new), 10)) == 10


def test_iterating_again_goes_on_and_restart_begins_anew(rows: Any) -> None:
    whole = sequences(iter(stream(rows, 1, 2)), 12)
    data = stream(rows, 1, 2)
    assert sequences(iter(data), 3) + sequences(iter(data), 3) == whole[:6]
    data.restart()
    assert sequences(iter(data), 4) == whole[:4]


def test_the_end_of_a_document_predicts_nothing(rows: Any) -> None:
    """Of all labels only the first tokens of documents are ignored, and nothing else changes."""
    kept, masked = stream(rows), stream(rows, document_end=0)
    for (item, labels), (same, fewer) in zip(islice(kept, 40), islice(masked, 40), strict=True):
        assert torch.equal(item["input"], same["input"])
        ends = item["input"] == 0
        assert set(labels[ends].tolist()) <= {ord(text[0]) for text in TEXTS}
        assert torch.equal(fewer, labels.masked_fill(ends, -100))


def test_other_data_is_refused(rows: Any) -> None:
    with pytest.raises(ValueError, match="was trained on these, and this job reads those"):
        stream(rows, source="those").load_state_dict(stream(rows).state_dict())


def test_fewer_documents_than_ranks_are_refused(rows: Any) -> None:
    with pytest.raises(ValueError, match="its 9 documents leave data-parallel rank 9 of 10 without one"):
        next(iter(stream(rows, 9, 10)))


def test_a_validation_stream_ends_and_begins_again(rows: Any) -> None:
    loader = StatefulDataLoader(stream(rows, endless=False), batch_size=1)
    passes = [[item["input"].tolist() for item, _ in loader] for _ in range(2)]
    assert passes[0] == passes[1]
    assert len(passes[0]) == sum(map(len, map(encode, TEXTS))) // 11


@pytest.mark.parametrize("dataset", ["local", "mixture"])
@pytest.mark.parametrize("packing", ["join", "first_fit"])
def test_a_stream_goes_to_a_worker_that_is_not_forked(dataset: str, packing: str, tmp_path: Path) -> None:
    """Where Python starts processes afresh, what a job builds is pickled."""
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(9)))
    (tmp_path / "mixture.toml").write_text(f"[[source]]\ndataset = 'local'\ndataset_path = '{file}'\n")
    path = file if dataset == "local" else tmp_path / "mixture.toml"
    options = {"training__dataset": dataset, "training__dataset_path": path, "training__seq_len": 32}
    config = read_job(job_args(tmp_path, 1, "--training.document_mask", training__packing=packing, **options))
    tokenizer = build_hf_tokenizer(config)
    loader = build_dataloader(1, 0, tokenizer, config)
    copy = pickle.loads(pickle.dumps(loader.dataset))
    for (item, labels), (same_item, same_labels) in islice(zip(loader.dataset, copy, strict=False), 5):
        assert torch.equal(item["input"], same_item["input"])
        assert torch.equal(labels, same_labels)
