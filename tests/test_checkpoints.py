"""A checkpoint is whole or none: interrupted, damaged and unwritable ones, and which of them are kept."""

from __future__ import annotations

import os
import queue
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from tests.job_ranks import JobRanks
from tests.jobs import job_args, read_log
from tests.ranks import RankError, run_ranks
from torchtitan_upipe.export import main as export
from torchtitan_upipe.job.steps import CHECKSUMS, finished_steps, is_finished, read_checksums
from torchtitan_upipe.titan.checkpoint import Checkpoints
from torchtitan_upipe.titan.checkpoint_files import CheckpointWriter, SummedStream, verify

JOB = {
    "training__seq_len": 64,
    "training__steps": 4,
    "checkpoint__interval": 1,
    "checkpoint__keep_latest_k": 2,
    "checkpoint__last_save_model_only": False,
}


def last_words(args: list[str], limit_from: int = 0) -> tuple[int, list[str]]:
    """Exit code and lines of standard error of a job; from step ``limit_from`` on no file takes more than 64 KiB."""
    from torchtitan_upipe.train import main

    def save_limited(self: Checkpoints, curr_step: int, last_step: bool = False) -> None:
        if curr_step == limit_from:
            self.wait()  # the one before is to be whole
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
        unlimited(self, curr_step, last_step)

    unlimited, (_, hard) = Checkpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE)
    Checkpoints.save = save_limited  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryFile("w+") as errors:
            with redirect_stderr(errors):
                code = main(args)
            errors.seek(0)
            return code, errors.read().splitlines()
    finally:
        Checkpoints.save = unlimited  # type: ignore[method-assign]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.fixture(scope="module")
def ranks() -> Iterator[JobRanks]:
    with JobRanks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def saved(ranks: JobRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps on two ranks, in a folder that has leftovers of other jobs; its checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    for name in ("step-1/__7_0.distcp", "step-4/__7_0.distcp", "old-step-9/.metadata", "step-8-copy/.metadata"):
        (folder / "checkpoint" / name).parent.mkdir(parents=True)
        (folder / "checkpoint" / name).write_text("an earlier job's")
    assert ranks(last_words, job_args(folder, 2, "--checkpoint.enable", **JOB)) == [(0, [])] * 2
    assert len(read_log(folder).loss) == 4
    return folder / "checkpoint"


def test_the_newest_finished_steps_are_kept(saved: Path) -> None:
    assert finished_steps(saved) == [2, 3, 4]  # two before the last one, which TorchTitan saves without deleting
    assert not (saved / "step-1").exists()
    assert sorted(f.name for f in (saved / "step-4").glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]
    assert sorted(read_checksums(saved / "step-4")) == [".metadata", "__0_0.distcp", "__1_0.distcp"]


@pytest.mark.parametrize(
    "finished, interrupted, now, left",
    [
        ([1, 2, 3], [], 3, [2, 3]),
        ([1, 2], [3], 3, [1, 2, 3]),  # 3 is being written
        ([1, 4], [2, 3], 4, [1, 4]),  # TorchTitan would keep 3 and 4
        ([2, 3, 8, 9], [], 3, [2, 3, 8, 9]),  # TorchTitan would delete 3, just written, for an abandoned 8 and 9
    ],
)
def test_what_is_deleted(
    finished: list[int],
    interrupted: list[int],
    now: int,
    left: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    for step in finished + interrupted:
        (tmp_path / f"step-{step}").mkdir()
    for step in finished:
        (tmp_path / f"step-{step}" / ".metadata").touch()
    manager = Checkpoints.__new__(Checkpoints)
    manager.enable, manager.folder, manager.keep_latest_k = False, str(tmp_path), 2
    manager._newest, manager.purge_queue = now, queue.Queue()
    manager._purge_stale_checkpoints()
    while not manager.purge_queue.empty():
        path = Path(manager.purge_queue.get())
        assert not is_finished(path)  # from before its files go, which takes a while
        shutil.rmtree(path)
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == left


# --- damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x40
    path.write_bytes(data)


def damaged(saved: Path, folder: Path) -> Path:
    shutil.copytree(saved / "step-3", folder / "checkpoint/step-3")
    shutil.copytree(saved / "step-4", folder / "checkpoint/step-4")
    return folder / "checkpoint/step-4"


GOOD = r"; the newest good one is step-3 \(checkpoint.load_step = 3\)\.$"


def test_damage_is_named_with_the_newest_good_step(saved: Path, tmp_path: Path) -> None:
    step = damaged(saved, tmp_path)
    verify(step)
    shard = step / "__1_0.distcp"
    whole = shard.read_bytes()
    flip(shard, len(whole) // 2)
    with pytest.raises(ValueError, match=rf"step-4 is damaged: __1_0.distcp does not match its checksum{GOOD}"):
        verify(step)
    shard.write_bytes(whole[:-1])
    sizes = rf"__1_0.distcp has {len(whole) - 1} bytes, of {len(whole)} that were written"
    with pytest.raises(ValueError, match=rf"{sizes}{GOOD}"):
        verify(step)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"__1_0.distcp is missing{GOOD}"):
        verify(step)
    flip(step / ".metadata", 1000)
    with pytest.raises(ValueError, match=rf".metadata does not match its checksum \(and 1 more\){GOOD}"):
        verify(step)
    (step / CHECKSUMS).write_text('{".metadata": 5}')
    with pytest.raises(ValueError, match=rf"{CHECKSUMS} cannot be read{GOOD}"):
        verify(step)
    flip(step.parent / "step-3" / "__0_0.distcp", 5000)
    with pytest.raises(ValueError, match="no other checkpoint beside it is good"):
        verify(step)


def test_a_checkpoint_without_checksums_is_still_looked_at(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    step = damaged(saved, tmp_path)
    (step / CHECKSUMS).unlink()
    with caplog.at_level("INFO"):
        verify(step)
    assert [r.message for r in caplog.records if "without checksums" in r.message] == [
        f"{step} was written without checksums: only the sizes of its files were compared."
    ]
    os.truncate(step / "__0_0.distcp", 100)
    with pytest.raises(ValueError, match=rf"__0_0.distcp has 100 bytes, of \d+ that were written{GOOD}"):
        verify(step)
    os.truncate(step / ".metadata", 100)
    with pytest.raises(ValueError, match=rf"its .metadata cannot be read \(.*\){GOOD}"):
        verify(step)


def test_a_job_does_not_go_on_from_flipped_bits(ranks: JobRanks, saved: Path, tmp_path: Path) -> None:
    """Each rank reads a share of the files; all end with the same sentence."""
    step = damaged(saved, tmp_path)
    flip(step / "__1_0.distcp", 100_000)
    args = job_args(tmp_path, 2, "--checkpoint.enable", **JOB | {"training__steps": 6})
    words = (
        f"ValueError: checkpoint {step} is damaged: __1_0.distcp does not match its checksum; the newest good one is"
    )
    for code, lines in ranks(last_words, args):
        assert (code, len(lines)) == (1, 1)
        assert lines[0].startswith(words)
    assert not (tmp_path / "checkpoint/step-5").exists()


def test_the_export_command_verifies(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = damaged(saved, tmp_path)
    flip(step / "__0_0.distcp", 100_000)
    assert export([str(step), "--to", str(tmp_path / "hf")]) == 1
    assert "is damaged: __0_0.distcp does not match its checksum; the newest good one" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    assert export([str(step.parent / "step-3"), "--to", str(tmp_path / "hf")]) == 0
    verify(tmp_path / "hf")
    flip(tmp_path / "hf/model.safetensors", 100_000)
    with pytest.raises(ValueError, match=r"is damaged: model.safetensors does not match its checksum; no other"):
        verify(tmp_path / "hf")


# --- saves that do not end -------------------------------------------------------------------------------------------


def save_twice(folder: str, dies: bool) -> None:
    rank = torch.distributed.get_rank()
    weights = {f"weight{rank}": torch.full((1000,), float(rank))}
    save(weights, storage_writer=CheckpointWriter(Path(folder)))
    if dies and rank == 1:
        SummedStream.write = lambda self, data: os._exit(9)  # type: ignore[assignment, method-assign]
    save(weights, storage_writer=CheckpointWriter(Path(folder)))


def test_a_save_that_is_killed_leaves_no_checkpoint(tmp_path: Path) -> None:
    """Nor the whole one that was there before under the same step, whose shards are half overwritten."""
    run_ranks(save_twice, 2, str(tmp_path / "step-1"), False)
    assert finished_steps(tmp_path) == [1]
    with pytest.raises(RankError):
        run_ranks(save_twice, 2, str(tmp_path / "step-2"), True)
    assert (tmp_path / "step-2" / "__1_0.distcp").exists()
    assert finished_steps(tmp_path) == [1]


@pytest.mark.parametrize(
    "step, options",
    [
        (2, {"checkpoint__async_mode": "disabled"}),
        (2, {"checkpoint__async_mode": "async"}),
        (4, {"checkpoint__last_save_in_hf": True, "checkpoint__last_save_model_only": True}),
    ],
    ids=["disabled", "async", "hf"],
)
def test_a_full_disk_is_a_sentence(ranks: JobRanks, step: int, options: dict[str, object], tmp_path: Path) -> None:
    """Files that take no more bytes, which is as real as a full disk; the last whole checkpoint stays."""
    args = job_args(tmp_path, 2, "--checkpoint.enable", **JOB | options)
    for code, lines in ranks(last_words, args, step):
        assert (code, len(lines)) == (1, 1)
        kind = "model" if step == 4 else "checkpoint"
        assert lines[0].startswith(f"OSError: {kind} {tmp_path}/checkpoint/step-{step} could not be written (")
        assert "File too large" in lines[0]
        assert ("are as they were" if step == 4 else "the last whole one is step-1.") in lines[0]
    assert not (tmp_path / f"checkpoint/step-{step}").exists()
    verify(tmp_path / f"checkpoint/step-{step - 1}")


def test_an_asynchronous_save_is_that_of_its_step(ranks: JobRanks, saved: Path, tmp_path: Path) -> None:
    """To the byte, whatever the steps after it do to the weights meanwhile."""
    args = job_args(tmp_path, 2, "--checkpoint.enable", **JOB, checkpoint__async_mode="async")
    assert ranks(last_words, args) == [(0, [])] * 2
    assert finished_steps(tmp_path / "checkpoint") == [1, 2, 3, 4]  # at step 3 two were finished, and stayed
    assert read_log(tmp_path) == read_log(saved.parent)
    for step in (2, 3):
        sums = read_checksums(tmp_path / f"checkpoint/step-{step}"), read_checksums(saved / f"step-{step}")
        for name in ("__0_0.distcp", "__1_0.distcp"):
            assert sums[0][name] == sums[1][name]
