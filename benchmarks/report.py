"""Measured, predicted and published figures side by side: ``python -m benchmarks.report RESULTS... --paper``.

``RESULTS`` are folders of ``benchmarks.ab``. Each cell says of each figure which of the three it is.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torchtitan.config import JobConfig

from benchmarks.arms import Arm, spell_length
from benchmarks.prediction import Prediction, predict
from benchmarks.results import ArmResult, Record, ResultsFile, summarise
from benchmarks.tables import (
    MEASURED,
    PREDICTED,
    PUBLISHED,
    over_context,
    provenance,
    spell_bytes,
    spell_outcome,
    spell_prediction,
    spell_rate,
)
from torchtitan_upipe.job.load import load_config
from torchtitan_upipe.launch import refuse

ROOT = Path(__file__).parent.parent
PAPER = Path(__file__).parent / "data" / "paper_throughput.csv"
NAMES = {("llama3_upipe", "8B"): "Llama3-8B", ("qwen3_upipe", "32B"): "Qwen3-32B"}  # the published spelling
JOB_FILES = {"Llama3-8B": "llama3_8b", "Qwen3-32B": "qwen3_32b"}
OUR_METHODS = {"native_pytorch": "torchtitan", "ring": "ring", "ulysses": "ulysses", "upipe": "upipe", "fpdt": "fpdt"}


@dataclass(frozen=True)
class Published:
    """One published figure: ``rate`` in tokens/s/GPU, or None for out of memory."""

    model: str
    hardware: str
    method: str
    seq_len: int
    rate: float | None
    source: str


@dataclass
class Section:
    """All that is known of one model on one kind of hardware, by ``(method, seq_len)``."""

    title: str
    measured: dict[Arm, ArmResult] = field(default_factory=dict)
    published: dict[tuple[str, int], Published] = field(default_factory=dict)
    predicted: dict[tuple[str, int], Prediction | None] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)


def read_paper(path: Path = PAPER) -> list[Published]:
    """The published table; its methods under this project's names where it has them."""
    with path.open(newline="") as file:
        return [
            Published(
                model=row["model"],
                hardware=row["hardware"],
                method=OUR_METHODS.get(row["method"], row["method"]),
                seq_len=int(row["seq_len_tokens"]),
                rate=None if row["tokens_per_second_per_gpu"] == "OOM" else float(row["tokens_per_second_per_gpu"]),
                source=row["source"],
            )
            for row in csv.DictReader(file)
        ]


def title_of(records: Iterable[Record]) -> str:
    """Model and hardware of a sweep, spelled as in the published table."""
    for record in records:
        if "config" in record:
            model = record["config"]["model"]
            name = NAMES.get((model["name"], model["flavor"]), f"{model['name']} {model['flavor']}")
            device = record["hardware"]["device"]
            return f"{name}, {record['ranks']}x{'H100' if 'H100' in device else device}"
    return "unknown model"


def sections(
    sweeps: Iterable[Sequence[Record]],
    paper: Iterable[Published],
    predict: Callable[[JobConfig], Prediction | None] = predict,
) -> list[Section]:
    """Sort all figures by model and hardware.

    Raises:
        ValueError: two sweeps of different jobs have an arm in common.
    """
    found: dict[str, Section] = {}
    for records in sweeps:
        title = title_of(records)
        section = found.setdefault(title, Section(title))
        results = summarise(records)
        both = [arm for arm in results if arm in section.measured]
        if both:
            raise ValueError(
                f"two of the results hold {both[0].name} at {spell_length(both[0].seq_len)} for {title}; "
                "report them one after another."
            )
        section.measured |= results
        section.records += records
    for figure in paper:
        title = f"{figure.model}, {figure.hardware}"
        section, place = found.setdefault(title, Section(title)), (figure.method, figure.seq_len)
        section.published[place] = figure
        section.predicted[place] = _predict_published(figure, predict)
    return list(found.values())


def _predict_published(figure: Published, predict: Callable[[JobConfig], Prediction | None]) -> Prediction | None:
    """What the shipped job of the same model, context and method is predicted to need; None where there is none."""
    path = ROOT / "train_configs" / f"{JOB_FILES[figure.model]}_{spell_length(figure.seq_len).lower()}.toml"
    if figure.method not in OUR_METHODS.values() or not path.exists():
        return None
    overrides = [] if figure.method == "upipe" else Arm(figure.method, 0, figure.seq_len).overrides
    return predict(load_config(["--job.config_file", str(path), *overrides]))


def page(section: Section) -> str:
    """One section in Markdown."""
    places = [(arm.method, arm.seq_len) for arm in section.measured] + list(section.published)
    methods, lengths = list(dict.fromkeys(method for method, _ in places)), sorted({length for _, length in places})

    def arms(method: str, length: int) -> Mapping[Arm, ArmResult]:
        return {arm: r for arm, r in section.measured.items() if (arm.method, arm.seq_len) == (method, length)}

    def throughput(method: str, length: int) -> str:
        lines = _measured_lines(arms(method, length), lambda result: spell_rate(result.tokens_per_second))
        figure = section.published.get((method, length))
        if figure is not None:
            lines.append(f"{'OOM' if figure.rate is None else spell_rate(figure.rate)} {PUBLISHED}")
        return "<br>".join(lines)

    def memory(method: str, length: int) -> str:
        results = arms(method, length)
        lines = _measured_lines(results, lambda result: spell_bytes(result.peak_device))
        several = len(results) > 1
        own = [
            spell_prediction(r.predicted_device, r.peak_device) + (_options(arm) if several else "")
            for arm, r in results.items()
        ]
        shipped = section.predicted.get((method, length))
        return "<br>".join([*lines, *(own or [spell_prediction(shipped.device_bytes if shipped else 0)])])

    text = f"## {section.title}\n\nTokens/s/rank.\n\n{over_context(methods, lengths, throughput)}\n"
    text += f"Peak device memory of a rank.\n\n{over_context(methods, lengths, memory)}"
    if section.records:
        text += f"\n{MEASURED.capitalize()} on:\n\n{provenance(section.records)}"
    sources = dict.fromkeys(figure.source for figure in section.published.values())
    return text + (f"\n{PUBLISHED.capitalize()}: {', '.join(sources)}.\n" if sources else "")


def _measured_lines(results: Mapping[Arm, ArmResult], figure: Callable[[ArmResult], str]) -> list[str]:
    lines = [
        spell_outcome(result, figure(result) if result.status == "ok" else "") + _options(arm)
        for arm, result in results.items()
    ]
    return lines or [spell_outcome(None, "")]


def _options(arm: Arm) -> str:
    return f", {arm.options}" if arm.options else ""


def report(folders: Iterable[Path], paper: bool) -> str:
    """The whole page.

    Raises:
        ValueError: a folder without results, or results that cannot stand in one table.
    """
    sweeps = []
    for folder in folders:
        records = ResultsFile(folder).load()
        if not records:
            raise ValueError(f"{folder} holds no results.jsonl with results of `python -m benchmarks.ab`.")
        sweeps.append(records)
    introduction = (
        f"# Results\n\n{MEASURED.capitalize()}: in a real run of this project. {PREDICTED.capitalize()}: by its "
        f"ledger, without a run. {PUBLISHED.capitalize()}: by others, on their hardware.\n"
    )
    return "\n".join([introduction, *map(page, sections(sweeps, read_paper() if paper else []))])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report of the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("results", type=Path, nargs="*", metavar="RESULTS", help="folders of benchmarks.ab")
    parser.add_argument(
        "--paper", action="store_true", help="with the published figures and predictions for their jobs"
    )
    options = parser.parse_args(arguments)
    if not options.results and not options.paper:
        parser.error("name at least one folder of results, or --paper")
    try:
        print(report(options.results, options.paper))
    except ValueError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
