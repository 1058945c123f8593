"""An evaluation as tables and as scalars."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from torchtitan_upipe.job.results import NeedleResult, Results

WIDE = 160  # columns of a table in a file, which no terminal limits


def scalars(results: Results) -> dict[str, float]:
    """What goes to TensorBoard: means over depths by length and keys, losses by length, the gain."""
    values: dict[str, float] = {}
    for length, keys in dict.fromkeys((n["length"], n["keys"]) for n in results.needles):
        cells = [n for n in results.needles if (n["length"], n["keys"]) == (length, keys)]
        where = f"{length}/{keys}_keys"
        values[f"evaluation/exact_match/{where}"] = sum(n["exact_match"] for n in cells) / len(cells)
        values[f"evaluation/log_probability/{where}"] = sum(n["log_probability"] for n in cells) / len(cells)
    values |= {f"evaluation/loss_at/{length}": loss for length, loss in results.loss_at.items()}
    if results.context_gain is not None:
        values["evaluation/context_gain"] = results.context_gain["gain"]
    return values


def print_tables(results: Results) -> None:
    """Print what was found."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    for keys in dict.fromkeys(n["keys"] for n in results.needles):
        cells = [n for n in results.needles if n["keys"] == keys]
        what = "one needle" if keys == 1 else f"one of {keys} needles"
        console.print(
            f"Step {results.step}, {what}: exact match of {cells[0]['trials']}, and the answer's log-probability"
        )
        console.print(_needle_table(cells))
    if results.loss_by_position:
        console.print(f"Step {results.step}, loss by position in the document, {results.seq_len:,} tokens a sequence")
        console.print(_loss_table(results))
    if results.context_gain is not None:
        gain = results.context_gain
        console.print(
            f"Loss of {gain['tokens']} last tokens with {results.seq_len} tokens of context {gain['full']:.4f}, with "
            f"{gain['truncated_context']} {gain['truncated']:.4f}: gain {gain['gain']:+.4f}"
        )
    elif results.loss_at:
        console.print("No gain of context: no sequence ends with a document that reaches over the truncated context.")


def _needle_table(cells: list[NeedleResult]) -> Table:
    table = Table()
    table.add_column("tokens", justify="right")
    depths = list(dict.fromkeys(n["depth"] for n in cells))
    for depth in depths:
        table.add_column(f"depth {depth:.0%}", justify="right")
    for length in dict.fromkeys(n["length"] for n in cells):
        row = [n for n in cells if n["length"] == length]
        table.add_row(f"{length:,}", *(f"{n['exact_match']:.0%} ({n['log_probability']:.2f})" for n in row))
    return table


def _loss_table(results: Results) -> Table:
    table = Table()
    for name in ("position", "tokens", "loss"):
        table.add_column(name, justify="right")
    for row in results.loss_by_position:
        table.add_row(f"{row['from']:,} to {row['to'] - 1:,}", f"{row['tokens']:,}", f"{row['loss']:.4f}")
    table.add_section()
    for length, loss in results.loss_at.items():
        table.add_row(f"all, of {int(length):,}", "", f"{loss:.4f}")
    return table
