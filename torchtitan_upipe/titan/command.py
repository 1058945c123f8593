"""What commands that run a job on its ranks share: how they begin, and how they end where they cannot go on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from torchtitan.config import JobConfig

from torchtitan_upipe.device import refuse_idle_gpus
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.launch import fail, refuse, stand_alone
from torchtitan_upipe.titan.console import init_console
from torchtitan_upipe.titan.failure import explain


def run_command(args: Sequence[str] | None, run: Callable[[JobConfig], object], *options: str) -> int:
    """Run the job of the command line; return the exit code.

    Args:
        args: the command line without the program; by default this process's.
        options: fields of the job that the command sets.
    """
    stand_alone()
    init_console()
    try:
        refuse_idle_gpus()
        config = read_job([*(sys.argv[1:] if args is None else args), *options])
    except ValueError as error:
        return refuse(error)
    return run_or_explain(config, lambda: run(config))


def run_or_explain(config: JobConfig, run: Callable[[], object]) -> int:
    """Call ``run``; return the exit code: 1 where it ends in an exception that one sentence says, which is reported."""
    try:
        run()
    except Exception as error:
        sentence = explain(config, error)
        if sentence is None:
            raise
        return fail(sentence)
    return 0
