"""The model of time beside published steps: ``python -m benchmarks.times docs/time.md``.

Fits what a real step reaches of published rates on one column, Ulysses with Llama3-8B, and predicts all others with it.
The command writes the tables between the marks of the page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import torchtitan_upipe.titan.specs  # noqa: F401  (registers the models)
from benchmarks.arms import spell_length
from benchmarks.report import Published, read_paper
from benchmarks.tables import markdown, write_between
from torchtitan_upipe.data.sharding import degrees
from torchtitan_upipe.job.shape import JobShape, shape_of_flavor
from torchtitan_upipe.launch import refuse
from torchtitan_upipe.memory.rates import FITTED, Fit, rates_of
from torchtitan_upipe.memory.step_time import ATTENTION, PRODUCTS, Machine, StepTime, step_work, time_of

MODELS = {"Llama3-8B": ("llama3_upipe", "8B", 8), "Qwen3-32B": ("qwen3_upipe", "32B", 16)}  # and ranks
METHODS = ("ulysses", "upipe", "ring", "fpdt")


@dataclass(frozen=True)
class Cell:
    """One published figure, and the job that it is of."""

    figure: Published
    job: JobShape

    @property
    def seconds(self) -> float:
        """Published, of a step."""
        assert self.figure.rate is not None
        return self.job.rows / self.figure.rate

    @property
    def fitted(self) -> bool:
        """Whether the fit sees it."""
        return self.figure.method == "ulysses" and self.figure.model == "Llama3-8B"


def published_cells() -> list[Cell]:
    """All figures of methods that the model knows; out of memory is no figure."""
    return [Cell(f, published_job(f)) for f in read_paper() if f.method in METHODS and f.rate is not None]


def published_job(figure: Published) -> JobShape:
    """The step that was timed: full activation checkpointing with offload, FlashAttention-3, no tiles.

    The published UPipe computes attention again in the second run, where this project's has a stash, and handles as
    many KV heads as ranks where the model has fewer; its head chunk is the number of ranks.
    """
    name, flavor, ranks = MODELS[figure.model]
    model = shape_of_flavor(name, flavor)
    if figure.method == "upipe":
        model = replace(model, kv_heads=max(model.kv_heads, ranks))
    ulysses, ring = degrees(figure.method, ranks, 1)
    return JobShape(
        model=model,
        batch=1,
        length=figure.seq_len,
        rank=0,
        ulysses=ulysses,
        ring=ring,
        replicas=1,
        shards=ranks,
        element=2,
        stored=4,
        reduced=4,
        state_on_host=False,
        method=figure.method,
        head_chunk=ranks,
        sequence_chunk=65536 if figure.method == "fpdt" else 0,
        query_tiles=1,
        stash="none",
        stash_budget=0.0,
        tile_size=0,
        checkpoint=True,
        offload=True,
        hidden_on_host=False,
        positions=True,
        kernel="flash3",
        deterministic=False,
        workspace=True,
    )


def predict(cell: Cell, fit: Fit, ring_waits: bool = True) -> StepTime:
    """The predicted time of a published step on H100s, eight to a host.

    Args:
        ring_waits: nothing hides behind the published ring's transfers, which is what its figures look like.
    """
    work = step_work(cell.job)
    if ring_waits:
        for one in (work.forward, work.backward):
            one.ring_waited, one.ringed = one.ringed, 0.0
    return time_of(work, cell.job, Machine(replace(rates_of("h100-80gb"), fit=fit), kernel=cell.job.kernel))


def fit_of(cells: Iterable[Cell]) -> Fit:
    """Least squares of the relative errors, which the three constants (two of them as inverses) enter linearly."""
    rows, wanted = [], []
    for cell in cells:
        time, seconds = predict(cell, Fit()), cell.seconds
        fixed = time.parts[ATTENTION], time.parts[PRODUCTS]
        rows.append([*(part / seconds for part in fixed), 1 / seconds])
        wanted.append(1 - (time.seconds - sum(fixed)) / seconds)
    attention, products, step = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)[0]
    return Fit(float(1 / attention), float(1 / products), float(step))


def missing_of(cells: Iterable[Cell], fit: Fit) -> float:
    """The seconds a token, layer and element of its heads by which published FPDT steps are longer: one constant.

    Least squares of the relative errors over ``cells``.
    """
    lengths, lacking = [], []
    for cell in cells:
        lengths.append(_elements(cell.job) / cell.seconds)
        lacking.append(1 - predict(cell, fit).seconds / cell.seconds)
    found, *_ = np.linalg.lstsq(np.array(lengths)[:, None], np.array(lacking), rcond=None)
    return float(found[0])


def _elements(job: JobShape) -> float:
    return job.rows * job.model.layers * job.model.heads * job.model.head_dim


def deviation(cell: Cell, fit: Fit, missing: float = 0.0, ring_waits: bool = True) -> float:
    """Predicted over published seconds, less one."""
    return (predict(cell, fit, ring_waits).seconds + missing * _elements(cell.job)) / cell.seconds - 1


def tables(fit: Fit = FITTED) -> str:
    """All that the command writes."""
    cells = published_cells()
    fpdt = [cell for cell in cells if cell.figure.method == "fpdt"]
    missing = missing_of([cell for cell in fpdt if cell.figure.model == "Llama3-8B"], fit)
    page = (
        f"Fitted on the six cells of Ulysses with Llama3-8B: attention {fit.attention:.3f} of the published kernel "
        f"rates, products {fit.products:.3f} of the peak, {fit.step_seconds:.2f} s a step.\n\n"
    )
    for model in MODELS:
        own = [cell for cell in cells if cell.figure.model == model]
        page += f"### {own[0].figure.model}, {own[0].figure.hardware}\n\n"
        page += "Predicted seconds of a step, and how far they are from the published ones.\n\n"
        page += _over_context(own, METHODS, lambda c: f"{predict(c, fit).seconds:,.1f} ({deviation(c, fit):+.1%})")
        page += "\n"
    worst = {method: max(abs(deviation(c, fit)) for c in cells if c.figure.method == method) for method in METHODS}
    page += "Largest deviation: " + ", ".join(f"{method} {share:.1%}" for method, share in worst.items()) + ".\n\n"
    hidden = [cell for cell in cells if cell.figure.method == "ring"]
    page += "### Ring whose transfers hide behind attention, as this project's do\n\n"
    page += _by_model(hidden, lambda c: f"{deviation(c, fit, ring_waits=False):+.1%}") + "\n"
    page += "### FPDT with a fourth constant\n\n"
    page += f"{missing * 1e9:.2f} ns a token, layer and element of its query heads, fitted on FPDT with Llama3-8B.\n\n"
    page += _by_model(fpdt, lambda c: f"{deviation(c, fit, missing):+.1%}")
    return page


def _over_context(cells: Sequence[Cell], methods: Sequence[str], show: Callable[[Cell], str]) -> str:
    found = {(c.figure.method, c.figure.seq_len): c for c in cells}
    lengths = sorted({c.figure.seq_len for c in cells})
    rows = [
        [m + (", fitted" if any(c.fitted for c in cells if c.figure.method == m) else "")]
        + [show(found[m, n]) if (m, n) in found else "" for n in lengths]
        for m in methods
    ]
    return markdown(["method", *map(spell_length, lengths)], rows)


def _by_model(cells: Sequence[Cell], show: Callable[[Cell], str]) -> str:
    found = {(c.figure.model, c.figure.seq_len): c for c in cells}
    lengths = sorted({c.figure.seq_len for c in cells})
    rows = [[m, *(show(found[m, n]) if (m, n) in found else "" for n in lengths)] for m in MODELS]
    return markdown(["model", *map(spell_length, lengths)], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tables into the page of the command line, or print them; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.times", description=__doc__, allow_abbrev=False)
    parser.add_argument("page", type=Path, nargs="?", help="a page with the two marks; without one, print")
    options = parser.parse_args(arguments)
    fit = fit_of(cell for cell in published_cells() if cell.fitted)
    print(f"fitted: attention {fit.attention:.4f}, products {fit.products:.4f}, step {fit.step_seconds:.4f} s")
    try:
        print(tables(fit)) if options.page is None else write_between(options.page, "benchmarks.times", tables(fit))
    except ValueError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
