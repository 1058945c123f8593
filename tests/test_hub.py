"""``model.hf_assets_path`` by a name of the Hub: found in its cache, or refused; no test here has a network."""

from __future__ import annotations

from pathlib import Path

import pytest
from torchtitan.config import JobConfig

from tests.jobs import job_args
from tests.pretrained import make, save
from torchtitan_upipe.device import SIMULATED
from torchtitan_upipe.job.read import read_job


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def downloaded(cache: Path, name: str) -> Path:
    """The folder of a model in the cache, as the library lays it out."""
    model = cache / f"models--{name.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    return model / "snapshots" / ("0" * 40)


def read(folder: Path, name: str, device: str = "cpu") -> JobConfig:
    options = {"model__flavor": "hf", "model__hf_assets_path": name}
    return read_job(job_args(folder, 1, context_parallel__head_chunk=4, **options), 1, device)


def test_a_model_of_the_hub_is_a_folder_in_its_cache(tmp_path: Path, cache: Path) -> None:
    folder = save(make("llama"), downloaded(cache, "some-lab/a.model-1B"))
    assert Path(read(tmp_path, "some-lab/a.model-1B").model.hf_assets_path) == folder
    assert read(tmp_path, str(folder)).model.hf_assets_path == str(folder)


@pytest.mark.parametrize("device", ["cpu", SIMULATED])
def test_a_name_that_nothing_is_known_of(tmp_path: Path, device: str) -> None:
    with pytest.raises(ValueError, match="'some-lab/nothing' is no folder here, and no model of that name"):
        read(tmp_path, "some-lab/nothing", device)


def test_paths_are_no_names(tmp_path: Path) -> None:
    for path in ("./nothing", "../nothing", "/nothing/here", "a/b/c"):
        with pytest.raises(ValueError, match=r"does not exist; set model.hf_assets_path"):
            read(tmp_path, path)


def test_a_shipped_flavor_is_planned_without_the_hub(tmp_path: Path) -> None:
    args = job_args(tmp_path, 1, context_parallel__head_chunk=4, model__hf_assets_path="some-lab/nothing")
    assert read_job(args, 1, SIMULATED).model.hf_assets_path == "some-lab/nothing"
