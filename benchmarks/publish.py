"""What a sweep leaves for readers: a Markdown page, plots, TensorBoard scalars."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from benchmarks.arms import Arm
from benchmarks.plots import plot_sweep
from benchmarks.results import Record, summarise
from benchmarks.tables import provenance, sweep_tables


def publish(records: Sequence[Record], folder: Path) -> str:
    """Write ``table.md``, ``*.png`` and ``tb/`` below ``folder``, anew each time; return the page."""
    results = summarise(records)
    page = sweep_tables(results) + "\nMeasured on:\n\n" + provenance(records)
    (folder / "table.md").write_text(page)
    plot_sweep(results, folder)
    shutil.rmtree(folder / "tb", ignore_errors=True)
    for record in records:
        if record["status"] == "ok":
            _write_scalars(record, folder / "tb" / record["run"])
    return page


def _write_scalars(record: Record, folder: Path) -> None:
    """Loss and step time over steps; throughput and memory over context."""
    with SummaryWriter(str(folder)) as writer:
        for step, loss in enumerate(record["loss"], start=1):
            writer.add_scalar("loss", loss, step)
        for step, seconds in enumerate(record["step_seconds"], start=record["warmup_steps"] + 1):
            writer.add_scalar("step_seconds", seconds, step)
        tokens = Arm(**record["arm"]).seq_len
        writer.add_scalar("over_context/tokens_per_second_per_rank", record["tokens_per_second_per_rank"], tokens)
        writer.add_scalar("over_context/peak_device_bytes", record["peak_device_bytes"], tokens)
