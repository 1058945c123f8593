"""Part 1: the tests that need a device, in a process of their own."""

from __future__ import annotations

import sys
import time
from collections import Counter

from benchmarks.gpu.items import Item, Part, Setup
from benchmarks.gpu.pytest_lines import LOST, UNDER_WAY, key_of
from benchmarks.processes import run_logged
from benchmarks.results import Record

SUITE = "tests"
HANGS = 60.0  # seconds after which a test that the end of the time finds running does not run again


def suite_part(setup: Setup) -> Part:
    """One item; its tests have lines of their own."""
    return Part("tests", 15, [Item(SUITE, lambda left: run_suite(setup, left), lambda: setup.sizes.startup)])


def run_suite(setup: Setup, left: float) -> Record:
    """Run what has no line yet; start again behind a test that took its process with it."""
    deadline, under_way = time.monotonic() + left, setup.folder / UNDER_WAY
    while True:
        under_way.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", *setup.sizes.tests, "-p", "benchmarks.gpu.pytest_lines"]
        command += ["-p", "no:cacheprovider", "--lines", str(setup.folder), "--retry-before", str(setup.retry_before)]
        broken_off = run_logged(
            [*command, *(["--toy-lines"] if setup.sizes.toy else [])],
            setup.folder / "tests.log",
            deadline - time.monotonic(),
        )
        setup.read()
        counts = Counter(line["status"] for line in lines_of_tests(setup))
        hung = broken_off is not None and under_way.exists() and time.time() - under_way.stat().st_mtime > HANGS
        if under_way.exists() and (broken_off is None or hung):
            reason = f"still running after {HANGS:.0f} s" if hung else "its process died"
            setup.add(key_of(under_way.read_text()), {"part": SUITE, "status": "failed", "reason": reason})
        if broken_off is not None:
            return broken_off
        if under_way.exists():
            continue
        log = (setup.folder / "tests.log").read_text(errors="replace").strip()
        ended = log.rpartition("\n")[2]
        if LOST in log[-1000:]:
            continue
        if not counts:
            return {"status": "failed", "reason": f"pytest ended without a test: {ended}"}
        names = {"ok": "passed", "failed": "failed", "skipped": "skipped"}
        outcome: Record = {names[status]: counts[status] for status in names}
        if counts["failed"]:
            reason = f"{counts['failed']} of {sum(counts.values())} tests failed"
            return {"status": "failed", "reason": reason, "counts": outcome}
        return {"status": "ok", "counts": outcome}


def lines_of_tests(setup: Setup) -> list[Record]:
    """The lines of single tests."""
    return [line for key, line in setup.lines.items() if key.startswith("test ")]
