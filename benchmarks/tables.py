"""Markdown tables. Every cell with a figure says where it is from: measured, predicted, published or extrapolated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.arms import Arm, spell_length
from benchmarks.results import GIB, ArmResult

MEASURED, PREDICTED, PUBLISHED, EXTRAPOLATED = "measured", "predicted", "published", "extrapolated"
NO_PREDICTION = "no prediction"


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    columns = list(header)
    lines = [columns, ["---"] * len(columns), *map(list, rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write_between(page: Path, command: str, tables: str) -> None:
    """Put what a command makes between its two marks in a page.

    Args:
        command: as in ``python -m``.

    Raises:
        ValueError: the page has not the marks.
    """
    begin, end = f"<!-- tables of python -m {command} -->", "<!-- end of the tables -->"
    before, mark, rest = page.read_text().partition(begin)
    _, closing, after = rest.partition(end)
    if not mark or not closing:
        raise ValueError(f"{page} has not the marks {begin} and {end}.")
    page.write_text(f"{before}{begin}\n\n{tables}\n{end}{after}")


def over_context(names: Iterable[str], lengths: Sequence[int], cell: Callable[[str, int], str]) -> str:
    """A table of methods x contexts."""
    header = ["method", *(spell_length(length) for length in lengths)]
    return markdown(header, [[name, *(cell(name, length) for length in lengths)] for name in names])


def memory_unit(count: float) -> tuple[int, str]:
    """The unit in which ``count`` bytes are easy to read, in bytes, and its name."""
    return (GIB, "GiB") if count >= GIB else (2**20, "MiB")


def spell_bytes(count: float) -> str:
    """``"12.34 GiB"``, or MiB below one."""
    unit, name = memory_unit(count)
    return f"{count / unit:.{2 if unit == GIB else 1}f} {name}"


def spell_rate(rate: float) -> str:
    """Tokens per second with four digits or more."""
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.4g}"


def spell_prediction(predicted: int, measured: int = 0) -> str:
    """Predicted bytes, with their deviation from the measured ones where there are such."""
    if not predicted:
        return NO_PREDICTION
    deviation = f" ({predicted / measured - 1:+.0%})" if measured else ""
    return f"{spell_bytes(predicted)} {PREDICTED}{deviation}"


def spell_outcome(result: ArmResult | None, figure: str) -> str:
    """``figure``, which was measured, or why there is none."""
    if result is None:
        return f"not {MEASURED}"
    if result.status == "ok":
        return f"{figure} {MEASURED}"
    return f"OOM {MEASURED}" if result.status == "OOM" else result.status


def arm_names(arms: Iterable[Arm]) -> list[str]:
    """The rows of a table, in order of first appearance."""
    return list(dict.fromkeys(arm.name for arm in arms))


def sweep_tables(results: Mapping[Arm, ArmResult]) -> str:
    """Throughput and peak memory, methods x contexts, and the reasons of what is missing."""
    names, lengths = arm_names(results), sorted({arm.seq_len for arm in results})
    by_place = {(arm.name, arm.seq_len): result for arm, result in results.items()}

    def ratio(name: str, length: int, figure: Callable[[ArmResult], float]) -> str:
        own, first = by_place.get((name, length)), by_place.get((names[0], length))
        if own is None or first is None or own.status != "ok" or first.status != "ok":
            return ""
        return f" ({figure(own) / figure(first):.2f}x)"

    def throughput(name: str, length: int) -> str:
        own = by_place.get((name, length))
        figure = spell_rate(own.tokens_per_second) if own and own.rates else ""
        return spell_outcome(own, figure) + ratio(name, length, lambda result: result.tokens_per_second)

    def memory(name: str, length: int) -> str:
        own = by_place.get((name, length))
        figure = spell_outcome(own, spell_bytes(own.peak_device) if own else "")
        predicted = spell_prediction(own.predicted_device, own.peak_device) if own else NO_PREDICTION
        return f"{figure}{ratio(name, length, lambda result: result.peak_device)}, {predicted}"

    page = "Tokens/s/rank, from each run's median step and the median run; in brackets the ratio to "
    page += f"{names[0]}.\n\n{over_context(names, lengths, throughput)}\n"
    apart = max((result.spread for result in results.values() if result.runs > 1 and result.rates), default=None)
    if apart is not None:
        page += f"Runs of the same arm were up to {apart:.0%} apart.\n\n"
    page += f"Peak device memory of the rank that needs most; in brackets the ratio to {names[0]}.\n\n"
    page += over_context(names, lengths, memory)
    missing = [f"- {arm.name}, {spell_length(arm.seq_len)}: {r.reason}\n" for arm, r in results.items() if r.reason]
    return page + ("\nWhat went wrong:\n\n" + "".join(missing) if missing else "")


def provenance(records: Sequence[Mapping[str, object]]) -> str:
    """One line a distinct origin: hardware, versions and commit of the records."""
    lines = {_origin(record): None for record in records if "hardware" in record}
    return "".join(f"- {line}\n" for line in lines)


def _origin(record: Mapping[str, object]) -> str:
    hardware, versions = record["hardware"], record["versions"]
    assert isinstance(hardware, Mapping)
    assert isinstance(versions, Mapping)
    where = f"{record['ranks']} ranks, {hardware['device']} ({hardware['processor']}, {hardware['cores']} cores)"
    software = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f"{where}; {software}; commit {record['commit']}"
