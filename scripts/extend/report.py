"""Gather what the context extension demo found: heat maps of needles, their figures, and the loss curve.

python scripts/extend/report.py outputs/extend docs/extend
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

MEAN_OF = 20  # steps


def main(run: Path, folder: Path) -> None:
    """Write into ``folder`` what the demo left in ``run``."""
    folder.mkdir(parents=True, exist_ok=True)
    stages = sorted(run.glob("[0-9][0-9]-*"))
    for name, job in (("before", run / "before"), ("theta_alone", run / "theta_alone"), ("after", stages[-1])):
        (figures,) = (job / "evaluation").glob("step-*.json")
        shutil.copyfile(figures, folder / f"{name}.json")
        shutil.copyfile(figures.with_name(f"{figures.stem}-needles.png"), folder / f"{name}.png")
    draw_losses(stages, folder / "loss.png")


def draw_losses(stages: list[Path], file: Path) -> None:
    """The loss of each stage, one after another."""
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    begun = 0
    for number, stage in enumerate(stages):
        losses = read_losses(stage)
        steps = begun + np.arange(1, len(losses) + 1)
        means = np.convolve(losses, np.full(MEAN_OF, 1 / MEAN_OF), "valid")
        axes.plot(steps, losses, color=f"C{number}", alpha=0.3, linewidth=0.8)
        axes.plot(steps[MEAN_OF - 1 :], means, color=f"C{number}", label=f"{stage.name[3:]} tokens")
        begun += len(losses)
    axes.set(xlabel="step", ylabel="loss [nats/token]", title=f"each step, and the mean of {MEAN_OF}")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def read_losses(stage: Path) -> list[float]:
    """The loss of each step of a stage."""
    (run,) = stage.glob("tb/*")
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return [event.value for event in events.Scalars("loss_metrics/global_avg_loss")]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
