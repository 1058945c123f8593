"""What scripts/setup.sh installs where, and which tests scripts/test.sh runs, on machines that are shell scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.jobs import ROOT

PYTHON = """
echo "python $*" >>"$LOG"
case "$*" in
  *is_available*) exit "${TORCH_SEES_NO_GPU:-1}" ;;
  *'version("torch")'*) echo 2.12.1 ;;
  *requires*) exit "${TORCH_BRINGS_NO_TRITON:-0}" ;;
  "-m pytest -n 2 --dist loadfile") exit "${PYTEST:-0}" ;;
esac
"""
NVIDIA_SMI = """
[ "$1" = -L ] && echo "GPU 0: a GPU" || printf '%s\\n' "$DRIVER" "$DRIVER"
"""


WORKERS = "-n 2 --dist loadfile"  # as pytest is called for the whole suite


@dataclass
class Machine:
    """A virtual environment whose programs write down how they are called."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.log = self.folder / "log"
        (self.folder / "bin").mkdir()
        (self.folder / "bin/activate").write_text('PATH="$VENV/bin:$PATH"\n')
        self.program("python", PYTHON)
        for name in ("ruff", "mypy"):
            self.program(name, f'echo "{name} $*" >>"$LOG"')

    def program(self, name: str, text: str) -> None:
        file = self.folder / "bin" / name
        file.write_text("#!/bin/bash\n" + text)
        file.chmod(0o755)

    def test_sh(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in ("CUDA_VISIBLE_DEVICES", "TORCH", "WORKERS")
        }
        return subprocess.run(
            ["bash", str(ROOT / "scripts/test.sh"), *arguments],
            env=kept
            | {"VENV": str(self.folder), "LOG": str(self.log), "PATH": f"{self.folder}/bin:/usr/bin:/bin"}
            | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def called(self, start: str) -> list[str]:
        """The calls that begin with ``start``, without it."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.removeprefix(start).strip() for line in lines if line.startswith(start)]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def gpus(machine: Machine) -> Machine:
    machine.program("nvidia-smi", NVIDIA_SMI)
    return machine


def test_without_gpus(machine: Machine) -> None:
    assert machine.test_sh(TORCH_BRINGS_NO_TRITON="1").returncode == 0
    assert machine.called("python -m pip install -q torch") == ["==2.13.0"]
    assert "\ntriton==" in (machine.folder / "constraints.txt").read_text()
    assert machine.called("python -m pytest") == [WORKERS]
    assert machine.called("ruff") == ["format --check .", "check ."]
    assert machine.called("mypy") == [""]


@pytest.mark.parametrize("driver", ["580.65.06", "595.12"])
def test_a_driver_of_cuda_13(driver: str, gpus: Machine) -> None:
    assert gpus.test_sh(DRIVER=driver).returncode == 0
    assert gpus.called("python -m pip install -q torch") == ["==2.13.0"]
    assert "triton" not in (gpus.folder / "constraints.txt").read_text()


@pytest.mark.parametrize("driver", ["570.211.01", "535.104.05", "Failed to initialize NVML"])
def test_an_older_driver_is_refused(driver: str, gpus: Machine) -> None:
    result = gpus.test_sh(DRIVER=driver)
    assert result.returncode != 0
    assert f"The driver is {driver}, and CUDA 13.0, which torch 2.13.0 is built for, needs 580" in result.stderr
    assert not gpus.called("python -m pip")
    assert not gpus.called("python -m pytest")


def test_a_torch_that_sees_the_gpus_stays(gpus: Machine) -> None:
    """One for CUDA 12, say, that someone has installed there."""
    assert gpus.test_sh(DRIVER="535.104.05", TORCH_SEES_NO_GPU="0").returncode == 0
    assert gpus.called("python -m pip install -q torch") == ["==2.12.1"]


def test_gpus_can_be_hidden(gpus: Machine) -> None:
    assert gpus.test_sh(DRIVER="535.104.05", CUDA_VISIBLE_DEVICES="").returncode == 0
    assert gpus.called("python -m pip install -q torch") == ["==2.13.0"]
    assert gpus.called("python -m pytest") == [WORKERS]


def test_another_torch_is_tested_and_not_linted(machine: Machine) -> None:
    assert machine.test_sh(TORCH="2.11.0").returncode == 0
    assert machine.called("python -m pip install -q torch") == ["==2.11.0"]
    assert machine.called("python -m pytest") == [WORKERS]
    assert not machine.called("ruff")
    assert not machine.called("mypy")


def test_what_is_installed_is_not_installed_again(machine: Machine) -> None:
    for torch, installs in (("", 2), ("", 2), ("2.11.0", 4), ("2.11.0", 4), ("", 4)):
        machine.test_sh("tests/test_x.py", TORCH=torch)
        assert len(machine.called("python -m pip install")) == installs
    assert machine.called("python -m pytest") == ["tests/test_x.py"] * 5


@pytest.mark.parametrize("code", [0, 1])
def test_gpu_tests_run_apart_whatever_the_others_say(code: int, gpus: Machine) -> None:
    assert gpus.test_sh(DRIVER="580.65.06", PYTEST=str(code)).returncode == code
    assert gpus.called("python -m pytest") == [WORKERS, "-m cuda"]


@pytest.mark.parametrize("options, visible", [([], ""), (["-m", "cuda"], "0")], ids=["all", "cuda"])
def test_the_suite_hides_gpus_from_itself(options: list[str], visible: str, tmp_path: Path) -> None:
    """Before a test module is imported; ``-m cuda`` does not."""
    (tmp_path / "witness.py").write_text(
        "import os\n\n"
        "def pytest_collectstart(collector):\n"
        "    print('visible:', repr(os.environ['CUDA_VISIBLE_DEVICES']))\n"
    )
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-p", "witness", "tests/test_kernels.py", *options],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=True,
    )
    seen = {line for line in found.stdout.splitlines() if line.startswith("visible:")}
    assert seen == {f"visible: {visible!r}"}
