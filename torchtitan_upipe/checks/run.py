"""All checks in turn: measured on every rank, judged on rank 0, which waits for no rank for ever."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.config import JobConfig
from torchtitan.distributed.utils import init_distributed, set_pg_timeouts
from torchtitan.tools.utils import device_module, device_type

from torchtitan_upipe.checks.board import Board, Missing
from torchtitan_upipe.checks.collectives import judge_collectives, measure_collectives
from torchtitan_upipe.checks.disk import judge_disk, measure_disk
from torchtitan_upipe.checks.kernel import judge_kernel, measure_kernel
from torchtitan_upipe.checks.limits import judge_limits, measure_limits
from torchtitan_upipe.checks.links import judge_links, measure_links
from torchtitan_upipe.checks.memory import judge_memory, longer_shape, measure_memory
from torchtitan_upipe.checks.model import judge_leaks, judge_steps, measure_leaks, measure_steps
from torchtitan_upipe.checks.report import Check, Hosts, Result, Verdict
from torchtitan_upipe.checks.short import ShortTrainer, shorten
from torchtitan_upipe.job.shape import job_shape
from torchtitan_upipe.launch import local_rank
from torchtitan_upipe.titan.settings import choose_settings

PATIENCE = 60.0  # seconds for a collective, and for a rank that others wait for

Show = Callable[[Result], None]
GiveUp = Callable[[Sequence[Result]], None]


class State(IntEnum):
    """What ranks can still do: everything; what each does alone, since their collectives may not fit; nothing."""

    WHOLE, BROKEN, LOST = range(3)


@dataclass(frozen=True)
class Broken:
    """In the place of a rank's findings: what kept it from them."""

    sentence: str


@dataclass
class Bench:
    """What checks work on, on this rank.

    Attributes:
        config: the job, with its settings chosen; ranks know each other.
        time_limit: ``--time-limit``.
        board: where findings go.
        short_seconds, save_seconds: what the checks of memory and disk leave for that of time.
    """

    config: JobConfig
    time_limit: str
    board: Board
    short_seconds: float = 0.0
    save_seconds: float = 0.0
    _trainer: list[ShortTrainer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.job = job_shape(self.config, dist.get_world_size(), dist.get_rank())
        self.mark = self.board.mark

    @property
    def trainer(self) -> ShortTrainer:
        """Of the short job."""
        return self._trainer[0]

    def build(self) -> str:
        """Make the groups and the model of the short job; what is short about it."""
        self._trainer.append(ShortTrainer(shorten(self.config, dist.get_world_size())))
        set_pg_timeouts(timedelta(seconds=PATIENCE), self.trainer.parallel_dims)
        return self.trainer.short.said

    def memory(self) -> Any:
        """See ``memory.py``."""
        found = measure_memory(self.trainer, self.job, self.mark)
        self.short_seconds = found.seconds
        return found

    def disk(self) -> Any:
        """See ``disk.py``."""
        found = measure_disk(self.config, self.job, self.mark)
        self.save_seconds = found.seconds
        return found

    def limits(self) -> Any:
        """See ``limits.py``."""
        short, seconds = longer_shape(self.trainer), self.short_seconds
        return measure_limits(self.config, self.job, short, seconds, self.save_seconds, self.time_limit, self.mark)


def _judge_start(findings: list[str], hosts: Hosts) -> Verdict:
    count = len(set(hosts.names))
    return Verdict(f"{len(findings)} ranks on {count} host{'s' if count > 1 else ''}; tried with {findings[0]}")


CHECKS = (
    Check("start", Bench.build, _judge_start),
    Check("collectives", lambda b: measure_collectives(b.trainer, b.job, b.mark), judge_collectives),
    Check("links", lambda b: measure_links(b.mark), judge_links),
    Check("attention kernel", lambda b: measure_kernel(b.job, b.mark), judge_kernel, together=False),
    Check("two steps", lambda b: measure_steps(b.trainer), judge_steps),
    Check("causality", lambda b: measure_leaks(b.trainer), judge_leaks),
    Check("memory", Bench.memory, judge_memory),
    Check("disk", Bench.disk, judge_disk, together=False),
    Check("time", Bench.limits, judge_limits),
)


def join_ranks(config: JobConfig) -> Board:
    """Let this process's rank know the others, choose what ``config`` leaves open, and make a board of them all.

    Raises:
        ValueError: no settings fit.
    """
    device_module.set_device(torch.device(f"{device_type}:{local_rank()}"))
    init_distributed(config.comm, config.training.enable_cpu_offload, config.job.dump_folder)
    choose_settings(config, dist.get_world_size())
    return Board(dist.get_rank(), dist.get_world_size(), PATIENCE)


def names_of_hosts(board: Board) -> Hosts:
    """The hosts of all ranks, on each of them."""
    board.put("hosts", socket.gethostname())
    if board.rank == 0:
        names = board.all("hosts")
        board.publish("all hosts", ["unknown" if isinstance(name, Missing) else name for name in names])
    return Hosts(board.read("all hosts"))


def run_checks(
    bench: Bench, hosts: Hosts, show: Show, give_up: GiveUp, checks: Sequence[Check] = CHECKS
) -> list[Result]:
    """Run ``checks``.

    Args:
        show: told each result, on every rank.
        give_up: told the results so far by rank 0 where that does not come back from a check; must end the process.
    """
    results: list[Result] = []
    state = State.WHOLE
    for check in checks:
        if state is State.LOST or (state is State.BROKEN and check.together):
            result = Result(check.name, "not run, since the ranks did not come through what was before", [], 0.0)
        else:
            result, after = _run(check, bench, hosts, lambda lost: give_up([*results, lost]))
            state = max(state, after)
        results.append(result)
        show(result)
    return results


def _run(check: Check, bench: Bench, hosts: Hosts, give_up: Callable[[Result], None]) -> tuple[Result, State]:
    """One check, and how it leaves the ranks."""
    board, began = bench.board, time.monotonic()
    board.mark(check.name)

    def lost() -> None:
        failures = _failures(check, list(board.missing(check.name).items()), hosts)
        give_up(Result(check.name, "not measured", failures, time.monotonic() - began))

    alarm = threading.Timer(2 * PATIENCE, lost)
    if board.rank == 0:
        alarm.start()
    try:
        findings: Any = check.measure(bench)
    except Exception as error:
        line = str(error).strip().partition("\n")[0]
        findings = Broken(f"{type(error).__name__}: {line}" if line else type(error).__name__)
    finally:
        alarm.cancel()
    board.put(check.name, findings)
    if board.rank == 0:
        board.publish(f"verdict on {check.name}", _judged(check, board.all(check.name), hosts, began))
    verdict: tuple[Result, State] = board.read(f"verdict on {check.name}")
    return verdict


def _judged(check: Check, findings: list[Any], hosts: Hosts, began: float) -> tuple[Result, State]:
    absent = [(rank, found) for rank, found in enumerate(findings) if isinstance(found, (Missing, Broken))]
    lost = Verdict("not measured", _failures(check, absent, hosts))
    verdict = lost if absent else check.judge(findings, hosts)
    state = State.BROKEN if absent else State.WHOLE
    if any(isinstance(found, Missing) for _, found in absent):
        state = State.LOST
    return Result(check.name, verdict.measured, verdict.failures, time.monotonic() - began), state


def _failures(check: Check, absent: Sequence[tuple[int, Missing | Broken]], hosts: Hosts) -> list[str]:
    """One sentence for all ranks with the same fate."""
    ranks: dict[str, list[int]] = {}
    for rank, found in absent:
        fate = found.sentence if isinstance(found, Broken) else f"no word since {found.at!r} began"
        ranks.setdefault(fate, []).append(rank)
    return [f"{check.name} did not end on {hosts.of(of_fate)}: {fate}." for fate, of_fate in ranks.items()]


def end_process(code: int) -> None:
    """End at once: ranks may wait in a collective that others have left."""
    os._exit(code)
