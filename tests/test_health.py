"""Numbers that are not finite never reach the optimizer or a checkpoint, and are traced to where they began."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp

from tests.faults import Fault, run_with_faults
from tests.jobs import job_args, read_log, seed_checkpoint
from tests.ranks import run_ranks
from tests.test_failures import local, rows
from torchtitan_upipe.job.read import read_job

JOB: dict[str, Any] = {
    "training__seq_len": 64,
    "training__steps": 5,
    "training__global_batch_size": 2,
    "checkpoint__enable": True,
    "checkpoint__interval": 5,
    "context_parallel__head_chunk": 4,
}


def endings(tmp_path: Path, jobs: dict[str, tuple[dict[str, Any], Fault | None]]) -> dict[str, tuple[int, str]]:
    """How jobs end, each on both its ranks alike; one after another, by the names of their folders."""
    data = local(tmp_path / "x.jsonl", rows(40))
    listed = [
        (job_args(tmp_path / name, 2, **{**JOB, **data, **options}), fault) for name, (options, fault) in jobs.items()
    ]
    first, second = run_ranks(run_with_faults, 2, tmp_path, listed, init=False)
    assert [(code, text.replace("rank-1.txt", "rank-0.txt")) for code, text in second] == first
    return dict(zip(jobs, first, strict=True))


def test_stopped_or_skipped_before_the_optimizer(tmp_path: Path) -> None:
    skip = {"health__on_nonfinite": "skip", "health__max_skipped": 2}
    host = {"hidden_states": "host", "stash": "host", "tile_size": 16}
    hidden = {f"context_parallel__{name}": value for name, value in host.items()}
    ends = endings(
        tmp_path,
        {
            "forward": ({}, Fault("nan", 1, 3, "forward")),
            "hidden": ({**hidden, "activation_checkpoint__mode": "full"}, Fault("nan", 1, 3, "forward")),
            "backward": ({}, Fault("nan", 0, 3, "backward")),
            "flip": (skip, Fault("flip", 0, 2, "forward")),
            "too many": (skip, Fault("nan", 0, 2, "forward")),
        },
    )
    for name in ("forward", "hidden"):
        code, text = ends[name]
        assert code == 1
        assert (
            "step 3: the loss of micro-batch 0 is not finite: layers.1 (rank 1) is the first with such an outp" in text
        )
        assert len(read_log(tmp_path / name).loss) == 2
        assert not (tmp_path / name / "checkpoint/step-5").exists()
    assert ends["backward"][0] == 1
    assert "step 3: the gradient norm is nan, with a finite loss: that of layers.1." in ends["backward"][1]

    assert ends["flip"] == (0, "")  # goes on
    assert len(read_log(tmp_path / "flip").loss) == 4
    assert (tmp_path / "flip/checkpoint/step-5").exists()
    assert ends["too many"][0] == 1
    assert "step 4: the loss of micro-batch 0 is not finite" in ends["too many"][1]
    assert "after 2 steps that were skipped" in ends["too many"][1]

    dumped = {path.name for path in (tmp_path / "forward/nonfinite/step-3").iterdir()}
    assert dumped == {"rank-0-micro-batch-0.jsonl", "rank-0-micro-batch-1.jsonl"}  # "nan" strikes both
    lines = (tmp_path / "forward/nonfinite/step-3/rank-0-micro-batch-0.jsonl").read_text().splitlines()
    documents = [json.loads(line) for line in lines]
    assert sum(len(document["tokens"]) for document in documents) == 64
    assert any("words words" in document["text"] for document in documents)


def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    seed = seed_checkpoint(tmp_path, **{**JOB, "checkpoint__enable": True})
    dcp_to_torch_save(seed, tmp_path / "weights.pt")
    weights = torch.load(tmp_path / "weights.pt", weights_only=False)
    weights["layers.1.attention.wq.weight"][-1, 0] = torch.inf
    torch.save(weights, tmp_path / "weights.pt")
    (tmp_path / "damaged").mkdir()
    torch_save_to_dcp(tmp_path / "weights.pt", tmp_path / "damaged")
    ends = endings(tmp_path, {"job": ({"checkpoint__initial_load_path": tmp_path / "damaged"}, None)})
    assert ends["job"][0] == 1
    assert "layers.1.attention.wq.weight (rank 1) holds numbers that are not finite: what this job" in ends["job"][1]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """Gradients may be finite and the learning rate too large for float32."""
    options = {"optimizer__lr": 1e38, "optimizer__weight_decay": 1e38, "checkpoint__interval": 1, "training__steps": 2}
    code, text = endings(tmp_path, {"job": (options, None)})["job"]
    assert code == 1
    assert "holds numbers that are not finite: step" in text
    assert not list(tmp_path.glob("job/checkpoint/*"))


def test_limits_of_skipping(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='max_skipped = 2 has no meaning for on_nonfinite = "stop"'):
        read_job(job_args(tmp_path, 1, health__max_skipped=2))
    with pytest.raises(ValueError, match=r"health\.max_skipped = 0"):
        read_job(job_args(tmp_path, 1, health__max_skipped=0, health__on_nonfinite="skip"))
