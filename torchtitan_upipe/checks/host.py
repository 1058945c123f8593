"""What of a host's memory this process may still take."""

from __future__ import annotations

import resource
from pathlib import Path

ROOT = Path("/")
UNLIMITED = 2**60  # what stands for no limit in the kernel's files is larger


def host_memory_left() -> dict[str, int]:
    """Bytes by what limits them: the host itself and the container, both shared with this host's other ranks."""
    left = {}
    meminfo = _read(ROOT / "proc/meminfo")
    for line in meminfo.splitlines():
        if line.startswith("MemAvailable:"):
            left["MemAvailable"] = int(line.split()[1]) * 1024
    if (limit := _container_left()) is not None:
        left["the container's limit"] = limit
    return left


def process_memory_left() -> dict[str, int]:
    """Bytes that the limits of this process alone leave it, by their names in ``ulimit``."""
    left = {}
    for name, kind, used in (
        ("ulimit -v", resource.RLIMIT_AS, "VmSize:"),
        ("ulimit -d", resource.RLIMIT_DATA, "VmData:"),
    ):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            left[name] = max(limit - _status(used), 0)
    return left


def _container_left() -> int | None:
    """By the limits of this process's control group and all above it; version 2, else 1."""
    path = next((line[3:] for line in _read(ROOT / "proc/self/cgroup").splitlines() if line.startswith("0::")), "/")
    folder, base = ROOT / "sys/fs/cgroup" / path.strip("/"), ROOT / "sys/fs/cgroup"
    found = [
        _left(place / "memory.max", place / "memory.current", place / "memory.stat")
        for place in (folder, *folder.parents)
        if place.is_relative_to(base)
    ]
    old = base / "memory"
    found.append(_left(old / "memory.limit_in_bytes", old / "memory.usage_in_bytes", old / "memory.stat"))
    limits = [left for left in found if left is not None]
    return min(limits) if limits else None


def _left(limit: Path, used: Path, stat: Path) -> int | None:
    words = _read(limit).strip()
    if not words.isdigit() or int(words) > UNLIMITED:
        return None
    cached = dict(line.split() for line in _read(stat).splitlines() if len(line.split()) == 2)
    taken = int(_read(used).strip() or 0) - int(cached.get("inactive_file", 0))  # which the kernel gives up
    return max(int(words) - max(taken, 0), 0)


def _status(name: str) -> int:
    lines = (line.split() for line in _read(ROOT / "proc/self/status").splitlines())
    return next((int(line[1]) * 1024 for line in lines if line and line[0] == name), 0)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
