"""What a sweep runs: its arms, their order, and the command line of each."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

CHUNKED = "upipe"  # the method that takes a head chunk
HYBRID = ("upipe", "ulysses")  # the methods that a job's ring_degree applies to
SET_BY_SWEEP = (
    "context_parallel.method",
    "context_parallel.head_chunk",
    "training.seq_len",
    "training.steps",
    "job.dump_folder",
    "metrics.log_freq",
)
UNITS = {"k": 2**10, "m": 2**20}


@dataclass(frozen=True, order=True)
class Arm:
    """One job of a sweep: ``method`` with ``head_chunk`` (0: all heads, or no meaning) over ``seq_len`` tokens."""

    method: str
    head_chunk: int
    seq_len: int

    @property
    def name(self) -> str:
        """Method and head chunk, e.g. ``"upipe U=8"``: the name in every table and plot."""
        return f"{self.method} U={self.head_chunk}" if self.head_chunk else self.method

    @property
    def overrides(self) -> list[str]:
        """The fields that make a job file this arm's job."""
        fields = {
            "context_parallel.method": self.method,
            "context_parallel.head_chunk": self.head_chunk,
            "training.seq_len": self.seq_len,
        }
        if self.method not in HYBRID:
            fields["context_parallel.ring_degree"] = 1
        return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


@dataclass(frozen=True)
class Run:
    """One execution of an arm; a sweep has one per arm and round."""

    arm: Arm
    round: int

    @property
    def key(self) -> str:
        """Names the run in the results and on disk."""
        return f"{self.arm.method}-U{self.arm.head_chunk}-S{self.arm.seq_len}-r{self.round}"


def plan(
    methods: Sequence[str], head_chunks: Sequence[int], seq_lens: Sequence[int], rounds: int, *, default_chunk: int
) -> list[Run]:
    """All runs in order: round by round, so that a drift of the machine reaches every arm alike (A B C A B C).

    Args:
        head_chunks: one arm each, for the method that has chunks; empty means ``default_chunk``, the job file's.

    Raises:
        ValueError: nothing to run, or the same method, chunk or length twice.
    """
    for name, values in {"methods": methods, "seq_lens": seq_lens, "head_chunks": head_chunks}.items():
        if len(set(values)) != len(values):
            raise ValueError(f"--{name} {','.join(map(str, values))} names one of them twice.")
    if not methods or not seq_lens or rounds < 1:
        raise ValueError("a sweep needs at least one method, one sequence length and one round.")
    if head_chunks and CHUNKED not in methods:
        raise ValueError(f'--head_chunks applies to "{CHUNKED}", which --methods does not name.')
    arms = [
        Arm(method, chunk, seq_len)
        for seq_len in seq_lens
        for method in methods
        for chunk in ((head_chunks or [default_chunk]) if method == CHUNKED else [0])
    ]
    return [Run(arm, number) for number in range(rounds) for arm in arms]


def parse_count(text: str) -> int:
    """``"8k"`` is 8192, ``"1m"`` 1048576; plain numbers stand for themselves.

    Raises:
        ValueError: not a positive number with an optional k or m.
    """
    match = re.fullmatch(r"(\d+)([km]?)", text.strip().lower())
    if not match or not int(match[1]):
        raise ValueError(f"{text!r} is not a positive number; write 8192, 8k or 1m.")
    return int(match[1]) * UNITS.get(match[2], 1)


def spell_length(tokens: int) -> str:
    """The inverse of :func:`parse_count`: ``8192`` to ``"8K"``."""
    for unit in ("m", "k"):
        if tokens % UNITS[unit] == 0:
            return f"{tokens // UNITS[unit]}{unit.upper()}"
    return str(tokens)


def check_overrides(arguments: Sequence[str]) -> None:
    """Refuse fields that the sweep sets itself.

    Raises:
        ValueError: which one, and what to use instead.
    """
    for argument in arguments:
        name = argument.removeprefix("--").split("=", 1)[0].replace("-", "_")
        if argument.startswith("--") and name in SET_BY_SWEEP:
            raise ValueError(
                f"--{name} is set by the sweep; use --methods, --head_chunks, --seq_lens, --steps and --out."
            )


def world_size(config: JobConfig) -> int:
    """Number of ranks of a job.

    Raises:
        ValueError: the job leaves it open.
    """
    p = config.parallelism
    if p.data_parallel_shard_degree < 1:
        raise ValueError("parallelism.data_parallel_shard_degree = -1 leaves the number of ranks open; set it.")
    degree: int = p.context_parallel_degree * p.data_parallel_replicate_degree * p.data_parallel_shard_degree
    return degree


def node_rank() -> int:
    """This node's number among those that run the same sweep."""
    return int(os.environ.get("NODE_RANK", "0"))


def torchrun(ranks: int, module: str, arguments: Sequence[str]) -> list[str]:
    """The command that starts ``module`` on ``ranks`` ranks: of this node, or of the ``NNODES`` that run this sweep.

    ``NODE_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT`` are read as by ``scripts/launch.sh``.

    Raises:
        ValueError: the ranks do not divide over the nodes, or a variable is missing.
    """
    nodes = int(os.environ.get("NNODES", "1"))
    if ranks % nodes:
        raise ValueError(f"{ranks} ranks do not divide over NNODES = {nodes} nodes.")
    rendezvous = ["--standalone"]
    if nodes > 1:
        missing = [name for name in ("NODE_RANK", "MASTER_ADDR") if name not in os.environ]
        if missing:
            raise ValueError(f"NNODES = {nodes} needs {' and '.join(missing)} in the environment.")
        rendezvous = ["--nnodes", str(nodes), "--node_rank", os.environ["NODE_RANK"]]
        rendezvous += ["--master_addr", os.environ["MASTER_ADDR"]]
        rendezvous += ["--master_port", os.environ.get("MASTER_PORT", "29500")]
    launcher = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--nproc_per_node", str(ranks // nodes)]
    return [*launcher, "-m", module, *arguments]


def launch_environment() -> dict[str, str]:
    """The environment of a job, as ``scripts/launch.sh`` sets it, with this project importable."""
    root = str(Path(__file__).parent.parent)
    defaults = {"OMP_NUM_THREADS": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**defaults, **os.environ, "PYTHONPATH": path}
