"""The tables of the command's lines, in Markdown; what has no line is "not run"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from benchmarks.arms import Arm, parse_arm, spell_length
from benchmarks.gpu.items import SKIPPED, Setup
from benchmarks.gpu.rates import COPIES, attention_key, rates_of_run
from benchmarks.gpu.rehearsals import key_of
from benchmarks.gpu.suite import lines_of_tests
from benchmarks.gpu.trace import KEY as TRACE
from benchmarks.gpu.training import KEY as TRAINING
from benchmarks.report import read_paper
from benchmarks.results import GIB, Record
from benchmarks.tables import (
    EXTRAPOLATED,
    MEASURED,
    PREDICTED,
    PUBLISHED,
    markdown,
    provenance,
    spell_bytes,
    spell_rate,
)

NOT_RUN = "not run"

HEAD = """# On one GPU

Made by `python -m benchmarks.gpu --out DIR --report {report}` from the lines of

```
python -m benchmarks.gpu --out DIR --minutes 25
```

on a machine with one GPU; started again with the same `DIR` it goes on where it was. `--write-rates` puts the measured
rates into `torchtitan_upipe/assets/kernel_rates.json`, by which `attention_kernel = "auto"` chooses.
{toy}"""

TOY = "\n**A toy run on CPU: it shows that the command works; the figures mean nothing.**\n"


def page(setup: Setup, report: str) -> str:
    """All parts."""
    parts: dict[str, Callable[[Setup], str]] = {
        "Tests": tests,
        "Attention kernels": attention,
        "Matrix products and copies": products,
        f"Rank 0 of {setup.sizes.ranks}, rehearsed": rehearsals,
        "Training on one GPU": training,
        "Copies beside kernels": trace,
    }
    text = HEAD.format(report=report, toy=TOY if setup.sizes.toy else "")
    text += "".join(f"\n## {title}\n\n{part(setup)}" for title, part in parts.items())
    measured = [line | {"ranks": 1} for line in setup.lines.values() if "hardware" in line]
    text += f"\n## Measured on\n\n{provenance(measured).replace('1 ranks, ', '') or NOT_RUN + chr(10)}"
    missing = {key: line for key, line in setup.lines.items() if line["status"] != "ok"}
    by_reason: dict[str, list[str]] = {}
    for key, line in missing.items():
        by_reason.setdefault(f"{line['status']}: {line['reason']}", []).append(key)
    reasons = [f"- {reason}: {', '.join(keys)}\n" for reason, keys in by_reason.items()]
    return text + ("\n## What was not measured, or failed\n\n" + "".join(reasons) if reasons else "")


def cell(line: Record | None, figure: Callable[[Record], str]) -> str:
    """A line's figure, or what is there in its place."""
    if line is None or line["status"] == SKIPPED:
        return NOT_RUN
    return figure(line) if line["status"] == "ok" else str(line["status"])


def tests(setup: Setup) -> str:
    """Counts by test function."""
    counts: dict[str, Counter[str]] = {}
    for line in lines_of_tests(setup):
        counts.setdefault(line["key"].removeprefix("test ").partition("[")[0], Counter())[line["status"]] += 1
    names = ("ok", "failed", SKIPPED)
    rows = [[f"`{name}`", *(str(count[status]) for status in names)] for name, count in sorted(counts.items())]
    return markdown(["test", "passed", "failed", "skipped"], rows or [["`pytest -m cuda`", *[NOT_RUN] * 3]])


def attention(setup: Setup) -> str:
    """Rates, and what ``"auto"`` should be by them."""
    sizes = setup.sizes

    def figure(line: Record) -> str:
        return f"{line['forward_tflops']:.0f} / {line['backward_tflops']:.0f}"

    rows = [
        [
            f"{spell_length(tokens)}, {heads} on {kv_heads}",
            *(cell(setup.lines.get(attention_key(k, tokens, heads)), figure) for k in sizes.kernels),
        ]
        for tokens in sizes.tokens
        for heads, kv_heads in sizes.heads
    ]
    text = (
        f"TFLOP/s forward / backward, {MEASURED}: causal, bfloat16, d = {sizes.head_dim}; the visible half counts.\n\n"
    )
    text += markdown(["tokens, query heads on KV heads", *sizes.kernels], rows)
    entry = rates_of_run(setup.lines.values())
    if entry is None:
        return text
    best = min(entry.rates, key=lambda name: entry.rates[name].seconds)
    return f'{text}\nBy the rates at {spell_length(entry.tokens)}, `"auto"` should be `"{best}"` here.\n'


def products(setup: Setup) -> str:
    """Rates of products and copies."""
    rows = [
        [
            f"`[{m}, {k}] x [{k}, {n}]`",
            cell(setup.lines.get(f"product {m}x{k}x{n}"), lambda r: f"{r['tflops']:.0f} TFLOP/s"),
        ]
        for m, k, n in setup.sizes.products
    ]
    rows += [
        [f"copy {name}", cell(setup.lines.get(f"copy {name}"), lambda r: f"{r['bytes_per_second'] / 1e9:.1f} GB/s")]
        for name in COPIES
    ]
    return markdown(["bfloat16 product, or copy (host memory pinned)", MEASURED], rows)


def rehearsals(setup: Setup) -> str:
    """A row a context and arm."""
    published = {(f.method, f.seq_len): f for f in read_paper() if f.model == "Llama3-8B" and f.hardware == "8xH100"}

    def row(arm: Arm) -> list[str]:
        line, paper = setup.lines.get(key_of(arm)), published.get((arm.method, arm.seq_len))
        rate = "OOM" if paper and paper.rate is None else spell_rate(paper.rate or 0) if paper else ""
        return [
            spell_length(arm.seq_len),
            arm.name,
            cell(line, lambda r: f"{r['forward_seconds']:.3g} / {r['backward_seconds']:.3g}"),
            cell(line, lambda r: f"{spell_rate(r['tokens_per_second_extrapolated'])} {EXTRAPOLATED}"),
            f"{rate} {PUBLISHED}" if rate and not setup.sizes.toy else "",
            cell(line, lambda r: spell_bytes(r["peak_device_bytes"])),
            cell(line, lambda r: deviation(r["predicted_device_bytes"], r["peak_device_bytes"])),
        ]

    header = ["tokens", "method", "a layer forward / backward [s]", "tokens/s/GPU", "8 x H100", "peak", PREDICTED]
    rows = [row(parse_arm(text, tokens, 0)) for _, tokens, text in setup.sizes.rehearsals]
    return (
        f"`python -m benchmarks.rehearse`: two layers of Llama3-8B, {MEASURED}; exchanges are local copies, so that\n"
        "their time on a real link is missing. Published: the best setting of the method by others.\n\n"
        + markdown(header, rows)
    )


def deviation(predicted: int, measured: int) -> str:
    """Predicted bytes and how far they are from the measured ones."""
    return f"{spell_bytes(predicted)} ({predicted / measured - 1:+.1%})" if measured else spell_bytes(predicted)


def training(setup: Setup) -> str:
    """One row."""
    line = setup.lines.get(TRAINING)
    figures: Mapping[str, Callable[[Record], str]] = {
        "model": lambda r: r["flavor"],
        "tokens": lambda r: spell_length(r["tokens"]),
        "loss of each step": lambda r: ", ".join(f"{loss:.3f}" for loss in r["loss"]),
        "seconds a step": lambda r: ", ".join(f"{seconds:.3g}" for seconds in r["step_seconds"]),
        "peak": lambda r: spell_bytes(r["peak_device_bytes"]),
        PREDICTED: lambda r: deviation(r["predicted"]["device_bytes"], r["peak_device_bytes"]),
        "host": lambda r: f"{r['peak_host_bytes'] / GIB:.1f} GiB",
        f"host, {PREDICTED}": lambda r: spell_bytes(r["predicted"]["host_bytes"]),
    }
    return markdown(figures, [[cell(line, figure) for figure in figures.values()]])


def trace(setup: Setup) -> str:
    """One row, and where the trace is."""
    figures: Mapping[str, Callable[[Record], str]] = {
        "copies": lambda r: str(r["copies"]),
        "copy time [s]": lambda r: f"{r['copy_seconds']:.3g}",
        "kernel time [s]": lambda r: f"{r['kernel_seconds']:.3g}",
        "share of copy time beside kernels": lambda r: (
            "no copies" if r["hidden_share"] is None else f"{r['hidden_share']:.1%}"
        ),
        "trace": lambda r: f"`DIR/{r['trace']}`",
    }
    sizes = setup.sizes
    heads, kv_heads, chunk = sizes.traced_heads
    return (
        f"One layer of {heads} query and {kv_heads} KV heads, {spell_length(sizes.traced)} tokens over {sizes.ranks} "
        f'ranks, head chunk {chunk}, stash "host", forward and backward.\n\n'
        + markdown(figures, [[cell(setup.lines.get(TRACE), figure) for figure in figures.values()]])
    )
