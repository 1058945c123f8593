"""GPUs that torch cannot use are refused in one sentence, not left idle beside a CPU run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks import ab, rehearse
from torchtitan_upipe import device, train

SENTENCE = r"torch \S+, built for \S.*, can use none of this machine's 2 GPUs, whose driver is 535\.104\.05; install"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with two GPUs and a driver of CUDA 12."""
    driver = tmp_path / "proc/driver/nvidia"
    driver.mkdir(parents=True)
    (driver / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\nGCC version: 11"
    )
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    monkeypatch.setattr(device, "HOST", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


@pytest.mark.parametrize("visible", [None, "0", "1,0", "GPU-5ebe9f43", "MIG-1b2c"])
def test_gpus_that_torch_cannot_use(visible: str | None, host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ValueError, match=SENTENCE):
        device.refuse_idle_gpus()


@pytest.mark.parametrize("hidden", ["", "-1", "-1,0", "NoDevFiles"])
def test_hidden_gpus_leave_the_cpu(hidden: str, host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    device.refuse_idle_gpus()


def test_a_container_without_gpus_on_a_host_with_some(host: Path) -> None:
    """It sees the driver in ``/proc``, and no device files."""
    for file in (host / "dev").iterdir():
        file.unlink()
    device.refuse_idle_gpus()


def test_a_driver_that_does_not_say_its_version(host: Path) -> None:
    (host / "proc/driver/nvidia/version").unlink()
    with pytest.raises(ValueError, match="whose driver is of unknown version; install"):
        device.refuse_idle_gpus()


def test_gpus_that_torch_uses_are_not_idle(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._utils._get_available_device_type", lambda: "cuda")
    device.refuse_idle_gpus()


def test_training_ends_with_the_sentence(
    host: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = host / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(errors))
    monkeypatch.setenv("RANK", "0")
    assert train.main([]) == 1
    assert "can use none of this machine's 2 GPUs" in capsys.readouterr().err
    assert "can use none of this machine's 2 GPUs" in json.loads(errors.read_text())["message"]


@pytest.mark.parametrize(
    "command, arguments",
    [
        (ab.main, ["--methods", "upipe", "--seq_lens", "1k", "--out", "nowhere"]),
        (rehearse.main, ["--world-size", "2"]),
    ],
    ids=["ab", "rehearse"],
)
def test_benchmarks_end_with_the_sentence(
    command: Callable[[Sequence[str]], int],
    arguments: list[str],
    host: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(arguments) == 1
    assert "can use none of this machine's 2 GPUs" in capsys.readouterr().err
