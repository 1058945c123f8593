"""Text without a download: the standard library's source, or local files of text."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset, IterableDataset

SKIPPED_FOLDERS = {"site-packages", "__pycache__", "test", "tests", "idlelib", "turtledemo", "lib2to3"}
COLUMN = "text"  # of .jsonl and .parquet


def load_stdlib(path: str = "") -> Dataset:
    """Source text of this interpreter's standard library: one document a module, in the order of their paths.

    Args:
        path: another folder of Python sources instead.

    Raises:
        ValueError: the folder has no Python source.
    """
    root = Path(path or sysconfig.get_path("stdlib"))
    files = [f for f in sorted(root.rglob("*.py")) if not SKIPPED_FOLDERS & set(f.relative_to(root).parts)]
    texts = [f.read_text(encoding="utf-8", errors="replace") for f in files]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(
            f'{str(root)!r} holds no Python source (.py), which dataset = "stdlib" reads; for {_kinds()} files set '
            'dataset = "local".'
        )
    return Dataset.from_dict({COLUMN: texts})


def load_local(path: str) -> IterableDataset:
    """Documents of a file or of all files below a folder: ``.txt`` (one a file), ``.jsonl``, ``.parquet`` (one a row).

    Files are read as training goes on, in the order of their paths; blank documents are left out.

    Raises:
        ValueError: there is no such file, or none holds text. A file that cannot be read is named once it is met.
    """
    files = [str(file) for file in find_files(path)]
    if not files:
        raise ValueError(f"{path!r} holds no {_kinds()} file.")
    if next(read_documents(files), None) is None:
        raise ValueError(f"{path!r} holds no text: its {len(files)} files are empty or blank.")
    return IterableDataset.from_generator(read_documents, gen_kwargs={"files": files})


def text_of(sample: dict[str, Any]) -> str:
    """The text of a row of either dataset."""
    text: str = sample[COLUMN]
    return text


def find_files(path: str) -> list[Path]:
    """The readable files at ``path`` (a file, or a folder searched in depth), sorted; empty if there are none."""
    root = Path(path)
    files = [root] if root.is_file() else sorted(root.rglob("*"))
    return [f for f in files if f.is_file() and f.suffix in READERS]


def read_documents(files: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows ``{"text": ...}`` of ``files``, blank ones left out.

    Raises:
        ValueError: what is wrong, with the file and the line or row.
    """
    for file in files:
        for text in READERS[Path(file).suffix](Path(file)):
            if text.strip():
                yield {COLUMN: text}


def _read_txt(file: Path) -> Iterator[str]:
    yield _decode(file.read_bytes(), str(file))


def _read_jsonl(file: Path) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{file}, line {number}"
            if line.strip():
                try:
                    row = json.loads(_decode(line, place).rstrip())
                except json.JSONDecodeError as error:
                    raise ValueError(f"{place}: no valid JSON ({error.msg} at column {error.colno}).") from error
                except RecursionError as error:
                    raise ValueError(f"{place}: JSON nested too deeply to be read.") from error
                yield _text_in(row, place)


def _read_parquet(file: Path) -> Iterator[str]:
    try:
        table = pyarrow.parquet.ParquetFile(file)
        if COLUMN not in table.schema_arrow.names:
            raise ValueError(f"{file}: {_no_column(table.schema_arrow.names)}")
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=[COLUMN]):
            for row in batch.to_pylist():
                number += 1
                yield _text_in(row, f"{file}, row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as parquet: {str(error).splitlines()[0]}") from error


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _kinds() -> str:
    return ", ".join(READERS)


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: no UTF-8 text (byte {error.start}: {error.reason}); convert the file.") from error


def _text_in(row: Any, place: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a {type(row).__name__} where an object with a field {COLUMN!r} is expected.")
    if COLUMN not in row:
        raise ValueError(f"{place}: {_no_column(list(row))}")
    if not isinstance(row[COLUMN], str):
        raise ValueError(f"{place}: the column {COLUMN!r} holds {row[COLUMN]!r}, which is no text.")
    try:
        row[COLUMN].encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character, which no tokenizer takes
        raise ValueError(f"{place}: half of a surrogate pair at character {error.start}, which is no text.") from error
    return row[COLUMN]


def _no_column(names: Sequence[str]) -> str:
    return f"no column {COLUMN!r} but {', '.join(map(repr, names)) or 'none'}; rename the column."
