"""What a job prints."""

from __future__ import annotations

from torchtitan.tools.logging import init_logger


def init_console() -> None:
    """TorchTitan's log lines."""
    init_logger()
