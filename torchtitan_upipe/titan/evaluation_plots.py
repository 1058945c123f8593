"""Pictures of an evaluation: a heat map of needles, a curve of losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from torchtitan_upipe.job.results import NeedleResult, Results

DARK = 0.6  # exact match from which on a field of the heat map is dark


def plot_results(results: Results, path: Path) -> list[Path]:
    """Draw what ``results`` have beside ``path``, their file; return the pictures."""
    drawn = []
    if results.needles:
        drawn.append(path.with_name(f"{path.stem}-needles.png"))
        _needles(results).savefig(drawn[-1], dpi=150)
    if results.loss_by_position:
        drawn.append(path.with_name(f"{path.stem}-loss.png"))
        _losses(results).savefig(drawn[-1], dpi=150)
    return drawn


def _needles(results: Results) -> Figure:
    """Depth over length: colour and first line are exact match, the second the answer's log-probability."""
    kinds = list(dict.fromkeys(n["keys"] for n in results.needles))
    lengths, depths = (sorted({n[axis] for n in results.needles}) for axis in ("length", "depth"))
    size = (1.0 + (0.9 * len(lengths) + 0.8) * len(kinds) + 0.8, 1.4 + 0.5 * len(depths))
    figure = Figure(figsize=(max(size[0], 5.0), size[1]), layout="constrained")
    row = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axes, keys in zip(row, kinds, strict=True):
        cells = [n for n in results.needles if n["keys"] == keys]
        image = _heat_map(axes, cells, lengths, depths)
        axes.set_title("one needle" if keys == 1 else f"one of {keys} needles")
        axes.set_xlabel("context [tokens]")
    row[0].set_ylabel("depth of the needle")
    figure.suptitle(f"step {results.step}: exact match, and log-probability of the answer")
    figure.colorbar(image, ax=list(row), label="exact match")
    return figure


def _heat_map(axes: Axes, cells: list[NeedleResult], lengths: list[float], depths: list[float]) -> AxesImage:
    values = np.full((len(depths), len(lengths)), np.nan)
    for cell in cells:
        at = depths.index(cell["depth"]), lengths.index(cell["length"])
        values[at] = cell["exact_match"]
        text = f"{cell['exact_match']:.0%}\n{cell['log_probability']:.1f}"
        colour = "white" if cell["exact_match"] > DARK else "black"
        axes.text(at[1], at[0], text, ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(lengths)), [f"{int(length):,}" for length in lengths], rotation=30)
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    return axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")


def _losses(results: Results) -> Figure:
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    rows = results.loss_by_position
    axes.plot([row["to"] for row in rows], [row["loss"] for row in rows], marker="o")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("position in the document [tokens, from half of it on]")
    axes.set_ylabel("loss [nats/token]")
    axes.set_title(f"step {results.step}, sequences of {results.seq_len:,} tokens")
    axes.grid(alpha=0.3)
    return figure
