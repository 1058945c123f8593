import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchtitan_upipe.data.sharding import shard_positions
from torchtitan_upipe.data.text import check_dataset, load_local, load_stdlib, register_datasets


def test_stdlib_is_long_text_in_a_fixed_order() -> None:
    texts = load_stdlib()["text"]
    assert len(texts) > 300
    assert sum(map(len, texts)) > 5_000_000
    assert texts[:5] == load_stdlib()["text"][:5]
    assert all(isinstance(text, str) and text.strip() for text in texts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("first\nlines of one document\n")
    (tmp_path / "deep" / "b.txt").write_text("second")
    rows = [{"text": "third", "more": 1}, {"text": "fourth", "more": 2}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.table({"text": ["fifth"]}), tmp_path / "d.parquet")
    (tmp_path / "ignored.md").write_text("not read")
    return tmp_path


def test_local_reads_each_document_once(folder: Path) -> None:
    assert [row["text"] for row in load_local(str(folder))] == [
        "first\nlines of one document\n",
        "second",
        "third",
        "fourth",
        "fifth",
    ]
    assert [row["text"] for row in load_local(str(folder / "c.jsonl"))] == ["third", "fourth"]


def test_a_file_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"content": "?"}))
    with pytest.raises(ValueError, match="has no column 'text' but 'content'; rename the column"):
        load_local(str(tmp_path))


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    register_datasets()
    with pytest.raises(ValueError, match=r"holds no \.txt, \.jsonl, \.parquet file"):
        check_dataset("training", "local", str(tmp_path))


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
def test_every_token_is_on_one_rank_and_gathers_in_order(ulysses: int, ring: int, scale: int) -> None:
    length = 2 * ulysses * ring * scale
    shards = [shard_positions(length, rank, ulysses, ring) for rank in range(ulysses * ring)]
    assert {len(shard) for shard in shards} == {length // (ulysses * ring)}
    assert torch.cat(shards).sort().values.tolist() == list(range(length))
    work = set()
    for index in range(ring):
        gathered = torch.cat(shards[index * ulysses : (index + 1) * ulysses])
        assert (gathered.diff() > 0).all()  # side by side after the all-to-all: a causal mask is right
        work.add(int((gathered + 1).sum()))
    assert len(work) == 1  # the causal mask gives every ring rank equally many keys to see
