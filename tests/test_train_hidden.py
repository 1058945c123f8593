"""Training with hidden states in host memory: the numbers of the same job with them on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.jobs import Log, job_args, train
from torchtitan_upipe.job.read import read_job

LLAMA = {"model__name": "llama3_upipe", "model__flavor": "debug_kv2"}
QWEN = {"model__name": "qwen3_upipe", "model__flavor": "debug"}
TIED = {"model__name": "qwen3_upipe", "model__flavor": "debug_tied"}
DEVICE = {"activation_checkpoint__mode": "full", "context_parallel__tile_size": 48, "context_parallel__stash": "host"}
HOST = DEVICE | {"context_parallel__hidden_states": "host"}


def compare(folder: Path, ranks: int, *flags: str, tolerance: float = 2e-7, **options: Any) -> tuple[Log, Log]:
    """The same job with its hidden states on the device and on the host."""
    device = train(folder / "device", ranks, *flags, **{**DEVICE, **options})
    host = train(folder / "host", ranks, *flags, **{**HOST, **options})
    assert host.loss == pytest.approx(device.loss, rel=tolerance)
    assert host.grad_norm == pytest.approx(device.grad_norm, rel=2e-4)
    return device, host


@pytest.mark.parametrize(
    "model, ranks, stash", [(LLAMA, 4, "host"), (QWEN, 2, "none")], ids=["llama3-host", "qwen3-none"]
)
def test_twenty_steps_of_upipe(tmp_path: Path, model: dict[str, object], ranks: int, stash: str) -> None:
    options = {"training__steps": 20, "context_parallel__head_chunk": 4, "context_parallel__query_tiles": 2}
    compare(tmp_path, ranks, **model, **options, context_parallel__stash=stash)


@pytest.mark.parametrize("method, ring", [("ulysses", 1), ("ring", 1), ("upipe", 2)])
def test_other_methods_and_hybrids(tmp_path: Path, method: str, ring: int) -> None:
    options = {"context_parallel__method": method, "context_parallel__ring_degree": ring}
    compare(tmp_path, 4, **LLAMA, **options, tolerance=1e-6)


def test_documents_padding_accumulation_and_validation(tmp_path: Path) -> None:
    options = {
        "training__document_mask": True,
        "training__seq_len": 250,
        "training__local_batch_size": 2,
        "training__global_batch_size": 4,
        "validation__seq_len": 250,
        "validation__local_batch_size": 2,
        "validation__steps": 2,
        "validation__freq": 5,
        "validation__dataset": "stdlib",
    }
    device, host = compare(tmp_path, 2, "--validation.enable", **TIED, **options, tolerance=1e-6)
    assert len(host.validation) == 3
    assert host.validation == pytest.approx(device.validation, rel=1e-6)


def test_one_rank_with_everything_on_the_host(tmp_path: Path) -> None:
    compare(tmp_path, 1, "--training.enable_cpu_offload", **LLAMA, tolerance=1e-6)


def test_bfloat16(tmp_path: Path) -> None:
    compare(tmp_path, 2, **QWEN, training__mixed_precision_param="bfloat16", tolerance=2e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"context_parallel__method": "fpdt"}, 'does not go with method = "fpdt"; use "upipe", "ulysses" or "ring"'),
        ({"context_parallel__tile_size": 0}, "does not go with tile_size = 0; set the rows"),
        ({"context_parallel__stash": "device"}, 'does not go with stash = "device"; set stash = "host" or "none"'),
        ({"activation_checkpoint__mode": "none"}, "does not go with activation_checkpoint.mode = 'none'"),
        ({"activation_checkpoint__offload": True}, "offload = true; remove it: block inputs are there already"),
        ({"training__mixed_precision_param": "bfloat16"}, "without FSDP2; set training.enable_cpu_offload = true"),
    ],
)
def test_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_job(job_args(tmp_path, 1, **{**HOST, **LLAMA, **options}), 1)
