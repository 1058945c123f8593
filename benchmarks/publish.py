"""What a sweep leaves for readers: a Markdown page, plots, TensorBoard scalars."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from benchmarks.plots import plot_sweep
from benchmarks.results import ArmResult, Record, summarise
from benchmarks.tables import arm_names, provenance, sweep_tables


def publish(records: Sequence[Record], folder: Path) -> str:
    """Write ``table.md``, ``*.png`` and ``tb/`` below ``folder``, anew each time; return the page."""
    results = summarise(records)
    page = sweep_tables(results) + "\nMeasured on:\n\n" + provenance(records)
    (folder / "table.md").write_text(page)
    plot_sweep(results, folder)
    shutil.rmtree(folder / "tb", ignore_errors=True)
    for record in records:
        if record["status"] == "ok":
            _write_steps(record, folder / "tb" / record["run"])
    for name in arm_names(results):
        of_name = {arm.seq_len: result for arm, result in results.items() if arm.name == name}
        _write_contexts(of_name, folder / "tb" / name.replace(" ", "-"))
    return page


def _write_steps(record: Record, folder: Path) -> None:
    """Loss and step time of a run over its steps."""
    with SummaryWriter(str(folder)) as writer:
        for step, loss in enumerate(record["loss"], start=1):
            writer.add_scalar("run/loss", loss, step)
        for step, seconds in enumerate(record["step_seconds"], start=record["warmup_steps"] + 1):
            writer.add_scalar("run/step_seconds", seconds, step)


def _write_contexts(results: Mapping[int, ArmResult], folder: Path) -> None:
    """Throughput and memory of an arm over its contexts, in tokens."""
    with SummaryWriter(str(folder)) as writer:
        for tokens, result in sorted(results.items()):
            if result.status == "ok":
                writer.add_scalar("over_context/tokens_per_second_per_rank", result.tokens_per_second, tokens)
                writer.add_scalar("over_context/peak_device_bytes", result.peak_device, tokens)
