"""Markdown tables. Every cell with a figure says where it is from: measured, predicted or published."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from benchmarks.arms import Arm, spell_length
from benchmarks.results import GIB, ArmResult

MEASURED, PREDICTED, PUBLISHED, EXTRAPOLATED = "measured", "predicted", "published", "extrapolated"
SMALL = GIB // 16  # below it MiB are easier to read


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    columns = list(header)
    lines = [columns, ["---"] * len(columns), *map(list, rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def spell_bytes(count: float) -> str:
    """``"12.34 GiB"``, or MiB below a sixteenth of one."""
    return f"{count / GIB:.2f} GiB" if count >= SMALL else f"{count / 2**20:.1f} MiB"


def spell_rate(rate: float) -> str:
    """Tokens per second with four digits or more."""
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.4g}"


def arm_names(arms: Iterable[Arm]) -> list[str]:
    """The rows of a table, in order of first appearance."""
    return list(dict.fromkeys(arm.name for arm in arms))


def sweep_tables(results: Mapping[Arm, ArmResult]) -> str:
    """Throughput and peak memory, methods x contexts, and the reasons of what is missing."""
    names, lengths = arm_names(results), sorted({arm.seq_len for arm in results})
    cells = {(arm.name, arm.seq_len): result for arm, result in results.items()}
    header = ["method", *(spell_length(length) for length in lengths)]

    def rows(cell: str) -> list[list[str]]:
        spell = {"throughput": _throughput, "memory": _memory}[cell]
        first = names[0]
        return [
            [name, *(spell(cells.get((name, length)), cells.get((first, length))) for length in lengths)]
            for name in names
        ]

    parts = [
        f"Tokens/s/rank, {MEASURED}; in brackets the ratio to {names[0]}.\n\n{markdown(header, rows('throughput'))}",
        "Peak device memory of the rank that needs most; in brackets the ratio to "
        f"{names[0]}.\n\n{markdown(header, rows('memory'))}",
    ]
    missing = [
        f"- {arm.name}, {spell_length(arm.seq_len)}: {result.status}: {result.reason}\n"
        for arm, result in results.items()
        if result.status != "ok"
    ]
    if missing:
        parts.append("Not measured:\n\n" + "".join(missing))
    return "\n".join(parts)


def _throughput(result: ArmResult | None, first: ArmResult | None) -> str:
    if result is None or result.status != "ok":
        return _absent(result)
    ratio = f" ({result.tokens_per_second / first.tokens_per_second:.2f}x)" if first and first.status == "ok" else ""
    return spell_rate(result.tokens_per_second) + ratio


def _memory(result: ArmResult | None, first: ArmResult | None) -> str:
    figures = []
    if result is None or result.status != "ok":
        figures.append(_absent(result))
    else:
        ratio = f" ({result.peak_device / first.peak_device:.2f}x)" if first and first.status == "ok" else ""
        figures.append(f"{spell_bytes(result.peak_device)} {MEASURED}{ratio}")
    if result is not None and result.predicted_device:
        figures.append(f"{spell_bytes(result.predicted_device)} {PREDICTED}")
    return ", ".join(figures)


def _absent(result: ArmResult | None) -> str:
    return "not run" if result is None else f"{result.status} {MEASURED}" if result.status == "OOM" else result.status


def provenance(records: Sequence[Mapping[str, object]]) -> str:
    """One line a distinct origin: hardware, versions and commit of the records."""
    lines = {}
    for record in records:
        if "hardware" in record:
            lines.setdefault(_origin(record), None)
    return "".join(f"- {line}\n" for line in lines)


def _origin(record: Mapping[str, object]) -> str:
    hardware, versions = record["hardware"], record["versions"]
    assert isinstance(hardware, Mapping) and isinstance(versions, Mapping)
    where = (
        f"{record.get('ranks', '?')} ranks, {hardware['device']} ({hardware['processor']}, {hardware['cores']} cores)"
    )
    software = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f"{where}; {software}; commit {record['commit']}"
