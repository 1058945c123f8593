"""Weights as Transformers saves them: one file of safetensors, or an index and files of ordinary size."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

FILE_BYTES = 5 * 10**9
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def split(sizes: Mapping[str, int], limit: int = FILE_BYTES) -> list[list[str]]:
    """Names of the weights of each file, in their order: as many as ``limit`` bytes hold, and at least one."""
    files: list[list[str]] = []
    filled = limit
    for name, size in sizes.items():
        if filled + size > limit:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files


def write_weights(
    folder: Path,
    sizes: Mapping[str, int],
    fetch: Callable[[Sequence[str]], Mapping[str, Tensor]],
    *,
    limit: int = FILE_BYTES,
    writes: bool = True,
) -> None:
    """Write weights into ``folder``, one file's at a time in memory.

    A file gets its name when it is whole, and the index comes last: what was ended halfway is no model.

    Args:
        sizes: bytes of every weight, by its name.
        fetch: the weights of a file, in host memory; called on every rank that takes part, for the same files.
        limit: bytes of a file, unless one weight is larger.
        writes: whether this rank writes. What ``fetch`` returns is not looked at elsewhere.
    """
    files = split(sizes, limit)
    place: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = SINGLE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        weights = fetch(names)
        if writes:
            partial = folder / f"{file}.partial"
            save_file({name: weight.contiguous() for name, weight in weights.items()}, partial, {"format": "pt"})
            os.replace(partial, folder / file)
        place |= dict.fromkeys(names, file)
    if writes and len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": place}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
