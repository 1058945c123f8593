"""What the findings of all ranks come to: every check's verdict, on findings written down here."""

from __future__ import annotations

import shutil
import subprocess
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from tests.jobs import ROOT, job_args
from torchtitan_upipe import check
from torchtitan_upipe.checks import disk, host
from torchtitan_upipe.checks.board import Board, Missing
from torchtitan_upipe.checks.collectives import Found, judge_collectives
from torchtitan_upipe.checks.disk import DiskFound, checkpoint_bytes, judge_disk, measure_disk
from torchtitan_upipe.checks.host import host_memory_left, process_memory_left
from torchtitan_upipe.checks.limits import LimitsFound, judge_limits, seconds_left
from torchtitan_upipe.checks.links import judge_links
from torchtitan_upipe.checks.memory import MemoryFound, judge_memory
from torchtitan_upipe.checks.report import Hosts, Result, slow_ones
from torchtitan_upipe.checks.short import draw_batch, shorten
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.job.shape import job_shape
from torchtitan_upipe.memory.prediction import GIB

HOSTS = Hosts(["a", "a", "b", "b"])


def test_ranks_are_named_with_their_hosts() -> None:
    assert HOSTS.of([3]) == "rank 3 (b)"
    assert HOSTS.of([2, 0, 1, 1]) == "ranks 0, 1 (a) and 2 (b)"
    assert not HOSTS.together([1, 2])
    assert HOSTS.together([2, 3])


def test_every_sender_of_wrong_values_is_named() -> None:
    def found(*wrong: int) -> list[Found]:
        return [Found("all-to-all of queries", (0, 1, 2, 3), 2**22, 0.25, list(wrong), 0.001)]

    verdict = judge_collectives([found(3), found(), found(3, 0), found()], HOSTS)
    assert verdict.failures == [
        "all-to-all of queries: values of rank 0 (a) come wrong to rank 2 (b).",
        "all-to-all of queries: values of rank 3 (b) come wrong to ranks 0 (a) and 2 (b).",
    ]
    assert "4.19 GB/s at 4 MiB (the job's are of 16)" in verdict.measured
    assert verdict.measured.endswith("the all-to-all's 4 ranks do not share a host")


def links(slow: dict[tuple[int, int], float]) -> list[dict[tuple[int, int], float]]:
    """Seconds of all pairs, by receiver: 1 within a host, 10 across hosts."""
    return [
        {
            (sender, receiver): slow.get((sender, receiver), 1.0 if HOSTS.together([sender, receiver]) else 10.0)
            for sender in range(4)
            if sender != receiver
        }
        for receiver in range(4)
    ]


def test_slow_pairs_are_told_within_and_across_hosts_apart() -> None:
    assert judge_links(links({}), HOSTS).failures == []
    failures = judge_links(links({(0, 2): 100.0, (1, 0): 9.0}), HOSTS).failures
    assert len(failures) == 2
    assert failures[0].startswith("rank 1 (a) sends slowly to rank 0 (a): ")
    assert failures[1].startswith("rank 0 (a) sends slowly to rank 2 (b): ")


def test_a_slow_rank_is_named_once() -> None:
    slow = {(0, rank): 99.0 for rank in (2, 3)} | {(rank, 0): 99.0 for rank in (2, 3)}
    (failure,) = judge_links(links(slow), HOSTS).failures
    assert failure.startswith("rank 0 (a) is slow to send and receive across hosts: ")
    assert slow_ones({0: 1.0, 1: 9.0}) == []  # of two neither is usual


def memory(measured: int = 100, host_need: int = GIB, left: int = 8 * GIB, **more: object) -> MemoryFound:
    found = MemoryFound(100 * 2**20, measured * 2**20, GIB, host_need, GIB, "use more ranks")
    found.left = {"MemAvailable": left}
    for name, value in more.items():
        setattr(found, name, value)
    return found


def test_memory_is_summed_by_host() -> None:
    few = memory(host_need=5 * GIB)
    verdict = judge_memory([memory(), memory(), few, memory(host_need=4 * GIB, refused="no memory")], HOSTS)
    assert verdict.failures == [
        "ranks 2, 3 (b) need 9 GiB of host memory together and MemAvailable leaves 8 GiB; use more ranks.",
        "host memory cannot be had on rank 3 (b): no memory.",
    ]
    (more,) = judge_memory([memory(), memory(measured=120), memory(), memory()], HOSTS).failures
    assert more.startswith("a short step takes 120 MiB, and by the ledger 100, on rank 1 (a)")
    (limit,) = judge_memory([memory(own_left={"ulimit -v": GIB // 2}), *[memory()] * 3], HOSTS).failures
    assert limit.startswith("rank 0 (a) may take 0.50 GiB by ulimit -v and need 1.00 GiB")


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of any group above this process's, and what files have cached does not."""
    monkeypatch.setattr(host, "ROOT", tmp_path)
    for path, text in {
        "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n",
        "proc/self/cgroup": "0::/jobs/one\n",
        "proc/self/status": "VmSize: 100 kB\n",
        "sys/fs/cgroup/jobs/one/memory.max": "max\n",
        "sys/fs/cgroup/jobs/memory.max": "5000\n",
        "sys/fs/cgroup/jobs/memory.current": "3000\n",
        "sys/fs/cgroup/jobs/memory.stat": "anon 1\ninactive_file 1000\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert host_memory_left() == {"MemAvailable": 8000 * 1024, "the container's limit": 3000}
    monkeypatch.setattr(host.resource, "getrlimit", lambda kind: (200 * 1024, -1))
    assert process_memory_left() == {"ulimit -v": 100 * 1024, "ulimit -d": 200 * 1024}


def test_room_for_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_args(tmp_path / "new", 1, checkpoint__enable=True, checkpoint__interval=4, training__steps=10)
    config = read_job(job, 1)
    shape = job_shape(config, 1)
    saves, need = checkpoint_bytes(config, shape)  # after steps 4 and 8, then the model alone
    assert (saves, need) == (3, (2 * 3 + 1) * 4 * shape.own_elements)
    config.checkpoint.keep_latest_k = 1
    assert checkpoint_bytes(config, shape) == (2, (3 + 1) * 4 * shape.own_elements)

    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: SimpleNamespace(free=need // 2))
    found = measure_disk(config, shape, lambda doing: None)
    assert found.folder == str(tmp_path)
    assert found.seconds > 0
    assert list(tmp_path.iterdir()) == []
    enough = DiskFound(found.folder, 8 * GIB, found.need, found.saves, 0.1)
    (failure,) = judge_disk([enough, enough, found, enough], HOSTS).failures
    assert f"{tmp_path} has 0.0" in failure
    assert "the job's 2 checkpoints take 0.0" in failure
    assert ", on rank 2 (b); lower checkpoint.keep_latest_k" in failure

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.tempfile, "TemporaryFile", full)
    (failure,) = judge_disk([measure_disk(config, shape, lambda doing: None)], Hosts(["a"])).failures
    assert failure == f"{tmp_path} cannot be written to (No space left on device) on rank 0 (a)."
    assert shutil.disk_usage(tmp_path).free == need // 2  # as patched: what is measured is what is reported


@pytest.mark.parametrize(
    "said, seconds", [("90", 90.0), ("2:00", 120.0), ("1:00:05", 3605.0), ("2-00:00:00", 172800.0), ("", None)]
)
def test_time_limits_are_written_as_slurms(said: str, seconds: float | None) -> None:
    assert seconds_left(said, {}, 0.0) == seconds


def test_slurms_end_counts_unless_the_option_is_given() -> None:
    assert seconds_left("", {"SLURM_JOB_END_TIME": "1000"}, 400.0) == 600.0
    assert seconds_left("5", {"SLURM_JOB_END_TIME": "1000"}, 400.0) == 5.0
    with pytest.raises(ValueError, match="--time-limit tomorrow is no time; write seconds"):
        seconds_left("tomorrow", {}, 0.0)


def limits(**more: float | None) -> LimitsFound:
    values = {"step": 100.0, "save": 20.0, "timeout": 300.0, "left": None, "steps": 50, "first_save": 10, "saves": 5}
    return LimitsFound(how="by hand", **(values | more))  # type: ignore[arg-type]


def test_limits_of_time() -> None:
    assert judge_limits([limits()], HOSTS).failures == []
    (timeout,) = judge_limits([limits(timeout=100.0)], HOSTS).failures
    assert timeout.endswith("and would end the job on all ranks; set it to 200 or more.")
    assert "2 predicted saves of 200 s" in judge_limits([limits(save=200.0)], HOSTS).failures[0]
    assert judge_limits([limits(left=1020.0)], HOSTS).failures == []
    (early,) = judge_limits([limits(left=5000.0), limits(left=1000.0)], HOSTS).failures
    assert early.startswith("the job is ended in 1,000 s and its first save, after step 10, is done after 1,020 s")
    (unsaved,) = judge_limits([limits(left=4000.0, first_save=None, saves=0)], HOSTS).failures
    assert unsaved.startswith("the job is ended in 4,000 s, needs 5,000 s and saves nothing")


def test_a_board_names_who_is_missing_and_what_it_was_at() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=1))
    first, second = (Board(rank, 2, 0.1, store) for rank in range(2))
    first.put("x", {"a": 1})
    second.mark("reading")
    found = first.all("x")
    assert found[0] == {"a": 1}
    assert isinstance(found[1], Missing)
    assert found[1].at == "reading"
    second.put("x", [2])
    assert first.all("x") == [{"a": 1}, [2]]


def test_a_verdict_is_a_line_and_a_sentence_for_each_failure() -> None:
    assert check.spell(Result("disk", "much", [], 0.1)) == "ok     disk (0.1 s): much"
    assert check.spell(Result("disk", "little", ["It is full."], 2)).endswith("\n       - It is full.")


@pytest.mark.parametrize(
    "word, sentence",
    [("--time_limit=soon", "--time-limit soon is no time"), ("--training.seq_len=1", "training.seq_len = 1")],
)
def test_what_is_refused_ends_in_its_sentence(
    word: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert check.main([*job_args(tmp_path, 2), word]) == 1
    assert f"ValueError: {sentence}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option, module", [(["--check"], "check"), ([], "train")])
def test_launch_script_checks_if_it_is_asked(option: list[str], module: str, tmp_path: Path) -> None:
    (tmp_path / "torchrun").write_text('#!/bin/bash\necho "$*"\n')
    (tmp_path / "torchrun").chmod(0o755)
    command = ["bash", str(ROOT / "scripts/launch.sh"), *option, "job.toml", "--training.steps", "3"]
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    said = subprocess.run(command, env=path, capture_output=True, text=True, check=True).stdout
    assert said.strip().endswith(f"-m torchtitan_upipe.{module} --job.config_file job.toml --training.steps 3")


def test_a_model_too_wide_for_this_machine_is_narrowed(tmp_path: Path) -> None:
    """Its heads, which the schedule is made of, stay."""
    assets = ROOT / "torchtitan_upipe/assets/tokenizer"
    words = ["--job.config_file", ROOT / "train_configs/llama3_8b_1m.toml", "--model.hf_assets_path", assets]
    config = read_job([*map(str, words), "--training.dataset", "stdlib"], 8)
    config.context_parallel.head_chunk = 8
    short = shorten(config, 8)
    wide, narrow = job_shape(config, 8).model, job_shape(short.config, 8).model
    assert (narrow.heads, narrow.kv_heads, narrow.layers) == (wide.heads, wide.kv_heads, 2)
    assert (narrow.head_dim, narrow.dim) == (16, 512)
    assert short.said.startswith("2 of 32 layers, 256 of 1,048,576 tokens, heads of 16 and a model of 512")
    assert config.model.flavor == "8B"


def test_packed_batches_have_labels_that_are_ignored() -> None:
    batch = draw_batch(2, 64, 100, documents=True, seed=0)
    assert batch.starts.sum(dim=1).tolist() == [3, 3]
    assert (batch.labels == -100).sum() == 4
    assert torch.equal(
        batch.tokens[:, 1:][batch.labels[:, :-1] != -100], batch.labels[:, :-1][batch.labels[:, :-1] != -100]
    )
    changed = batch.changed(9, 100)
    assert (changed.tokens != batch.tokens).nonzero().tolist() == [[0, 9], [1, 9]]
