"""Where a prediction of memory enters the benchmarks. It stands beside measured figures, never in their place."""

from __future__ import annotations

from dataclasses import dataclass

from torchtitan.config import JobConfig


@dataclass(frozen=True)
class Prediction:
    """Peak bytes that one rank is predicted to need.

    Attributes:
        device_bytes: device memory at the peak.
        host_bytes: host memory for what is moved out of the device.
        by_category: the parts of ``device_bytes``, e.g. parameters, optimizer, block inputs.
    """

    device_bytes: int
    host_bytes: int
    by_category: dict[str, int]


def predict(config: JobConfig) -> Prediction | None:
    """Predict the memory of one rank of the job; None where nothing predicts, and then no column shows one."""
    return None
