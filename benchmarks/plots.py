"""Plots of a sweep. A method has one colour in all of them; its arms differ in their markers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from benchmarks.arms import Arm, spell_length
from benchmarks.results import ArmResult
from benchmarks.tables import MEASURED, PREDICTED, arm_names, memory_unit

# Okabe and Ito's palette, told apart by colour-blind readers too
COLOURS = {"upipe": "#D55E00", "ulysses": "#0072B2", "ring": "#009E73", "torchtitan": "#CC79A7", "fpdt": "#56B4E9"}
MARKERS = "osD^vP*X"
ONE_ROW = 60  # characters of names that fit into one row of a legend
SPREAD = 3.0  # from this ratio of largest to smallest on, an axis is logarithmic


def plot_sweep(results: Mapping[Arm, ArmResult], folder: Path) -> list[Path]:
    """Write the plots that the results allow; return their paths."""
    paths = []
    good = {arm: result for arm, result in results.items() if result.status == "ok"}
    if good:
        rates = {arm: result.rates for arm, result in good.items()}
        label = "throughput [tokens/s/rank]\nmedian, least and most of the runs"
        paths.append(_over_context(rates, results, label, folder / "throughput.png"))
        unit, name = memory_unit(max(result.peak_device for result in good.values()))
        peaks = {arm: (result.peak_device / unit,) for arm, result in good.items()}
        label = f"peak device memory, {MEASURED} [{name}]"
        paths.append(_over_context(peaks, results, label, folder / "memory.png"))
        paths.append(_by_category(good, folder / "memory_by_category.png"))
    return paths


def _over_context(
    values: Mapping[Arm, Sequence[float]], results: Mapping[Arm, ArmResult], label: str, path: Path
) -> Path:
    """Medians joined by a line for each name, with a bar from the least to the most of an arm's values."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    names = arm_names(results)
    for index, name in enumerate(names):
        arms = sorted((arm for arm in results if arm.name == name), key=lambda arm: arm.seq_len)
        shown = [arm for arm in arms if arm in values]
        lengths, medians = [arm.seq_len for arm in shown], [statistics.median(values[arm]) for arm in shown]
        colour, marker = COLOURS[arms[0].method], MARKERS[index % len(MARKERS)]
        axes.plot(lengths, medians, label=name, color=colour, marker=marker)
        axes.vlines(lengths, [min(values[arm]) for arm in shown], [max(values[arm]) for arm in shown], color=colour)
        for arm in arms:
            if arm not in values:  # stands at the foot of the plot, in its method's colour
                text = f"{name}: {results[arm].status}"
                place = (arm.seq_len, 0.02 + 0.05 * index)
                across = axes.get_xaxis_transform()
                axes.text(*place, text, color=colour, transform=across, ha="center", fontsize=8)
    context_axis(axes, {arm.seq_len for arm in results})
    _value_axis(axes, [value for several in values.values() for value in several])
    axes.set_ylabel(label)
    figure.legend(loc="outside upper center", ncols=4 if sum(map(len, names)) < ONE_ROW else 2)
    figure.savefig(path, dpi=150)
    return path


def context_axis(axes: Axes, lengths: Iterable[int]) -> None:
    """Let the x axis show contexts of these ``lengths``, in tokens."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(lengths)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: spell_length(round(x))))
    axes.margins(x=0.15)
    axes.set_xlabel("context [tokens]")
    axes.grid(alpha=0.3)


def _value_axis(axes: Axes, values: Iterable[float]) -> None:
    shown = list(values)
    if max(shown) < SPREAD * min(shown):
        axes.set_ylim(bottom=0)
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.6g}"))


def _by_category(results: Mapping[Arm, ArmResult], path: Path) -> Path:
    """Stacked bars of the measured peaks and, where there is a prediction, beside them of the predicted ones."""
    arms = sorted(results, key=lambda arm: arm.seq_len)
    sources = {MEASURED: [results[arm].measured for arm in arms]}
    if any(result.predicted for result in results.values()):
        sources[PREDICTED] = [results[arm].predicted for arm in arms]
    unit, unit_name = memory_unit(max(result.peak_device for result in results.values()))
    categories = list(dict.fromkeys(name for stacks in sources.values() for stack in stacks for name in stack))
    ticks = [_tick(arm) for arm in arms]
    below = -0.045 * (2 + max(tick.count("\n") for tick in ticks))  # where the legend begins, below the ticks
    figure = Figure(figsize=(2 + 1.1 * len(arms) * len(sources), 6.0), layout="constrained")
    panels = figure.subplots(1, len(sources), sharey=True, squeeze=False)[0]
    for axes, (source, stacks) in zip(panels, sources.items(), strict=True):
        _stack(axes, stacks, categories, unit)
        axes.set_xticks(range(len(arms)), ticks, fontsize=8)
        for tick, arm in zip(axes.get_xticklabels(), arms, strict=True):
            tick.set_color(COLOURS[arm.method])
        axes.set_title(f"peak device memory, {source}")
        axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, below))
    panels[0].set_ylabel(f"device memory of a rank [{unit_name}]")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    return path


def _tick(arm: Arm) -> str:
    """Method, options and length, each on a line of its own."""
    return "\n".join([arm.method, *arm.options.split(), spell_length(arm.seq_len)])


def _stack(axes: Axes, stacks: Sequence[Mapping[str, int]], categories: Sequence[str], unit: int) -> None:
    """One bar for each of ``stacks``; a category has one shade in all panels."""
    shades = colormaps["cividis"].resampled(len(categories))
    foot = [0.0] * len(stacks)
    for index, category in enumerate(categories):
        heights = [stack.get(category, 0) / unit for stack in stacks]
        if any(heights):
            axes.bar(range(len(stacks)), heights, bottom=foot, color=shades(index), edgecolor="black", label=category)
        foot = [below + height for below, height in zip(foot, heights, strict=True)]
