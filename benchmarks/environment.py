"""Where a figure comes from: commit, versions, hardware."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "torchtitan", "triton")


def environment(device_type: str) -> dict[str, Any]:
    """Commit, versions and hardware of this process, as JSON values."""
    return {
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
            "cuda": torch.version.cuda,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        },
        "hardware": {
            "device": torch.cuda.get_device_name() if device_type == "cuda" else "CPU",
            "capability": torch.cuda.get_device_capability() if device_type == "cuda" else None,
            "device_memory_bytes": torch.cuda.get_device_properties().total_memory if device_type == "cuda" else None,
            "processor": _processor(),
            "cores": os.cpu_count(),
            "host_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
        "threads_per_rank": torch.get_num_threads(),
    }


def commit() -> str | None:
    """The checked-out commit, with ``+changes`` where files differ from it; None outside a checkout."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if head is None:
        return None
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return head + ("+changes" if changed else "")


def _output(*command: str) -> str | None:
    """First line of what ``command`` prints, ``""`` if it prints nothing, None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip().partition("\n")[0] if result.returncode == 0 else None


def _processor() -> str:
    names = Path("/proc/cpuinfo")
    if names.exists():
        for line in names.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
