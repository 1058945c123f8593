"""The rooms of the house: imports go one way, and the core knows nothing of a trainer (docs/design.md, "Rooms")."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.jobs import ROOT

PACKAGE = ROOT / "torchtitan_upipe"
COMMANDS = {"train.py", "evaluate.py", "plan.py", "export.py", "memory/__main__.py", "train_spec.py"}
SIDES = ["dry_run", "titan", "huggingface", "memory", "job", "data"]
CORE = ["cp", "kernels", "tiled", "stash"]
FLOOR = ["device.py", "launch.py", "job_config.py", "__init__.py"]  # alone: they use no other file
ROOMS = ["commands", *SIDES, *CORE, "floor"]  # from top to bottom


def room_of(file: Path) -> str:
    """The room that ``file``, relative to the package, stands in."""
    if file.as_posix() in COMMANDS:
        return "commands"
    return "floor" if file.as_posix() in FLOOR else file.parts[0]


def imported(file: Path) -> Iterator[Path]:
    """What ``file`` imports of the package, anywhere in it: files relative to the package."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            base, _, rest = name.partition(".")
            path = Path(*rest.split(".")) if rest else Path("__init__")
            if base == PACKAGE.name and (PACKAGE / f"{path}.py").is_file():
                yield Path(f"{path}.py")


FILES = sorted(file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py"))
EDGES = [(file, target) for file in FILES for target in imported(PACKAGE / file)]


def test_every_file_has_a_room() -> None:
    assert {room_of(file) for file in FILES} <= set(ROOMS)
    assert len(EDGES) > 150  # the walk sees imports


def test_imports_go_one_way() -> None:
    up = [
        f"{file} imports {target}"
        for file, target in EDGES
        if ROOMS.index(room_of(file)) > ROOMS.index(room_of(target)) or (room_of(file) == "floor" and target != file)
    ]
    assert not up


def test_no_file_imports_itself_by_a_detour() -> None:
    """Within a room, too."""
    below: dict[Path, set[Path]] = {file: {t for f, t in EDGES if f == file and t != file} for file in FILES}

    def reach(file: Path, seen: set[Path]) -> set[Path]:
        for target in below[file] - seen:
            seen.add(target)
            reach(target, seen)
        return seen

    assert not [str(file) for file in FILES if file in reach(file, set())]


def test_the_core_runs_without_torchtitan() -> None:
    modules = [
        ".".join([PACKAGE.name, *file.with_suffix("").parts])
        for file in FILES
        if file.parts[0] in CORE and file.name not in ("__init__.py", "flash_attn.py")  # which needs its package
    ]
    program = (
        f"import importlib, sys; [importlib.import_module(m) for m in {modules}]; "
        "print([m for m in sys.modules if m.split('.')[0] in ('torchtitan', 'datasets', 'transformers')])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip() == "[]"


def test_data_stands_without_torchtitan() -> None:
    """Another trainer may use it."""
    program = (
        "import sys, torchtitan_upipe.data.stream, torchtitan_upipe.data.batch; print('torchtitan' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip() == "False"
