"""What a job prints: TorchTitan's lines, without those that say the same at every start of every job.

``LOG_RANK`` (``"0"`` by default, e.g. ``"0,1"``) names the ranks of a node that print more than warnings; ``LOG_ALL=1``
prints every line.
"""

from __future__ import annotations

import logging
import os
import re
import warnings

from torchtitan.tools.logging import init_logger

from torchtitan_upipe.launch import local_rank

LINES = (  # beginnings
    "ENV[TORCH_NCCL",
    "[GC]",
    "Building device mesh with parallelism",
    "Destroying the purge thread",
    "Error running lspci",
    "Loading tokenizer from",
    "Mixed precision training is handled",
    "Peak FLOPS used for computing MFU",
    "Peak flops undefined for",
    "Process group timeout was set",
    "Sleeping 2 seconds",
    "Successfully created meshes",
    "Synchronizing and adjusting timeout",
    "model.safetensors.index.json not found",
)
SAID_BETTER = re.compile(r"^(\x1b\[[0-9;]*m)?step: |[A-Z]+ memory allocation retries\.$")
WARNINGS = (  # patterns of what is nothing to a job's writer
    "'set_vital' is deprecated",
    "DTensor (random operators|manual_seed)",
    "In CPU autocast, but the target dtype is not supported",
    "Set timeout is now only supported",
)


class FromBelow(logging.Filter):
    """Keeps a line unless it is one of ``LINES``, a model's arguments, or no warning and from a rank not shown.

    TorchTitan's own line of a step and its warning about retries are said better elsewhere (``titan/metrics.py``).
    """

    def __init__(self, shown: bool) -> None:
        super().__init__()
        self.shown = shown

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to print ``record``."""
        message = record.getMessage()
        if record.levelno < logging.WARNING and not self.shown:
            return False
        if SAID_BETTER.search(message):
            return False
        return not message.startswith(LINES) and not (message.startswith("Building ") and "\n" in message)


def init_console() -> None:
    """TorchTitan's logger, filtered, and Python's warnings likewise."""
    init_logger()
    if os.environ.get("LOG_ALL", "0") != "0":
        return
    shown = str(local_rank()) in os.environ.get("LOG_RANK", "0").split(",")
    for handler in logging.getLogger().handlers:
        handler.addFilter(FromBelow(shown))
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    for pattern in WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
