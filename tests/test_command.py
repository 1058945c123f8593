"""The commands as a user types them, under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import ROOT, job_args, read_log, train


def torchrun(ranks: int, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_refused_job_ends_with_its_sentence(tmp_path: Path) -> None:
    args = job_args(tmp_path, 2, training__seq_len=1)
    result = torchrun(2, "-m", "torchtitan_upipe.train", *args)
    sentence = "ValueError: training.seq_len = 1 leaves some of the 2 context-parallel ranks without a token"
    assert result.returncode == 1
    last_lines = result.stderr.strip().splitlines()[-6:]
    assert any(sentence in line for line in last_lines), result.stderr
    assert result.stderr.count(sentence) == 2  # once by the rank, once in torchrun's summary
    assert "line " not in "".join(last_lines)  # no traceback after it
    assert not list(tmp_path.iterdir())


def test_a_failure_of_all_ranks_is_one_sentence(tmp_path: Path) -> None:
    """TorchTitan's trainer leaves torchrun a traceback for each rank."""
    (tmp_path / "x.jsonl").write_text('{"text": 5}')
    data = {"training__dataset": "local", "training__dataset_path": tmp_path / "x.jsonl"}
    result = torchrun(2, "-m", "torchtitan_upipe.train", *job_args(tmp_path, 2, **data))
    sentence = f"ValueError: {tmp_path}/x.jsonl, line 1: the column 'text' holds 5, which is no text."
    assert result.returncode == 1
    assert result.stderr.count(f"\n{sentence}") + result.stderr.startswith(sentence) == 1
    assert result.stderr.count("Traceback") == 1  # torchrun's own
    assert sentence in result.stderr.strip().splitlines()[-2]


def test_stock_torchtitan_runs_the_same_job(tmp_path: Path) -> None:
    """A pure plugin: ``custom_config_module`` and ``custom_import`` are all that TorchTitan's own entry needs."""
    options = {"training__steps": 3, "context_parallel__head_chunk": 4, "activation_checkpoint__mode": "full"}
    result = torchrun(2, "tests/stock.py", *job_args(tmp_path / "stock", 2, **options))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "upipe over 2 ranks" in result.stdout + result.stderr
    ours = train(tmp_path / "ours", 2, **options)
    assert read_log(tmp_path / "stock").loss == ours.loss
    assert len(ours.loss) == 3


@pytest.mark.skipif(
    not (ROOT / ".venv" / "installed").exists(), reason="scripts/test.sh makes the .venv that this needs"
)
@pytest.mark.parametrize("steps, code", [(2, 0), (-1, 1)])
def test_train_script_passes_arguments_on(steps: int, code: int, tmp_path: Path) -> None:
    """The README's first command, with overrides."""
    overrides = {"job.dump_folder": tmp_path, "training.seq_len": 256, "training.steps": steps}
    args = [word for name, value in overrides.items() for word in (f"--{name}", str(value))]
    result = subprocess.run(
        ["bash", "scripts/train.sh", *args], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == code, result.stderr[-3000:]
    if code:
        assert "ValueError: training.steps = -1 must be at least 1" in result.stderr
    else:
        assert "Training completed" in result.stdout + result.stderr
        assert len(read_log(tmp_path).loss) == steps
