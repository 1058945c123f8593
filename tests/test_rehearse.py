"""Meters of a real run, and the rehearsal of one rank without the others."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import measured, rehearse
from benchmarks.local_group import join_alone
from tests.jobs import job_args
from tests.ranks import run_ranks
from torchtitan_upipe.cp.collectives import HeadExchange, RingExchange
from torchtitan_upipe.dry_run import peak
from torchtitan_upipe.job.read import read_job

MIB = 2**20


def measure(args: list[str], warmup: int, steps: int) -> list[measured.RankMeasurement]:
    return measured.run(read_job(args), warmup, steps)


def run_short_of_memory(args: list[str]) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 512 * MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with pytest.raises((RuntimeError, MemoryError)):
        measured.main(args)


def test_a_job_out_of_memory_says_so(tmp_path: Path) -> None:
    args = job_args(tmp_path, 1, training__seq_len=1024, training__local_batch_size=64)
    result = tmp_path / "result.json"
    run_ranks(run_short_of_memory, 1, ["--result", str(result), "--warmup", "0", "--steps", "1", *args], init=False)
    outcome = json.loads(result.read_text())
    assert outcome["status"] == "OOM", outcome
    assert outcome["config"]["training"]["local_batch_size"] == 64


def test_the_cpu_meter_sees_what_is_live() -> None:
    before, resized = torch.empty(3 * MIB, dtype=torch.uint8), torch.empty(5 * MIB, dtype=torch.uint8)
    resized.untyped_storage().resize_(0)  # as FSDP2 leaves its gathered weights between steps
    meter = peak.CpuMeter()
    with meter.watch():
        meter.mark("start")
        a = torch.empty(MIB, dtype=torch.uint8)
        meter.mark("a")
        b = torch.empty(2 * MIB, dtype=torch.uint8)
        b.untyped_storage().resize_(0)
        meter.mark("b came and went")
        resized.untyped_storage().resize_(5 * MIB)
        meter.mark("gathered")
        del before
        c = torch.empty(MIB, dtype=torch.uint8)
        meter.mark("before went, c came")
    (_, start), *marks = meter.marks
    assert [(name, live - start) for name, live in marks] == [
        ("a", MIB),
        ("b came and went", MIB),
        ("gathered", 6 * MIB),
        ("before went, c came", 4 * MIB),
    ]
    assert meter.peak - start == 6 * MIB
    assert peak.storage_bytes([a, a[5:], c]) == 2 * MIB


def collectives() -> dict[str, Any]:
    join_alone(1, 4)
    shard = torch.arange(3.0)
    gathered, summed = torch.empty(12), torch.empty(3)
    dist.all_gather_into_tensor(gathered, shard)
    dist.reduce_scatter_tensor(summed, torch.arange(12.0))
    objects: list[Any] = [None] * 4
    dist.all_gather_object(objects, "x")
    exchange, ring = HeadExchange(dist.group.WORLD), RingExchange(dist.group.WORLD)
    pieces = [torch.full((1, 6, count, 2), float(count)) for count in (2, 1, 1, 0)]  # heads per rank
    heads = exchange.to_heads(pieces)
    ring.start([shard, shard + 1])
    return {
        "gathered": gathered.tolist(),
        "summed": summed.tolist(),
        "objects": objects,
        "heads": heads.shape,
        "finite": bool(heads.isfinite().all()),
        "back": [tuple(piece.shape) for piece in exchange.to_sequence(heads, (2, 1, 1, 0))],
        "ring": [t.tolist() for t in ring.finish()],
        "norm": dist.get_rank(),
    }


def test_collectives_of_one_rank_alone() -> None:
    result = run_ranks(collectives, 1, init=False)[0]
    assert result["gathered"] == [0, 1, 2] * 4
    assert result["summed"] == [3, 4, 5]
    assert result["objects"] == ["x"] * 4
    assert result["heads"] == (1, 24, 1, 2)
    assert result["finite"]
    assert result["back"] == [(1, 6, 2, 2), (1, 6, 1, 2), (1, 6, 1, 2), (1, 6, 0, 2)]
    assert result["ring"] == [[0, 1, 2], [1, 2, 3]]
    assert result["norm"] == 1


def rehearsal(args: list[str], world_size: int, layers: int, warmup: int = 1) -> rehearse.Rehearsal:
    return rehearse.rehearse(args, world_size - 1, world_size, layers, warmup, steps=1)


def debug_job(folder: Path, method: str, checkpointing: str) -> list[str]:
    """Two ranks, four layers."""
    options = {"model__flavor": "debug", "training__seq_len": 512, "activation_checkpoint__mode": checkpointing}
    return job_args(folder, 2, context_parallel__method=method, **options)


def test_a_rehearsal_needs_what_the_real_rank_needs(tmp_path: Path) -> None:
    """Two of four layers alone, extrapolated, against the real job, whose gloo threads hold buffers a while longer."""
    args = debug_job(tmp_path, "ring", "none")
    real = min(rank.peak_device for rank in run_ranks(measure, 2, args, 0, 1, init=False)[0])
    result = tmp_path / "rehearsal.jsonl"
    command = ["--rank", "1", "--world-size", "2", "--layers", "2", "--result", str(result), *args]
    assert run_ranks(rehearse.main, 1, command, init=False) == [0]
    record = json.loads(result.read_text())
    assert record["config"]["model"]["flavor"] == "debug"
    few = rehearse.Rehearsal(**record["rehearsal"])
    assert few.kept > few.gradients  # what the layers keep decides the peak
    assert few.full_peak_device == pytest.approx(real, rel=0.1)
    assert few.peak_device < 0.8 * real  # without the extrapolation it would not agree


def test_a_rehearsal_extrapolates_what_more_layers_need(tmp_path: Path) -> None:
    args = debug_job(tmp_path, "upipe", "full")
    few, all_layers = (run_ranks(rehearsal, 1, args, 2, layers, init=False)[0] for layers in (2, 4))
    assert few.kept < few.gradients  # gradients decide the peak
    assert few.full_peak_device == pytest.approx(all_layers.peak_device, rel=0.02)
    assert few.peak_device < 0.8 * all_layers.peak_device
    assert few.full_layers == all_layers.layers == 4

    seconds = few.forward_seconds + few.backward_seconds
    assert 0 < 2 * seconds < few.step_seconds
    assert few.full_step_seconds == pytest.approx(few.step_seconds + 2 * seconds)
    rows = [row.strip("| ").split(" | ") for row in rehearse.page(few, "x").splitlines()[2:6]]
    by_ledger = rows.pop(1)
    assert [[cell.split()[-1] for cell in row[1:]] for row in rows] == [["measured", "extrapolated"]] * 3
    assert [cell.split()[2] for cell in by_ledger[1:]] == ["predicted"] * 2
    assert few.predicted == pytest.approx(few.peak_device, rel=0.1)
    assert few.predicted_full == all_layers.predicted == all_layers.predicted_full


def test_a_rehearsal_without_warmup_has_its_optimizer(tmp_path: Path) -> None:
    args = debug_job(tmp_path, "upipe", "full")
    warm, cold = (run_ranks(rehearsal, 1, args, 2, 2, warmup, init=False)[0] for warmup in (1, 0))
    assert cold.state == warm.state > 0
    assert cold.peak_device == pytest.approx(warm.peak_device, rel=0.02)


def test_refused_rehearsals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    args = job_args(tmp_path, 2)
    with pytest.raises(ValueError, match=r"--rank 2 must be at least 0 and below --world-size 2"):
        rehearse.rehearse(args, 2, 2, 2, 1, 1)
    with pytest.raises(ValueError, match=r"--layers 3 must be at least 2, .* the 2 of llama3_upipe debug_kv2"):
        rehearse.rehearse(args, 0, 2, 3, 1, 1)
    with pytest.raises(ValueError, match=r"= 2 x .* do not make the world of 3 ranks"):
        rehearse.rehearse(args, 0, 3, 2, 1, 1)
