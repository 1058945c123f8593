"""All that one GPU must show, in one command.

    python -m benchmarks.gpu --out DIR [--minutes 25]

Five parts, each with a share of the time: the tests that need a GPU; rates of kernels, products and copies; rehearsals
of one rank of eight; real training on one GPU; a profiler's trace. Each result is a line of ``DIR/results.jsonl`` at
once; what fails leaves a line with its reason. Started again with the same DIR it measures what has no line yet. Needs
no network. Where there is no GPU the same is run at toy sizes (``--toy``).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.items import Setup, run_parts
from benchmarks.gpu.pages import page
from benchmarks.gpu.rates import rates_of_run, rates_part
from benchmarks.gpu.rehearsals import rehearsals_part
from benchmarks.gpu.sizes import REAL, TOY
from benchmarks.gpu.suite import suite_part
from benchmarks.gpu.trace import trace_part
from benchmarks.gpu.training import training_part
from benchmarks.results import ResultsFile
from torchtitan_upipe.kernels.rates import TABLE, write_rates
from torchtitan_upipe.launch import refuse

PARTS = {
    "tests": suite_part,
    "rates": rates_part,
    "rehearsals": rehearsals_part,
    "training": training_part,
    "trace": trace_part,
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the lines; an existing one is continued")
    parser.add_argument("--minutes", type=float, default=25, help="for all parts together (25)")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, with commas (all)")
    parser.add_argument("--retry", action="store_true", help="run again what has failed, too")
    parser.add_argument("--toy", action="store_true", help="toy sizes; always so where there is no GPU")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write the tables of the lines to FILE; run nothing"
    )
    parser.add_argument(
        "--write-rates",
        type=Path,
        nargs="?",
        const=TABLE,
        metavar="FILE",
        help="put the measured rates into the table of kernel rates; run nothing",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or write what was measured; return the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a process under way is ended too
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # in what it starts: nothing waits for a network
    options = parse(arguments)
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    writes = options.report or options.write_rates
    toy = options.toy or (device_type == "cpu" and not writes)
    folder = options.out.resolve()
    try:
        unknown = [name for name in options.parts.split(",") if name not in PARTS]
        if unknown:
            raise ValueError(f"--parts {options.parts}: {unknown[0]!r} is none of {', '.join(PARTS)}.")
        retry_before = len(ResultsFile(folder).load()) if options.retry else 0
        setup = Setup(folder, TOY if toy else REAL, device_type, retry_before)
        setup.read()
        if options.report:
            options.report.write_text(page(setup, str(options.report)))
        if options.write_rates:
            _write_rates(setup, options.write_rates)
        if not writes:
            _measure(setup, options)
    except ValueError as error:
        return refuse(error)
    return 0


def _measure(setup: Setup, options: argparse.Namespace) -> None:
    setup.folder.mkdir(parents=True, exist_ok=True)
    if setup.sizes.toy:
        print("A toy run: it shows that the command works; its figures mean nothing.", flush=True)
    parts = [PARTS[name](setup) for name in PARTS if name in options.parts.split(",")]
    with ResultsFile(setup.folder).writing():
        setup.read()
        try:
            run_parts(setup, parts, 60 * options.minutes, lambda line: print(line, flush=True))
        finally:
            setup.worker.end()
    print(f"\n{page(setup, 'FILE')}")


def _write_rates(setup: Setup, path: Path) -> None:
    entry = rates_of_run(setup.lines.values())
    if entry is None:
        raise ValueError(f"{setup.folder} holds no rates of attention kernels; run `--parts rates` on a GPU first.")
    if setup.sizes.toy and path == TABLE:
        raise ValueError("the rates of a toy run mean nothing; name another file after --write-rates.")
    write_rates(entry, path)


if __name__ == "__main__":
    sys.exit(main())
