"""Train: ``torchrun --nproc_per_node 4 -m torchtitan_upipe.train --job.config_file train_configs/....toml``.

Without torchrun the job runs on one rank. A batch's way from here: ``titan/trainer.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torchtitan_upipe.device import leave
from torchtitan_upipe.titan.command import run_command
from torchtitan_upipe.titan.trainer import run_job


def main(args: Sequence[str] | None = None) -> int:
    """Run the job of the command line; return the exit code."""
    return run_command(args, run_job)


if __name__ == "__main__":
    leave(main())
