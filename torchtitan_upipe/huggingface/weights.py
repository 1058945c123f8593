"""Weights as Transformers saves them: one file of safetensors, or an index and files of ordinary size."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from torchtitan_upipe.job.steps import INDEX, SINGLE, Checksum, checksum_of, sync, write_checksums

FILE_BYTES = 5 * 10**9


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
) -> None:
    """Write weights into ``folder``, one file's at a time in memory.

    A file gets its name when it is whole, and the index, or the only file, comes last, after the checksums: what was
    ended halfway is no model.

    Args:
        sizes: bytes of every weight, by its name.
        fetch: the weights of a file, in host memory, in the order of ``sizes``.
        limit: bytes of a file, unless one weight is larger.
    """
    files = split(sizes, limit)
    place: dict[str, str] = {}
    sums: dict[str, Checksum] = {}

    def settle(file: str, last: bool) -> None:
        """Let a whole file have its name."""
        partial = folder / f"{file}.partial"
        sync(partial)
        sums[file] = checksum_of(partial)
        if last:
            write_checksums(folder, sums)
        partial.replace(folder / file)

    for number, names in enumerate(files, 1):
        file = SINGLE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        weights = {name: weight.contiguous() for name, weight in fetch(names).items()}
        save_file(weights, folder / f"{file}.partial", {"format": "pt"})
        settle(file, last=len(files) == 1)
        place |= dict.fromkeys(names, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": place}
        (folder / f"{INDEX}.partial").write_text(json.dumps(index, indent=2) + "\n")
        settle(INDEX, last=True)
