"""Text without a download: the standard library's source, or local files. Both join TorchTitan's own datasets."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

LOADERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}  # suffix -> loader of `datasets`
SKIPPED_FOLDERS = {"site-packages", "__pycache__", "test", "tests", "idlelib", "turtledemo", "lib2to3"}


def register_datasets() -> None:
    """Add ``"stdlib"`` and ``"local"`` to the datasets that TorchTitan knows by name."""
    DATASETS["stdlib"] = DatasetConfig(path="", loader=load_stdlib, sample_processor=_text_of)
    DATASETS["local"] = DatasetConfig(path="", loader=load_local, sample_processor=_text_of)


def load_stdlib(path: str = "") -> Dataset:
    """Source text of this interpreter's standard library: one document a module, in the order of their paths.

    Args:
        path: another folder of Python sources instead.
    """
    root = Path(path or sysconfig.get_path("stdlib"))
    files = [f for f in sorted(root.rglob("*.py")) if not SKIPPED_FOLDERS & set(f.relative_to(root).parts)]
    texts = [f.read_text(encoding="utf-8", errors="replace") for f in files]
    return Dataset.from_dict({"text": [text for text in texts if text.strip()]})


def load_local(path: str) -> IterableDataset:
    """Documents of a file or of all files below a folder: ``.txt`` (one a file), ``.jsonl``, ``.parquet`` (one a row).

    Rows are streamed; each needs a string column ``text``.

    Raises:
        ValueError: there is no such file, or a file has no column ``text``.
    """
    by_loader: dict[str, list[str]] = {}
    for file in find_files(path):
        by_loader.setdefault(LOADERS[file.suffix], []).append(str(file))
    parts = []
    for loader, files in by_loader.items():
        options = {"sample_by": "document"} if loader == "text" else {}
        part = load_dataset(loader, data_files=files, split="train", streaming=True, **options)
        row = next(iter(part), None)
        if row is not None and "text" not in row:
            raise ValueError(f"{files[0]} has no column 'text' but {', '.join(map(repr, row))}; rename the column.")
        parts.append(part.select_columns("text"))
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def find_files(path: str) -> list[Path]:
    """The readable files at ``path`` (a file, or a folder searched in depth), sorted; empty if there are none."""
    root = Path(path)
    files = [root] if root.is_file() else sorted(root.rglob("*"))
    return [f for f in files if f.is_file() and f.suffix in LOADERS]


def check_dataset(section: str, name: str, path: str | None) -> None:
    """Refuse a dataset that is not there.

    Raises:
        ValueError: unknown name, or a path that does not exist or holds nothing readable.
    """
    if name.lower() not in DATASETS:
        raise ValueError(f"{section}.dataset = {name!r} is unknown; choose one of {', '.join(sorted(DATASETS))}.")
    if name.lower() == "local" and not path:
        raise ValueError(f'{section}.dataset = "local" needs {section}.dataset_path, a file or a folder.')
    if path and not Path(path).exists():
        raise ValueError(f"{section}.dataset_path = {path!r} does not exist.")
    if name.lower() == "local" and path and not find_files(path):
        raise ValueError(f"{section}.dataset_path = {path!r} holds no {', '.join(LOADERS)} file.")
    default = DATASETS[name.lower()].path
    if not path and default.startswith("tests/") and not Path(default).exists():
        raise ValueError(
            f"{section}.dataset = {name!r} reads {default}, which is part of TorchTitan's source tree and not here; "
            f'set {section}.dataset_path, or use dataset = "stdlib".'
        )


def _text_of(sample: dict[str, Any]) -> str:
    text: str = sample["text"]
    return text
