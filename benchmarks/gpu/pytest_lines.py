"""A pytest plugin: each test's outcome becomes a line at once, and tests that have one are left out.

``-p benchmarks.gpu.pytest_lines --lines FOLDER``. A device that a test has broken ends the run: what comes
after would fail for nothing. The test under way is named in ``FOLDER/test-under-way``, for a process that
dies with it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.environment import environment
from benchmarks.gpu.items import SKIPPED, newest_lines
from benchmarks.results import Record, ResultsFile

LOST = "the device is lost"
UNDER_WAY = "test-under-way"


def key_of(node: str) -> str:
    """The key of a test's line."""
    return f"test {node}"


class Lines:
    """Hooks of one run."""

    def __init__(self, folder: Path, toy: bool, retry_before: int) -> None:
        self.folder = folder
        self.toy = toy
        self.retry_before = retry_before
        self.environment = environment("cuda" if torch.cuda.is_available() else "cpu")
        self._outcome: Record = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out what has a line that is no skip."""
        lines = newest_lines(self.folder, self.retry_before)
        done = [i for i in items if lines.get(key_of(i.nodeid), {"status": SKIPPED})["status"] != SKIPPED]
        items[:] = [item for item in items if item not in done]
        config.hook.pytest_deselected(items=done)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Name the test under way."""
        (self.folder / UNDER_WAY).write_text(nodeid)
        self._outcome = {"status": "ok", "seconds": 0.0}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collect the outcome of set-up, call and tear-down."""
        self._outcome["seconds"] += report.duration
        self._outcome |= dict(report.user_properties)
        if report.failed and self._outcome["status"] == "ok":
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = str(crash.message if crash else report.longrepr).strip().partition("\n")[0]
            self._outcome |= {"status": "failed", "reason": reason}
        elif report.skipped and isinstance(report.longrepr, tuple):
            self._outcome |= {"status": SKIPPED, "reason": report.longrepr[2].removeprefix("Skipped: ")}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Write the line, and look at the device."""
        line = {"key": key_of(nodeid), "toy": self.toy, "part": "tests", **self._outcome}
        ResultsFile(self.folder).append({**line, **self.environment})
        (self.folder / UNDER_WAY).unlink()
        if self._outcome["status"] == "failed" and torch.cuda.is_available():
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                pytest.exit(f"{LOST}: {error}", returncode=1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of :class:`Lines`."""
    parser.addoption("--lines", type=Path, required=True, help="folder of results.jsonl")
    parser.addoption("--toy-lines", action="store_true", help="mark the lines as those of a toy run")
    parser.addoption("--retry-before", type=int, default=0, help="failures among so many first lines do not count")


def pytest_configure(config: pytest.Config) -> None:
    """Register the hooks."""
    options = (config.getoption(name) for name in ("--lines", "--toy-lines", "--retry-before"))
    config.pluginmanager.register(Lines(*options))
