import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchtitan_upipe.cp.chunks import sequence_chunks
from torchtitan_upipe.data.sharding import shard_positions
from torchtitan_upipe.data.text import load_local, load_stdlib
from torchtitan_upipe.kernels.visibility import Documents, Tokens, visible_pieces


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


def test_local_reads_each_document_once_in_the_order_of_paths(folder: Path) -> None:
    assert [row["text"] for row in load_local(str(folder))] == [
        "first\nlines of one document\n",
        "third",
        "fourth",
        "fifth",
        "second",
    ]
    assert [row["text"] for row in load_local(str(folder / "c.jsonl"))] == ["third", "fourth"]


def test_blank_documents_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "c.jsonl").write_text('{"text": ""}\n\n{"text": "words"}\n{"text": "\\n"}\n')
    assert [row["text"] for row in load_local(str(tmp_path))] == ["words"]
    (tmp_path / "c.jsonl").unlink()
    with pytest.raises(ValueError, match="holds no text: its 2 files are empty or blank"):
        load_local(str(tmp_path))


def test_byte_order_marks_and_other_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfthree")
    assert [row["text"] for row in load_local(str(tmp_path))] == ["one", "two", "three"]


def parquet(**columns: object) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("x.txt", b"caf\xe9", r"x.txt: no UTF-8 text \(byte 3: .*\); convert the file"),
        ("x.jsonl", b'{"text": "good"}\n{"text": \n', r"x.jsonl, line 2: no valid JSON \(Expecting value at column 9"),
        ("x.jsonl", b'{"text": "good"}\n\n{"text": "\xff"}', r"x.jsonl, line 3: no UTF-8 text"),
        ("x.jsonl", b'{"content": "?"}', r"x.jsonl, line 1: no column 'text' but 'content'; rename the column"),
        ("x.jsonl", b'{"text": null}', r"x.jsonl, line 1: the column 'text' holds None, which is no text"),
        ("x.jsonl", b'{"text": 5}', r"x.jsonl, line 1: the column 'text' holds 5"),
        ("x.jsonl", b'{"text": "a\\ud800b"}', r"x.jsonl, line 1: half of a surrogate pair at character 1"),
        ("x.jsonl", b"[" * 100_000, r"x.jsonl, line 1: JSON nested too deeply"),
        ("x.jsonl", b'["text"]', r"x.jsonl, line 1: a list where an object with a field 'text'"),
        ("x.parquet", b"PAR1 and no more", r"x.parquet cannot be read as parquet: "),
        ("x.parquet", parquet(words=["?"]), r"x.parquet: no column 'text' but 'words'"),
        ("x.parquet", parquet(text=["good", None]), r"x.parquet, row 2: the column 'text' holds None"),
        ("x.parquet", parquet(text=[1, 2]), r"x.parquet, row 1: the column 'text' holds 1"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        list(load_local(str(tmp_path)))


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \.txt, \.jsonl, \.parquet file"):
        load_local(str(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"holds no Python source \(.py\), .*set dataset = \"local\""):
        load_stdlib(str(tmp_path))


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


@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 12))
def test_every_rank_holds_its_slice_of_every_sequence_chunk(degree: int, tokens: int, slice_: int) -> None:
    length, chunk = degree * tokens, degree * slice_
    shards = [shard_positions(length, rank, degree, 1, chunk) for rank in range(degree)]
    assert {len(shard) for shard in shards} == {tokens}
    chunks = sequence_chunks(tokens, degree, chunk)
    assert [stop - start for start, stop in chunks.slices[:-1]] == [slice_] * (len(chunks.slices) - 1)
    for index, rows in enumerate(chunks.slices):
        exchanged = torch.cat([shard[slice(*rows)] for shard in shards])  # side by side, as after the all-to-all
        assert exchanged.tolist() == list(range(*chunks.positions(index)))
    assert chunks.positions(len(chunks.slices) - 1)[1] == length


@given(st.integers(1, 4), st.lists(st.lists(st.integers(1, 30)), min_size=1, max_size=3), st.integers(1, 10))
def test_a_chunk_sees_what_its_tokens_see(degree: int, starts: list[list[int]], slice_: int) -> None:
    tokens = 30
    documents = Documents(tuple((0, *sorted(set(row))) for row in starts))
    chunks = sequence_chunks(tokens, degree, degree * slice_)
    for index in range(len(chunks.slices)):
        queries = Tokens((chunks.positions(index),))
        seen = chunks.seen_by(index, documents)
        assert list(chunks.seen_by(index, None)) == list(range(index + 1))
        for other in range(len(chunks.slices)):
            keys = Tokens((chunks.positions(other),))
            assert any(visible_pieces(queries, keys, row) for row in documents.starts) == (other in seen)
