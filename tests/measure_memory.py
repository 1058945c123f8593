"""Measure what docs/memory.md states: ``python -m tests.measure_memory docs/memory.md`` (about 16 minutes).

Names of parts (``layer_peaks``, ``times``, ...) after the path: these alone.
"""

from __future__ import annotations

import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

from torchtitan_upipe.job.read import read_job  # isort: skip  (first: it chooses the device before torchtitan is imported)

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.jobs import job_args
from tests.measure import table
from tests.measure_steps import whole_steps
from tests.ranks import run_ranks
from torchtitan_upipe.cp.attention import LocalAttention
from torchtitan_upipe.cp.build import build_method
from torchtitan_upipe.cp.collectives import HeadExchange
from torchtitan_upipe.cp.fpdt import FPDT
from torchtitan_upipe.cp.head_schedule import build_head_schedule
from torchtitan_upipe.cp.rope import Rope
from torchtitan_upipe.cp.strategy import AttentionWeights
from torchtitan_upipe.cp.transform import NormThenRope
from torchtitan_upipe.cp.ulysses import Ulysses
from torchtitan_upipe.cp.upipe import UPipe
from torchtitan_upipe.dry_run.live_bytes import LiveBytes
from torchtitan_upipe.kernels.select import build_kernel
from torchtitan_upipe.kernels.simulated import SimulatedKernel
from torchtitan_upipe.stash.stash import KeptOnDevice, Stash

THREE_MILLION, SHORT = 3 * 2**20, 2**16


@dataclass(frozen=True)
class Model:
    """One attention layer in bfloat16 over ``degree`` ranks, without q/k norm."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    degree: int
    head_dim: int = 128


MODELS = [
    Model("Llama3-8B, C=8", 32, 8, 4096, 8),
    Model("Qwen3-32B, C=8", 64, 8, 5120, 8),
    Model("Qwen3-32B, C=16", 64, 8, 5120, 16),
]


class LoneRank(HeadExchange):
    """Rank 0 of ``size``: allocates what an exchange allocates, sends nothing."""

    def __init__(self, size: int) -> None:
        super().__init__(None)
        self.size = size

    def _all_to_all(self, send: Tensor, send_sizes: list[int], receive_sizes: list[int]) -> Tensor:
        return send.new_empty(sum(receive_sizes))


class Gone:
    """A tensor kept in another memory: takes none here until it is asked for."""

    def __init__(self, tensor: Tensor) -> None:
        self.leaving: Tensor | None = tensor
        self.back: Tensor | None = None
        self.new = partial(torch.empty, dtype=tensor.dtype)
        self.shape = tensor.shape

    def settle(self) -> None:
        self.leaving = None

    def begin_read(self, rows: slice) -> KeptOnDevice:
        if rows == slice(None) and self.back is not None:
            back, self.back = self.back, None
            return KeptOnDevice(back)
        count = len(range(self.shape[1])[rows])
        return KeptOnDevice(self.new(self.shape[0], count, *self.shape[2:]))

    def fetch(self) -> None:
        self.back = self.new(self.shape) if self.back is None else self.back

    def get(self) -> Tensor:
        self.fetch()
        assert self.back is not None
        return self.back


def layer_peak(
    model: Model, method: str, tiles: int, stash: str, workspace: bool, length: int = THREE_MILLION, chunk: int = 2**16
) -> float:
    """Peak of one layer's forward and backward in ``u``: x, y or dy, all temporaries; no weights."""
    with FakeTensorMode():
        tokens, width = length // model.degree, model.head_dim
        new = partial(torch.empty, dtype=torch.bfloat16, requires_grad=True)
        x, dy = new(1, tokens, model.dim), new(1, tokens, model.dim).detach()
        weights = AttentionWeights(
            wq=new(model.heads * width, model.dim),
            wk=new(model.kv_heads * width, model.dim),
            wv=new(model.kv_heads * width, model.dim),
            wo=new(model.dim, model.heads * width),
        )
        rope = Rope(torch.empty(width // 2, dtype=torch.float64), torch.arange(tokens)[None], interleaved=True)
        exchange = LoneRank(model.degree)
        attention = LocalAttention(SimulatedKernel("flash2", workspace), key_tiles=tiles)
        layer: Ulysses | UPipe | FPDT = Ulysses(model.heads, model.kv_heads, exchange, attention)
        new_stash = {"device": Stash, "host": partial(Stash, Gone)}[stash]
        if method == "upipe":
            schedule = build_head_schedule(model.heads, model.kv_heads, model.degree, model.degree)
            layer = UPipe(schedule, exchange, attention, new_stash, tiles)
        if method == "fpdt":
            layer = FPDT(model.heads, model.kv_heads, exchange, attention, new_stash, Gone, chunk)
        with LiveBytes() as meter:
            meter.ignore(dy, *(w for w in vars(weights).values() if w is not None))
            meter.adopt(x)
            y = layer(x, weights, NormThenRope(rope, 1e-6), width)
            y.backward(dy)  # y stays: it stands for the residual's dy, which does
        return meter.peak / x.nbytes


def layer_peaks() -> str:
    """The goals' table."""
    rows = []
    for model in MODELS:
        for workspace in (True, False):
            peaks = [layer_peak(model, "ulysses", 1, "device", workspace)]
            peaks += [layer_peak(model, "upipe", tiles, "host", workspace) for tiles in (1, 2, 4)]
            peaks.append(layer_peak(model, "upipe", 1, "device", workspace))
            peaks.append(layer_peak(model, "fpdt", 1, "host", workspace))
            rows.append((model.name, "yes" if workspace else "no", *(f"{peak:.2f}u" for peak in peaks)))
    columns = ["Ulysses", *(f"UPipe, host, T={t}" for t in (1, 2, 4)), "UPipe, device, T=1", "FPDT, host, 64K"]
    return table(("layer at 3M tokens, U = C", "workspace counted", *columns), rows)


def short_layer_peaks() -> str:
    """FPDT beside Ulysses where the weights' gradients, which FPDT sums in float32, are no small part."""
    rows = []
    for model in (*MODELS, replace(MODELS[0], name="Llama3-8B, C=2", degree=2)):
        for workspace in (True, False):
            peaks = [layer_peak(model, "ulysses", 1, "device", workspace, SHORT)]
            peaks += [layer_peak(model, "fpdt", 1, "host", workspace, SHORT, chunk) for chunk in (2**13, 2**12, 2**11)]
            rows.append((model.name, "yes" if workspace else "no", *(f"{peak:.2f}u" for peak in peaks)))
    columns = ["Ulysses", *(f"FPDT, host, {chunk}K" for chunk in (8, 4, 2))]
    return table(("layer at 64K tokens", "workspace counted", *columns), rows)


# --- time -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spent:
    """Seconds of one run.

    Attributes:
        wall: until the slowest rank was done.
        processor: of this rank's threads, which other work on the machine moves less.
    """

    wall: float
    processor: float


@contextmanager
def timed(spent: list[Spent]) -> Iterator[None]:
    """Append what a run took, between two meetings of all ranks."""
    dist.barrier()
    start, processor = time.perf_counter(), time.process_time()
    yield
    processor = time.process_time() - processor
    dist.barrier()
    spent.append(Spent(time.perf_counter() - start, processor))


def over_ranks(ranks: list[list[list[Spent]]]) -> list[tuple[float, float]]:
    """Median of each arm: seconds, and processor seconds of all ranks; the first round warms up."""
    arms = zip(*ranks, strict=True)
    return [
        (
            median(spent.wall for spent in arm[0][1:]),
            median(sum(spent.processor for spent in run) for run in list(zip(*arm, strict=True))[1:]),
        )
        for arm in arms
    ]


def ratio(times: tuple[float, float], first: tuple[float, float]) -> str:
    """Both times over those of ``first``, processor time in brackets."""
    return f"{times[0] / first[0]:.3f}x ({times[1] / first[1]:.3f}x)"


def step_times(length: int, arms: list[tuple[str, int, int]], rounds: int) -> list[list[Spent]]:
    """What this rank spent on one layer's forward and backward, arm after arm, ``rounds`` times."""
    rank, degree = dist.get_rank(), dist.get_world_size()
    heads, kv_heads, width, dim = 8, 2, 64, 512
    gen = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(1, length // degree, dim, generator=gen) for _ in range(2))
    shapes = {"wq": (heads * width, dim), "wk": (kv_heads * width, dim), "wv": (kv_heads * width, dim)}
    weights = AttentionWeights(
        **{name: torch.randn(shape, generator=gen).requires_grad_() for name, shape in shapes.items()},
        wo=torch.randn(dim, heads * width, generator=gen).requires_grad_(),
    )
    positions = torch.arange(length)[None].chunk(degree, dim=1)[rank]
    transform = NormThenRope(Rope(torch.rand(width // 2, dtype=torch.float64), positions, interleaved=True), 1e-6)
    spent: list[list[Spent]] = [[] for _ in arms]
    for _ in range(rounds):
        for (method, chunk, tiles), found in zip(arms, spent, strict=True):
            layer = build_method(
                method,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_chunk=chunk,
                new_stash=Stash,
                query_tiles=tiles,
                ulysses_group=dist.group.WORLD,
                ring_group=None,
                kernel=build_kernel("sdpa", "cpu"),
            )
            with timed(found):
                layer(x.requires_grad_(), weights, transform, width).backward(dy)
    return spent


def times() -> str:
    """UPipe's and FPDT's time over Ulysses'."""
    rows = []
    for degree, length, rounds in ((4, 2048, 41), (4, 4096, 25), (2, 8192, 9), (2, 16384, 5)):
        chunks = [(degree, 1), (degree, 4), (degree // 2, 1)]
        arms = [("ulysses", 0, 1), *(("upipe", chunk, tiles) for chunk, tiles in chunks)]
        first, *others = over_ranks(run_ranks(step_times, degree, length, arms, rounds, timeout=1200))
        rows.append(
            (degree, length, f"{first[0]:.2f} s ({first[1]:.2f} s)", *(ratio(other, first) for other in others))
        )
    columns = ("Ulysses", "UPipe, U = C", "UPipe, U = C, 4 query tiles", "UPipe, U = C/2 (two ranks share a head)")
    return table(("ranks", "S", *columns), rows)


def steps_rank(args: list[str]) -> tuple[float, float]:
    """Seconds, and processor seconds, of a training run of three steps, of which the first one counts as warm-up."""
    from torchtitan_upipe.titan.trainer import Trainer

    trainer = Trainer(read_job(args))
    stamps: list[tuple[float, float]] = []
    step = trainer.train_step

    def stamped(*arguments: object) -> None:
        step(*arguments)  # type: ignore[arg-type]
        stamps.append((time.perf_counter(), time.process_time()))

    trainer.train_step = stamped  # type: ignore[method-assign]
    trainer.train()
    trainer.close()
    return stamps[-1][0] - stamps[0][0], stamps[-1][1] - stamps[0][1]


def training_times(arms: list[dict[str, object]], rounds: int) -> list[tuple[float, float]]:
    """Median seconds, and processor seconds of both ranks, of a step over 16K tokens: arms in turn."""
    found: list[list[tuple[float, float]]] = [[] for _ in arms]
    for _ in range(rounds):
        for options, times in zip(arms, found, strict=True):
            with tempfile.TemporaryDirectory() as folder:
                chunk = {"context_parallel__head_chunk": 2, "activation_checkpoint__mode": "full", "training__steps": 3}
                args = job_args(Path(folder), 2, training__seq_len=16384, **chunk, **options)
                ranks = run_ranks(steps_rank, 2, args, init=False, timeout=900)
                times.append((max(wall for wall, _ in ranks) / 2, sum(processor for _, processor in ranks) / 2))
    return [(median(wall for wall, _ in times), median(processor for _, processor in times)) for times in found]


def hidden_times() -> str:
    """Training steps with hidden states on the device and in host memory."""
    names = ("device", "host")
    arms: list[dict[str, object]] = [
        {
            "context_parallel__hidden_states": name,
            "context_parallel__stash": "host",
            "context_parallel__tile_size": 2048,
            "activation_checkpoint__offload": name == "device",  # block inputs are in host memory either way
        }
        for name in names
    ]
    first, second = training_times(arms, 3)
    rows = [
        ("device", f"{first[0]:.2f} s ({first[1]:.2f} s)", ""),
        ("host", f"{second[0]:.2f} s ({second[1]:.2f} s)", ratio(second, first)),
    ]
    return table(("hidden_states", "a step", "host over device"), rows)


def checkpointing_times() -> str:
    """Training steps under full activation checkpointing with and without a stash."""
    names = ("none", "device", "host")
    found = training_times([{"context_parallel__stash": name} for name in names], 1)
    rows = [(name, f"{wall:.1f} s", f"{found[0][0] / wall:.2f}x") for name, (wall, _) in zip(names, found, strict=True)]
    return table(("stash", "a step", "faster than none"), rows)


PAGE = """# Measured and predicted: memory, and what it costs in time

Made by `python -m tests.measure_memory docs/memory.md` with {versions}. `u` is one hidden tensor `[B, N, D]` of a rank
in bfloat16. Nothing here ran on a GPU.

## One attention layer: simulated

Peak of forward and backward in bfloat16 at 3M tokens, simulated: the real layer on fake tensors, every storage counted
from its making to its end. Counted: the input x, one more hidden tensor that stays (dy, held by the residual), all that
the layer makes, gradients of weights included. Not counted: weights, host memory. "Workspace" is what
FlashAttention-2's backward holds beside its results: a float32 dq and, with fewer KV than query heads in a call, dk and
dv for each query head. T is `query_tiles`. FPDT works in chunks of 64K tokens.
{layer_peaks}
At 64K tokens FPDT works in smaller chunks: what is left there is mostly x, y, dx and the weights' gradients, which it
sums in float32.
{short_layer_peaks}
## The whole step: predicted

One rank's peak in one training step by the ledger (`python -m torchtitan_upipe.memory`): FSDP2 over all ranks, AdamW,
full activation checkpointing with block inputs in host memory, or all hidden states (`hidden_states host`), tiles of
8192 rows, the whole stash in host memory. One rank has FSDP2 on a mesh of one with its state in host memory.
{whole_steps}
## Time of one layer

Forward and backward (H = 8, G = 2, d = 64, D = 512, float32), arms in turn, medians; in brackets processor seconds of
all ranks, which other work on the machine moves less.
{times}
## Time of a training step with hidden states in host memory

2 ranks, S = 16384, `debug_kv2`, float32, U = C = 2, full activation checkpointing, stash and block inputs in host
memory, tiles of 2048 rows; two timed steps each, arms in turn, medians of three; processor seconds in brackets.
{hidden_times}
## Time of a training step under full activation checkpointing

2 ranks, S = 16384, `debug_kv2`, float32, U = C = 2; two timed steps each.
{checkpointing_times}"""


PARTS = (layer_peaks, short_layer_peaks, whole_steps, times, hidden_times, checkpointing_times)


def read_page(text: str) -> dict[str, str]:
    """What stands in the places of ``PAGE``.

    Raises:
        ValueError: the page has another text around them.
    """
    pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.*?)", re.escape(PAGE))
    match = re.fullmatch(pattern, text, re.DOTALL)
    if match is None:
        raise ValueError("the page's text is not this file's; make all of it anew.")
    return match.groupdict()


def main(path: Path, names: Sequence[str] = ()) -> None:
    """Write the whole page, or the parts of these names anew."""
    known = read_page(path.read_text()) if names else {}
    if unknown := set(names) - {part.__name__ for part in PARTS}:
        raise ValueError(f"{', '.join(unknown)}: the parts are {', '.join(part.__name__ for part in PARTS)}.")
    known["versions"] = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
    known |= {part.__name__: part() for part in PARTS if not names or part.__name__ in names}
    path.write_text(PAGE.format(**known))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
