"""Files of a checkpoint: written with checksums, which come before what makes it count, and verified by all ranks.

torch's writer puts ``.metadata`` last, under its name once it is whole. Here that moment also comes after the
checksums, and a folder that is written a second time loses its old ``.metadata`` before anything else.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torchtitan.components.checkpoint import TRAIN_STATE
from torchtitan.tools.logging import logger

from torchtitan_upipe.job import steps
from torchtitan_upipe.job.steps import CHECKSUMS, METADATA, Checksum


class SummedStream:
    """A binary stream to which each byte is written once, in order: it keeps their checksum."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.sum = Checksum(0, 0)
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        """As the stream does; its error is kept, which torch's archive writer replaces by one of its own."""
        try:
            written: int = self.stream.write(data)
        except OSError as error:
            self.failure = error
            raise
        self.sum = Checksum(self.sum.size + written, zlib.crc32(data, self.sum.crc32 or 0))
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class SummedFiles(FileSystem):
    """Torch's files, with the checksum of each that was written, by its name."""

    def __init__(self) -> None:
        self.sums: dict[str, Checksum] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """As torch's; what goes wrong is the disk's error where there is one."""
        with super().create_stream(path, mode) as raw:
            stream = SummedStream(raw)
            try:
                yield stream
            except Exception as error:
                raise stream.failure or error from None
        self.sums[Path(path).name] = stream.sum

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """What has been written becomes a checkpoint: the checksums are there first."""
        target = Path(new_path)
        self.sums[target.name] = self.sums.pop(Path(path).name)
        steps.write_checksums(target.parent, self.sums)
        super().rename(path, new_path)
        steps.sync(target.parent)


class WrittenFiles(list[WriteResult]):
    """What a rank has written, on its way to the first one, with the checksums of its files."""

    sums: dict[str, Checksum]


class CheckpointWriter(FileSystemWriter):
    """Torch's writer of a folder, with checksums.

    Args:
        folder: of the checkpoint.
        beside: writes what else stands in that folder; called on the first rank, whose errors all ranks hear of.
    """

    def __init__(self, folder: Path, beside: Callable[[], None] | None = None) -> None:
        super().__init__(folder)
        self.fs: SummedFiles = SummedFiles()
        self.beside = beside

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """No warning of a checkpoint that is there already: the first rank clears it away."""
        self.fs.mkdir(self.path)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the first rank, before any of them writes."""
        steps.clear(Path(self.path))
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This rank's files."""
        written = WrittenFiles(super().write_data(plan, planner).wait())
        written.sums = self.fs.sums
        done: Future[list[WriteResult]] = Future()
        done.set_result(written)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, once all have written."""
        for written in results:
            assert isinstance(written, WrittenFiles)
            self.fs.sums |= written.sums
        if self.beside is not None:
            self.beside()
        super().finish(metadata, results)


def verify(checkpoint: Path) -> None:
    """Compare the files of ``checkpoint`` with their checksums; each rank reads a share, and all end alike.

    Weights of Hugging Face's format that another program wrote have none, and pass.

    Raises:
        ValueError: files are damaged or missing; it names the newest checkpoint beside this one that is good.
    """
    began = time.monotonic()
    found = _damage(checkpoint)
    if not found:
        size = sum(was.size for was in _sums(checkpoint)[0].values())
        if (checkpoint / CHECKSUMS).is_file():
            logger.info(f"Verified {size / 2**30:.2f} GiB of {checkpoint} in {time.monotonic() - began:.1f} seconds")
        elif (checkpoint / METADATA).is_file():
            logger.info(f"{checkpoint} was written without checksums: only the sizes of its files were compared.")
        return
    others = [path for path in reversed(steps.steps(checkpoint.parent).values()) if path.name != checkpoint.name]
    good = next((path for path in others if (path / METADATA).is_file() and not _damage(path) and _is_full(path)), None)
    remedy = "no other checkpoint beside it is good"
    if good is not None:
        remedy = f"the newest good one is {good.name} (checkpoint.load_step = {good.name.removeprefix('step-')})"
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    raise ValueError(f"checkpoint {checkpoint} is damaged: {found[0]}{more}; {remedy}.")


def _is_full(checkpoint: Path) -> bool:
    """Whether a job can go on from it: the last one of a job may hold a model alone."""
    names = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return any(name.startswith(f"{TRAIN_STATE}.") for name in names)


def _damage(checkpoint: Path) -> list[str]:
    """What is wrong, the same list on all ranks."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sums, found = _sums(checkpoint)
    found += steps.damage(checkpoint, sums, sorted(sums)[rank::ranks])
    if ranks == 1:
        return found
    gathered: list[list[str]] = [[]] * ranks
    dist.all_gather_object(gathered, found)
    return sorted({text for texts in gathered for text in texts})


def _sums(checkpoint: Path) -> tuple[dict[str, Checksum], list[str]]:
    """The checksums that were kept, else the sizes that ``.metadata`` knows; or what is wrong with these."""
    try:
        sums = steps.read_checksums(checkpoint)
    except ValueError as error:
        return {}, [str(error)]
    if sums or not (checkpoint / METADATA).is_file():
        return sums, []
    try:
        stored = FileSystemReader(checkpoint).read_metadata().storage_data.values()
        sizes: dict[str, int] = {}
        for place in stored:
            sizes[place.relative_path] = max(sizes.get(place.relative_path, 0), place.offset + place.length)
    except Exception as error:  # whatever unpickling meets in a damaged file
        return {}, [f"its {METADATA} cannot be read ({error})"]
    return {name: Checksum(size, None) for name, size in sizes.items()}, []
