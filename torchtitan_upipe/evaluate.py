"""Evaluate: ``torchrun --nproc_per_node 4 -m torchtitan_upipe.evaluate --job.config_file train_configs/....toml``.

Of the weights that training would go on from, in the layout that it has. Without torchrun on one rank.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torchtitan_upipe.device import leave, refuse_idle_gpus
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.launch import fail, refuse, stand_alone
from torchtitan_upipe.titan.console import init_console
from torchtitan_upipe.titan.failure import explain
from torchtitan_upipe.titan.trainer import evaluate_job


def main(args: Sequence[str] | None = None) -> int:
    """Evaluate the job of the command line; return the exit code."""
    stand_alone()
    init_console()
    try:
        refuse_idle_gpus()
        config = read_job([*(sys.argv[1:] if args is None else args), "--evaluation.enable"])
    except ValueError as error:
        return refuse(error)
    try:
        evaluate_job(config)
    except Exception as error:
        sentence = explain(config, error)
        if sentence is None:
            raise
        return fail(sentence)
    return 0


if __name__ == "__main__":
    leave(main())
