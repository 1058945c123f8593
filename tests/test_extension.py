"""What a user's own module registers is known to every command; the module is named in ``custom_import``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import ROOT, job_args, read_log
from torchtitan_upipe import plan
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.memory import __main__ as memory

MODULE = """
from dataclasses import replace

from datasets import Dataset
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS
from torchtitan.protocols.train_spec import get_train_spec, register_train_spec

from torchtitan_upipe.train_spec import llama3_spec

spec = get_train_spec("llama3_upipe")
spec.model_args["{name}"] = replace(spec.model_args["debug_kv2"], n_layers=1)
DATASETS["{name}"] = DatasetConfig(
    path="",
    loader=lambda path: Dataset.from_dict({{"words": ["some words of a user's own " * 50] * 9}}),
    sample_processor=lambda row: row["words"],
)
register_train_spec("{name}_model", replace(llama3_spec(), model_args={{"tiny": spec.model_args["{name}"]}}))
register_train_spec("{name}_bare", replace(llama3_spec(), parallelize_fn=lambda model, dims, job: model))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A module of its own for every test, since registering is for ever."""
    name = f"extension_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(MODULE.format(name=name))
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def arguments(module: str, folder: Path, **options: object) -> list[str]:
    own = {"model__flavor": module, "training__dataset": module, "experimental__custom_import": module}
    return job_args(folder, 1, training__steps=2, **{**own, **options})


def test_flavor_dataset_and_spec_are_known(module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_job(arguments(module, tmp_path)).training.dataset == module
    read_job(arguments(module, tmp_path, model__name=f"{module}_model", model__flavor="tiny"))
    with pytest.raises(ValueError, match=f"choose one of llama3_upipe, qwen3_upipe, .*{module}_model"):
        read_job(arguments(module, tmp_path, model__name="other"))
    assert memory.main(arguments(module, tmp_path)) == 0
    assert plan.main([*arguments(module, tmp_path), "--device-memory", "8GiB"]) == 0
    assert module in capsys.readouterr().out


def run(module: str, folder: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Without torchrun: one rank."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, "-m", "torchtitan_upipe.train", *arguments(module, folder, **options)],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_one_rank_trains_without_torchrun(module: str, tmp_path: Path) -> None:
    result = run(module, tmp_path, metrics__enable_tensorboard=True)
    assert result.returncode == 0, result.stderr[-3000:]
    log = read_log(tmp_path)
    assert len(log.loss) == 2
    assert "Finished step 2 after 0:00:0" in result.stdout
    assert f"loss {log.loss[1]:.4f} (at step 1: {log.loss[0]:.4f}); outputs: {tmp_path}/tb" in result.stdout
    noise = ("lspci", "set_vital", "DTensor", "Set timeout", "safetensors.index", "[GC]")
    assert not [line for line in (result.stdout + result.stderr).splitlines() if any(word in line for word in noise)]
    assert len(result.stdout.splitlines()) < 20


def test_a_spec_that_attaches_nothing_is_refused(module: str, tmp_path: Path) -> None:
    result = run(module, tmp_path, model__name=f"{module}_bare", model__flavor="debug_kv2")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert f"model.name = '{module}_bare' does not attach context_parallel.method = \"upipe\"" in last
    assert last.endswith(f"(traceback: {tmp_path}/errors/rank-0.txt)")
    assert "Traceback" in (tmp_path / "errors/rank-0.txt").read_text()
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "text, sentence",
    [
        (None, r"custom_import = 'broken' cannot be imported; run from the folder that holds it"),
        ("import nowhere", r"'broken' cannot be imported \(it imports 'nowhere', which is not there\)"),
        ("1 / 0", r"'broken' fails while it is imported: ZeroDivisionError: division by zero"),
    ],
)
def test_a_module_that_cannot_be_imported(
    text: str | None, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    if text is not None:
        (tmp_path / "broken.py").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_job(job_args(tmp_path, 1, experimental__custom_import="broken"))
