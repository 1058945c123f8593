"""The README's picture: memory against context, by method, predicted and measured told apart.

    python -m benchmarks.picture docs/results/cpu_attention --out docs/memory.png

Left the whole step of a job that nobody has run here, as the ledger predicts it; right a sweep's job, predicted over a
range of contexts and measured where the sweep ran.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.arms import Arm
from benchmarks.plots import COLOURS, context_axis
from benchmarks.results import GIB, ArmResult, ResultsFile, summarise
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.job.shape import JobShape, job_shape
from torchtitan_upipe.memory.ledger import predict_shape

ROOT = Path(__file__).parent.parent
MIB = 2**20
LARGE = ROOT / "train_configs/llama3_8b_5m.toml"
CONTEXTS = [2**i for i in range(17, 24)]  # 128K to 8M
METHODS: dict[str, list[str]] = {  # of the large job; as each is meant to run there
    "ulysses": ["--context_parallel.method", "ulysses", "--context_parallel.head_chunk", "0"],
    "ring": ["--context_parallel.method", "ring", "--context_parallel.head_chunk", "0"],
    "upipe U=8 stash=host": ["--context_parallel.stash_budget_gib", "0"],
}
STYLES = ("-", "--", ":", "-.")


def shape_of(job: Path, arguments: Sequence[str], workspace: bool) -> JobShape:
    """The shape of a job file's job with overrides; its tokenizer, which comes with a download, stands aside."""
    return job_shape(read_job(["--job.config_file", str(job), *arguments], 0, "simulated"), workspace=workspace)


def curve(job: JobShape, lengths: Sequence[int], unit: int) -> list[float]:
    """Predicted peaks of a rank over contexts."""
    return [predict_shape(replace(job, length=length)).device_bytes / unit for length in lengths]


def draw(results: Mapping[Arm, ArmResult], job: Path, out: Path) -> None:
    """Write the picture of ``LARGE`` and of the sweep of ``job`` to ``out``."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    large, small = figure.subplots(1, 2)
    for name, arguments in METHODS.items():
        peaks = curve(shape_of(LARGE, arguments, workspace=True), CONTEXTS, GIB)
        large.plot(CONTEXTS, peaks, color=COLOURS[name.split()[0]], label=name)
    large.axhline(80, color="grey", linewidth=0.8)
    large.text(CONTEXTS[0], 81, "80 GiB", color="grey", fontsize=8, va="bottom")
    large.set_ylim(0, 120)
    _label(large, CONTEXTS, "Llama3-8B on 8 GPUs (predicted, nothing measured)", "GiB")

    measured = sorted({arm.seq_len for arm in results})
    lengths = [measured[0] // 2, *measured]
    of_method: dict[str, int] = {}
    for arm in (arm for arm in results if arm.seq_len == measured[-1]):
        style = STYLES[of_method.setdefault(arm.method, 0)]
        of_method[arm.method] += 1
        look = {"color": COLOURS[arm.method]}
        predicted = shape_of(job, arm.overrides, workspace=False)
        small.plot(lengths, curve(predicted, lengths, MIB), linestyle=style, label=arm.name, **look)
        same = {a.seq_len: r.peak_device / MIB for a, r in results.items() if a.name == arm.name and r.status == "ok"}
        marker = "os^D"[of_method[arm.method] - 1]
        small.plot([*same], [*same.values()], marker=marker, linestyle="", **look)
    small.set_ylim(bottom=0)
    _label(small, lengths, "Small Qwen3 on 4 CPU ranks (lines predicted, markers measured)", "MiB")
    figure.savefig(out, dpi=150)


def _label(axes: Axes, lengths: Sequence[int], title: str, unit: str) -> None:
    context_axis(axes, lengths)
    axes.set_ylabel(f"peak device memory of a rank [{unit}]")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the picture of the command line's sweep; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of a sweep")
    parser.add_argument("--job", type=Path, default=ROOT / "benchmarks/cpu_attention.toml", help="its job file")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    options = parser.parse_args(arguments)
    results = summarise(ResultsFile(options.results).load())
    if not results:
        print(f"ValueError: {options.results} holds no results; run benchmarks.ab first.", file=sys.stderr)
        return 1
    draw(results, options.job, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
