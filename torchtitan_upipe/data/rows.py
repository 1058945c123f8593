"""Rows of files of JSON lines or parquet, each with its place for a sentence about it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

Row = tuple[dict[str, Any], str]  # a row that has the column asked for, and "file, line 3"


def read_jsonl(file: Path, column: str) -> Iterator[Row]:
    """Objects of a file of JSON lines; blank lines are left out.

    Raises:
        ValueError: what is wrong, with the file and the line.
    """
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{file}, line {number}"
            if line.strip():
                try:
                    row = json.loads(decode(line, place).rstrip())
                except json.JSONDecodeError as error:
                    raise ValueError(f"{place}: no valid JSON ({error.msg} at column {error.colno}).") from error
                except RecursionError as error:
                    raise ValueError(f"{place}: JSON nested too deeply to be read.") from error
                if not isinstance(row, dict):
                    raise ValueError(
                        f"{place}: a {type(row).__name__} where an object with a field {column!r} is expected."
                    )
                if column not in row:
                    raise ValueError(f"{place}: {_no_column(column, list(row))}")
                yield row, place


def read_parquet(file: Path, column: str, others: Sequence[str] = ()) -> Iterator[Row]:
    """Rows of a parquet file: ``column``, and those of ``others`` that are there.

    Raises:
        ValueError: what is wrong, with the file.
    """
    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if column not in names:
            raise ValueError(f"{file}: {_no_column(column, names)}")
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=[column, *(n for n in others if n in names)]):
            for row in batch.to_pylist():
                number += 1
                yield row, f"{file}, row {number}"
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as parquet: {str(error).splitlines()[0]}") from error


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {".jsonl": read_jsonl, ".parquet": read_parquet}


def find_files(path: str, suffixes: Collection[str]) -> list[Path]:
    """Files at ``path`` (a file, or a folder searched in depth) that end so, sorted; empty if there are none."""
    root = Path(path)
    files = [root] if root.is_file() else sorted(root.rglob("*"))
    return [f for f in files if f.is_file() and f.suffix in suffixes]


def decode(content: bytes, place: str) -> str:
    """``content`` as text, with or without a byte order mark.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: no UTF-8 text (byte {error.start}: {error.reason}); convert the file.") from error


def _no_column(column: str, names: Sequence[str]) -> str:
    return f"no column {column!r} but {', '.join(map(repr, names)) or 'none'}; rename the column."
