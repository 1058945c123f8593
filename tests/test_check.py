"""The command that tries a job before it starts: a sound job passes, and each fault is named with its ranks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.jobs import job_args
from tests.ranks import RankError, preload, run_ranks
from torchtitan_upipe import check, launch
from torchtitan_upipe.checks import memory as memory_check
from torchtitan_upipe.checks import run
from torchtitan_upipe.checks.report import Result
from torchtitan_upipe.checks.run import CHECKS, Bench, join_ranks, names_of_hosts, run_checks
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.kernels.sdpa import CpuFlashKernel
from torchtitan_upipe.kernels.visibility import Documents

preload("torchtitan_upipe.check")

Fault = Callable[[], None]


def checked(args: list[str], fault: Fault, ranks: tuple[int, ...], names: tuple[str, ...]) -> dict[str, Result]:
    """Run the checks ``names`` of a job on this rank, with ``fault`` if it is one of ``ranks``."""
    board = join_ranks(read_job(args))
    if board.rank in ranks:
        fault()
    bench = Bench(read_job(args), "", board)
    checks = [one for one in CHECKS if one.name in ("start", *names)]
    results = run_checks(bench, names_of_hosts(board), lambda _: None, lambda _: None, checks)
    return {result.name: result for result in results}


def results_of(
    folder: Path, fault: Fault, *names: str, world_size: int = 2, ranks: tuple[int, ...] = (1,), **options: object
) -> dict[str, Result]:
    settings: dict[str, object] = {"context_parallel__head_chunk": 4} | options
    args = job_args(folder, world_size, **settings)
    found: dict[str, Result] = run_ranks(checked, world_size, args, fault, ranks, names, init=False)[0]
    assert set(found) == {"start", *names}
    assert not found["start"].failures
    return found


def send_another_number() -> None:
    send = dist.all_to_all_single

    def corrupted(received: torch.Tensor, sent: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent = sent.clone()
        sent[0] += 1  # what goes to rank 0
        return send(received, sent, *args, **kwargs)

    dist.all_to_all_single = corrupted


def reduce_another_number() -> None:
    reduce = dist.reduce_scatter_tensor

    def corrupted(output: torch.Tensor, summands: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return reduce(output, torch.where(summands == 7, 8, summands), *args, **kwargs)

    dist.reduce_scatter_tensor = corrupted


@pytest.mark.parametrize("fault", [send_another_number, reduce_another_number])
def test_a_rank_that_sends_wrong_values_is_named(fault: Fault, tmp_path: Path) -> None:
    (*_, failure) = results_of(tmp_path, fault, "collectives")["collectives"].failures
    assert "values of rank 1 (" in failure
    assert "come wrong to rank" in failure
    kind = "all-to-all of keys: " if fault is send_another_number else "reduce-scatter of its gradients: "
    assert failure.startswith(kind)
    if fault is send_another_number:
        assert " to rank 0 (" in failure


def send_late() -> None:
    send = dist.batch_isend_irecv

    def late(operations: list[Any]) -> Any:
        time.sleep(0.12)
        return send(operations)

    dist.batch_isend_irecv = late


def test_a_slow_rank_is_named(tmp_path: Path) -> None:
    """Of four ranks' pairs half are slow then."""
    found = results_of(tmp_path, send_late, "links", world_size=4, ranks=(2,))["links"]
    assert len(found.failures) == 1
    assert found.failures[0].startswith("rank 2 (")
    assert "is slow to send and receive within a host" in found.failures[0]


def keep_verdict_of_a_rank_that_hangs(args: list[str], kept: str) -> None:
    """Rank 1 stays in an exchange until rank 0 has judged that."""
    run.PATIENCE = 3.0

    def stay(*args: Any, **kwargs: Any) -> None:
        while not Path(kept).exists():
            time.sleep(0.1)
        os._exit(0)

    def hang() -> None:
        dist.all_to_all_single = stay

    found = checked(args, hang, (1,), ("collectives", "attention kernel"))
    Path(f"{kept}.part").write_text(json.dumps({name: [r.measured, r.failures] for name, r in found.items()}))
    Path(f"{kept}.part").rename(kept)


def test_a_rank_that_hangs_is_named_and_waited_for_no_longer(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    with pytest.raises(RankError, match="rank 1 died without a word"):
        run_ranks(keep_verdict_of_a_rank_that_hangs, 2, job_args(tmp_path, 2), str(kept), init=False)
    found = json.loads(kept.read_text())
    assert any(
        failure.startswith("collectives did not end on rank 1 (")
        and "no word since 'all-to-all of queries' began" in failure
        for failure in found["collectives"][1]
    )
    assert found["attention kernel"] == ["not run, since the ranks did not come through what was before", []]


def fail_to_build() -> None:
    run.shorten = lambda *args: 1 / 0  # type: ignore[assignment, return-value]


def test_a_rank_that_fails_is_named_and_what_needs_all_ranks_left_out(tmp_path: Path) -> None:
    args = job_args(tmp_path, 2, context_parallel__head_chunk=4)
    found = run_ranks(checked, 2, args, fail_to_build, (0, 1), ("collectives", "disk"), init=False)[0]
    assert found["start"].failures[0].startswith("start did not end on ranks 0, 1 (")
    assert found["start"].failures[0].endswith("ZeroDivisionError: division by zero.")
    assert found["collectives"].measured.startswith("not run")
    assert found["disk"].measured.startswith("no checkpoints are asked for")


def be_wrong_about_keys() -> None:
    backward = CpuFlashKernel.backward

    def wrong(self: CpuFlashKernel, *args: Any, **kwargs: Any) -> Any:
        dq, dk, dv = backward(self, *args, **kwargs)
        return dq, dk * 1.1, dv

    CpuFlashKernel.backward = wrong  # type: ignore[method-assign]


def test_a_wrong_kernel_is_named_and_so_are_its_gradients(tmp_path: Path) -> None:
    options = {"training__mixed_precision_param": "bfloat16"}
    found = results_of(tmp_path, be_wrong_about_keys, "attention kernel", "two steps", **options)
    kernel, steps = found["attention kernel"].failures, found["two steps"].failures
    assert len(kernel) == 3  # causal, packed, a stretch of queries
    assert all("dk is off by 1.0e-01" in failure and "on rank 1 (" in failure for failure in kernel)
    assert "gradients of " in steps[0]
    assert ".attention.wk.weight, off by " in steps[0]
    assert "on ranks 0, 1 (" in steps[0]


def see_one_document() -> None:
    from torchtitan_upipe.titan import batch

    batch.documents_at = lambda marks: Documents(((0,),) * len(marks))


def test_a_leak_between_documents_is_named(tmp_path: Path) -> None:
    found = results_of(tmp_path, see_one_document, "causality", training__document_mask=True)["causality"]
    assert len(found.failures) == 1
    assert "logits change with a token that they must not see" in found.failures[0]


def have_little_host_memory() -> None:
    memory_check.host_memory_left = lambda: {"the container's limit": 2**20}


def test_too_little_host_memory_is_named(tmp_path: Path) -> None:
    found = results_of(tmp_path, have_little_host_memory, "memory", ranks=(0, 1))["memory"]
    assert len(found.failures) == 1
    assert found.failures[0].startswith("ranks 0, 1 (")
    assert "the container's limit leaves 0.000977 GiB" in found.failures[0]


def main(args: list[str]) -> int:
    launch.FIRST = 0.0
    return check.main(args)


def test_a_sound_job_passes(tmp_path: Path) -> None:
    """A hybrid, on packed documents whose sequences are padded."""
    options = {"training__document_mask": True, "training__seq_len": 255, "checkpoint__enable": True}
    args = job_args(tmp_path, 4, **options, context_parallel__ring_degree=2)
    assert run_ranks(main, 4, args, init=False) == [0] * 4
    verdict = json.loads((tmp_path / check.FILE).read_text())
    assert verdict["ok"] is True
    assert [found["name"] for found in verdict["checks"]] == [one.name for one in CHECKS]
    assert not any(found["failures"] for found in verdict["checks"])
    collectives = verdict["checks"][1]["measured"]
    for kind in ("all-to-all of queries", "ring of keys and values", "all-gather of a block's weights", "share a host"):
        assert kind in collectives


def nothing() -> None:
    """No fault."""


def test_chunks_of_the_sequence_pass_as_well(tmp_path: Path) -> None:
    options = {"context_parallel__method": "fpdt", "context_parallel__head_chunk": 0}
    chunk = {"context_parallel__sequence_chunk": 96, "training__document_mask": True}
    found = results_of(tmp_path, nothing, "collectives", "two steps", "causality", **options, **chunk)
    assert not any(result.failures for result in found.values())


def test_times_that_are_too_short_are_named_by_one_rank(tmp_path: Path) -> None:
    limits = ["--comm.train_timeout_seconds", "1", "--time_limit", "1", "--json", str(tmp_path / "verdict.json")]
    args = job_args(tmp_path, 1, training__global_batch_size=1000, context_parallel__head_chunk=4)
    assert run_ranks(main, 1, [*args, *limits], init=False) == [1]
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["ok"] is False
    failed = {found["name"]: found["failures"] for found in verdict["checks"] if found["failures"]}
    assert list(failed) == ["time"]
    timeout, limit = failed["time"]
    assert timeout.startswith("comm.train_timeout_seconds = 1 is less than 2 predicted steps of")
    assert limit.startswith("the job is ended in 1 s, needs ")
    assert not (tmp_path / check.FILE).exists()
