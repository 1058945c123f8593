"""Text without a download: the standard library's source, or local files of text."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from torchtitan_upipe.data import rows

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
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in sorted(_sources(root))]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(
            f'{str(root)!r} holds no Python source (.py), which dataset = "stdlib" reads; for {_kinds()} files set '
            'dataset = "local".'
        )
    return Dataset.from_dict({COLUMN: texts})


def _sources(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def load_local(path: str) -> IterableDataset:
    """Documents of a file or of all files below a folder: ``.txt`` (one a file), ``.jsonl``, ``.parquet`` (one a row).

    Files are read as training goes on, in the order of their paths; blank documents are left out.

    Raises:
        ValueError: there is no such file, or none holds text. A file that cannot be read is named once it is met.
    """
    files = [str(file) for file in rows.find_files(path, READERS)]
    if not files:
        raise ValueError(f"{path!r} holds no {_kinds()} file.")
    if next(read_documents(files), None) is None:
        raise ValueError(f"{path!r} holds no text: its {len(files)} files are empty or blank.")
    return IterableDataset.from_generator(read_documents, gen_kwargs={"files": files})


def text_of(sample: dict[str, Any]) -> str:
    """The text of a row of either dataset."""
    text: str = sample[COLUMN]
    return text


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
    yield rows.decode(file.read_bytes(), str(file))


def _read_column(file: Path) -> Iterator[str]:
    for row, place in rows.READERS[file.suffix](file, COLUMN):
        yield _text_in(row, place)


READERS = {".txt": _read_txt, **dict.fromkeys(rows.READERS, _read_column)}


def _kinds() -> str:
    return ", ".join(READERS)


def _text_in(row: dict[str, Any], place: str) -> str:
    if not isinstance(row[COLUMN], str):
        raise ValueError(f"{place}: the column {COLUMN!r} holds {row[COLUMN]!r}, which is no text.")
    try:
        row[COLUMN].encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character, which no tokenizer takes
        raise ValueError(f"{place}: half of a surrogate pair at character {error.start}, which is no text.") from error
    return row[COLUMN]
