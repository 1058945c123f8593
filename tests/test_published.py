"""What the README shows of its comparison stands in the committed results, and its picture can be drawn again."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import picture
from benchmarks.results import ArmResult, ResultsFile, summarise
from tests.jobs import ROOT

FOLDER = ROOT / "docs/results/cpu_attention"


@pytest.fixture(scope="module")
def results() -> dict[tuple[str, int], ArmResult]:
    return {(arm.name, arm.seq_len): result for arm, result in summarise(ResultsFile(FOLDER).load()).items()}


@pytest.mark.parametrize("length", [8192, 16384])
def test_both_ends_of_the_comparison(length: int, results: dict[tuple[str, int], ArmResult]) -> None:
    ulysses = results["ulysses", length]
    small, fast = results["upipe U=4 query_tiles=2 stash=none", length], results["upipe U=4 stash=device", length]
    assert small.peak_device <= 0.65 * ulysses.peak_device
    assert ulysses.tokens_per_second <= 0.9 * fast.tokens_per_second
    readme = (ROOT / "README.md").read_text()
    (small_row,) = [line for line in readme.splitlines() if line.startswith("| UPipe for memory")]
    (fast_row,) = [line for line in readme.splitlines() if line.startswith("| UPipe for speed")]
    assert f"{small.peak_device / ulysses.peak_device:.2f}x" in small_row
    assert f"{ulysses.tokens_per_second / fast.tokens_per_second:.2f}x" in fast_row


def test_the_picture(tmp_path: Path) -> None:
    out = tmp_path / "memory.png"
    assert picture.main([str(FOLDER), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert picture.main([str(tmp_path), "--out", str(out)]) == 1
