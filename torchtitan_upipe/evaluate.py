"""Evaluate: ``torchrun --nproc_per_node 4 -m torchtitan_upipe.evaluate --job.config_file train_configs/....toml``.

Of the weights that training would go on from, in the layout that it has. Without torchrun on one rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from torchtitan_upipe.device import leave
from torchtitan_upipe.titan.command import run_command
from torchtitan_upipe.titan.trainer import evaluate_job


def main(args: Sequence[str] | None = None) -> int:
    """Evaluate the job of the command line; return the exit code."""
    return run_command(args, evaluate_job, "--evaluation.enable")


if __name__ == "__main__":
    leave(main())
