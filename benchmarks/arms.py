"""What a sweep runs: its arms, their order, and the command line of each."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torchtitan_upipe.job.shape import HIDDEN_ON_HOST
from torchtitan_upipe.job_config import ContextParallel

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

CHUNKED = "upipe"  # the method that takes a head chunk
OF_METHODS = {  # fields of [context_parallel] that only some methods have, and their value for all others
    "ring_degree": (("upipe", "ulysses"), 1),
    "query_tiles": (("upipe",), ContextParallel.query_tiles),
    "sequence_chunk": (("fpdt",), ContextParallel.sequence_chunk),
    "hidden_states": (HIDDEN_ON_HOST, ContextParallel.hidden_states),
}
SET_BY_SWEEP = (
    "context_parallel.method",
    "context_parallel.head_chunk",
    "training.seq_len",
    "training.steps",
    "job.dump_folder",
    "metrics.log_freq",
)
INSTEAD = "use --arms or --methods, --head_chunks, --seq_lens, --steps and --out"
SECTION = "context_parallel"  # of fields without one
UNITS = {"k": 2**10, "m": 2**20}


@dataclass(frozen=True, order=True)
class Arm:
    """One job of a sweep.

    Attributes:
        method: of context parallelism.
        head_chunk: 0 where it means all heads, or nothing.
        seq_len: tokens.
        fields: what else is set, by name, as in ``"query_tiles=2 stash=none"``; ``[context_parallel]`` goes unsaid.
    """

    method: str
    head_chunk: int
    seq_len: int
    fields: str = ""

    @property
    def options(self) -> str:
        """All but method and length, e.g. ``"U=8 stash=none"``; may be empty."""
        chunk = [f"U={self.head_chunk}"] if self.head_chunk else []
        return " ".join([*chunk, *self.fields.split()])

    @property
    def name(self) -> str:
        """Method and options, e.g. ``"upipe U=8"``: the name in every table and plot."""
        return " ".join([self.method, *self.options.split()])

    @property
    def overrides(self) -> list[str]:
        """The command line that makes a job file this arm's job."""
        values = {
            "context_parallel.method": self.method,
            "context_parallel.head_chunk": str(self.head_chunk),
            "training.seq_len": str(self.seq_len),
        }
        values |= {
            f"{SECTION}.{name}": str(value)
            for name, (methods, value) in OF_METHODS.items()
            if self.method not in methods
        }
        values |= {full_name(name): value for name, _, value in (word.partition("=") for word in self.fields.split())}
        return [word for name, value in values.items() for word in _option(name, value)]


@dataclass(frozen=True)
class Run:
    """One execution of an arm; a sweep has one per arm and round."""

    arm: Arm
    round: int

    @property
    def key(self) -> str:
        """Names the run in the results and on disk."""
        arm = self.arm
        return "-".join([arm.method, f"U{arm.head_chunk}", *arm.fields.split(), f"S{arm.seq_len}", f"r{self.round}"])


def plan(arms: Sequence[str], seq_lens: Sequence[int], rounds: int, *, default_chunk: int) -> list[Run]:
    """All runs in order: round by round, so that a drift of the machine reaches every arm alike (A B C A B C).

    Args:
        arms: as :func:`parse_arm` reads them.

    Raises:
        ValueError: nothing to run, an arm that cannot be read, or the same arm or length twice.
    """
    if not arms or not seq_lens or rounds < 1:
        raise ValueError("a sweep needs at least one method, one sequence length and one round.")
    parsed = [parse_arm(text, seq_len, default_chunk) for seq_len in seq_lens for text in arms]
    arm, count = Counter(parsed).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{arm.name} over {spell_length(arm.seq_len)} tokens is named {count} times; name it once.")
    return [Run(arm, number) for number in range(rounds) for arm in parsed]


def spell_arms(methods: Sequence[str], head_chunks: Sequence[int]) -> list[str]:
    """Arms that differ in nothing but method and head chunk: every chunk, for the method that has chunks.

    Raises:
        ValueError: chunks without the method that has them.
    """
    if head_chunks and CHUNKED not in methods:
        raise ValueError(f'--head_chunks applies to "{CHUNKED}", which --methods does not name.')
    chunked = [f"{CHUNKED} head_chunk={chunk}" for chunk in head_chunks] or [CHUNKED]
    return [arm for method in methods for arm in (chunked if method == CHUNKED else [method])]


def parse_arm(text: str, seq_len: int, default_chunk: int) -> Arm:
    """An arm as it is written: a method, then fields: ``"upipe head_chunk=4 stash=none optimizer.lr=1e-4"``.

    Whether the job has such fields is not looked at here.

    Args:
        text: a field without a section is one of ``[context_parallel]``.
        seq_len: tokens.
        default_chunk: the head chunk of an arm that does not name one, the job file's.

    Raises:
        ValueError: not of this form, a field twice, or one that is not an arm's.
    """
    method, *words = text.split() or [""]
    if "=" in method or not method:
        raise ValueError(f'the arm {text!r} must begin with a method, as in "{CHUNKED} head_chunk=4 stash=none".')
    values: dict[str, str] = {}
    for word in words:
        match = re.fullmatch(r"([\w.-]+)=([^=/]+)", word)  # of what may name a folder
        if not match:
            raise ValueError(f"{word!r} in the arm {text!r} must be a field and its value, as in stash=none.")
        name = match[1].replace("-", "_").removeprefix(f"{SECTION}.")
        if name in values:
            raise ValueError(f"the arm {text!r} sets {name} twice; set it once.")
        if name != "head_chunk" and full_name(name) in SET_BY_SWEEP:
            raise ValueError(f"the arm {text!r} sets {name}, which is set by the sweep; {INSTEAD}.")
        values[name] = match[2]
    if "head_chunk" in values and method != CHUNKED:
        raise ValueError(f'the arm {text!r} sets head_chunk, which applies to "{CHUNKED}"; remove it.')
    chunk = parse_count(values.pop("head_chunk")) if "head_chunk" in values else default_chunk
    fields = " ".join(f"{name}={value}" for name, value in sorted(values.items()))
    return Arm(method, chunk if method == CHUNKED else 0, seq_len, fields)


def full_name(name: str) -> str:
    """A field with its section, ``[context_parallel]`` where it has none."""
    return name if "." in name else f"{SECTION}.{name}"


def _option(name: str, value: str) -> list[str]:
    """A field on the command line, where switches have no value."""
    section, _, last = name.rpartition(".")
    return {"true": [f"--{name}"], "false": [f"--{section}.no-{last}"]}.get(value, [f"--{name}", value])


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
            raise ValueError(f"--{name} is set by the sweep; {INSTEAD}.")


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
