"""Where a prediction of memory enters the benchmarks. It stands beside measured figures, never in their place."""

from __future__ import annotations

from torchtitan.config import JobConfig

from torchtitan_upipe.memory import ledger
from torchtitan_upipe.memory.prediction import Prediction

__all__ = ["Prediction", "predict"]


def predict(config: JobConfig, *, workspace: bool = True) -> Prediction | None:
    """Predict the memory of one rank of the job; None where nothing predicts, and then no column shows one.

    Args:
        config: the job.
        workspace: count what the attention kernel's backward holds beside its results, as GPU kernels do.
    """
    if config.context_parallel.method == "torchtitan":
        return None
    return ledger.predict(config, workspace=workspace)
