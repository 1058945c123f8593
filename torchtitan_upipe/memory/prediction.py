"""What both legs of the ledger say about one rank's memory."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Prediction:
    """Peak bytes of one rank in one training step, steady state (optimizer state exists).

    Attributes:
        device_bytes: of tensors on the device; the CUDA context, NCCL's buffers and fragmentation come on top.
        host_bytes: of tensors in host memory.
        device: bytes by category at the device's peak (``memory/moments.py`` lists the categories).
        host: bytes by category at the host's peak.
        moment: what runs at the device's peak, e.g. ``"layers.7.attention backward"``.
    """

    device_bytes: int
    host_bytes: int
    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    moment: str = ""
