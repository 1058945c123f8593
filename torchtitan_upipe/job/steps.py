"""What a folder of checkpoints holds: finished steps, and checksums that tell whether their files are what was written.

A checkpoint is finished when it has one of ``MARKS``, which is written last, after the checksums, and removed first.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

METADATA = ".metadata"  # of torch's format
SINGLE = "model.safetensors"  # Hugging Face's: one file,
INDEX = "model.safetensors.index.json"  # or several
MARKS = (METADATA, SINGLE, INDEX)
CHECKSUMS = "checksums.json"
LEFTOVERS = ("*.distcp", "*.safetensors", "*.tmp", "*.partial", CHECKSUMS)
READ_BYTES = 2**24


@dataclass(frozen=True)
class Checksum:
    """A file as it was written: its bytes and their CRC-32, None where only the size is known."""

    size: int
    crc32: int | None


def steps(folder: Path) -> dict[int, Path]:
    """The folders ``step-N`` in ``folder``, finished or not, by N."""
    found = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match and path.is_dir()))


def is_finished(checkpoint: Path) -> bool:
    """Whether its last file was written: it may have been damaged since."""
    return any((checkpoint / mark).is_file() for mark in MARKS)


def finished_steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in ``folder``, rising."""
    return [step for step, path in steps(folder).items() if is_finished(path)]


def unfinish(checkpoint: Path) -> None:
    """Take away what makes ``checkpoint`` count as finished, before any of its files goes."""
    for mark in MARKS:
        (checkpoint / mark).unlink(missing_ok=True)


def clear(checkpoint: Path) -> None:
    """Remove what an earlier save has left in ``checkpoint``, so that no other's file is taken for one of this one."""
    unfinish(checkpoint)
    for pattern in LEFTOVERS:
        for file in checkpoint.glob(pattern):
            file.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checksums(checkpoint: Path, sums: Mapping[str, Checksum]) -> None:
    """Keep the checksums of files by name; they are on the disk when this returns."""
    text = json.dumps({name: asdict(checksum) for name, checksum in sorted(sums.items())}, indent=1)
    partial = checkpoint / f"{CHECKSUMS}.partial"
    partial.write_text(text + "\n")
    sync(partial)
    partial.replace(checkpoint / CHECKSUMS)


def read_checksums(checkpoint: Path) -> dict[str, Checksum]:
    """Those of :func:`write_checksums`; empty where none were kept.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        values = json.loads((checkpoint / CHECKSUMS).read_text())
        return {name: Checksum(value["size"], value["crc32"]) for name, value in values.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{CHECKSUMS} cannot be read") from error


def checksum_of(path: Path) -> Checksum:
    """Of a file as it is now."""
    crc, size = 0, 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(READ_BYTES):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return Checksum(size, crc)


def damage(checkpoint: Path, sums: Mapping[str, Checksum], names: Iterable[str]) -> list[str]:
    """What is wrong with the files ``names``, a part of a sentence each."""
    found = []
    for name in names:
        path, was = checkpoint / name, sums[name]
        if not path.is_file():
            found.append(f"{name} is missing")
        elif (size := path.stat().st_size) != was.size:
            found.append(f"{name} has {size} bytes, of {was.size} that were written")
        elif was.crc32 is not None and checksum_of(path) != was:
            found.append(f"{name} does not match its checksum")
    return found
