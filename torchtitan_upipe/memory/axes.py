"""What the planner may set: one axis a setting, and the candidates that they span. A new setting is a new axis here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from torchtitan_upipe.cp.head_schedule import round_head_chunk
from torchtitan_upipe.data.sharding import chunk_of
from torchtitan_upipe.job.shape import HIDDEN_ON_HOST, STASHING, JobShape
from torchtitan_upipe.memory.prediction import GIB

TILE_SIZES = (32768, 16384, 8192)
QUERY_TILES = (1, 2, 4, 8)
SEQUENCE_CHUNKS = (65536, 32768, 16384)
STASHES = ("device", "host", "none")
SHARED_HEADS = (2, 4)  # ranks that share a head, beyond chunks that have a head for every rank
Settings = dict[str, dict[str, Any]]  # of a job file, by section
EVERY = ("upipe", "ulysses", "ring", "fpdt")


@dataclass(frozen=True)
class Axis:
    """One setting, or several that go together.

    Attributes:
        fields: of :class:`JobShape`.
        values: for a job, one tuple of these fields each, from most device memory to least.
        fields_of_file: what a job file says for a job's value, by section.
        methods: those that have the setting.
        last: how many of the last values may need the least device memory.
        both_ends: the first value may need the least host memory.
        at_start: whether a job that has started may still be given it.
    """

    fields: tuple[str, ...]
    values: Callable[[JobShape], Sequence[tuple[Any, ...]]]
    fields_of_file: Callable[[JobShape], Settings]
    methods: tuple[str, ...] = EVERY
    last: int = 1
    both_ends: bool = False
    at_start: bool = True


def head_chunks(job: JobShape) -> list[int]:
    """The head chunks that the schedule does not round, down to one head a rank; largest first."""
    heads = job.model.heads
    found = {round_head_chunk(heads, job.ulysses, chunk) for chunk in range(min(job.ulysses, heads), heads + 1)}
    return sorted((chunk for chunk in found if heads % chunk == 0), reverse=True) or sorted(found, reverse=True)


def all_head_chunks(job: JobShape) -> list[int]:
    """:func:`head_chunks`, and those for which ranks share a head; largest first."""
    whole = head_chunks(job)
    shared = {job.ulysses // team for team in SHARED_HEADS if job.ulysses % team == 0}
    return whole + sorted((chunk for chunk in shared if chunk < whole[-1]), reverse=True)


def _checkpointing(job: JobShape) -> Settings:
    return {
        "activation_checkpoint": {"mode": "full" if job.checkpoint else "none", "offload": job.offload},
        "context_parallel": {"hidden_states": "host" if job.hidden_on_host else "device"},
    }


def _inputs(job: JobShape) -> list[tuple[bool, bool, bool]]:
    """Block inputs: all kept, checkpointed, on the host, or all hidden states there."""
    return [(False, False, False), (True, False, False), (True, True, False), (True, False, True)]


def _runs(job: JobShape) -> bool:
    """Whether settings go together; see ``job/check.py``."""
    if not job.hidden_on_host:
        return job.method in STASHING or job.stash == "none"  # where it means nothing, one value is enough
    tiled = job.tile_size > 0 and job.stash != "device"
    return job.method in HIDDEN_ON_HOST and tiled and (job.fsdp or not job.narrowed)


def _stash(job: JobShape) -> Settings:
    budget = job.stash_budget / GIB if job.stash == "host" else 0.0
    return {"context_parallel": {"stash": job.stash, "stash_budget_gib": budget}}


def _tile_sizes(job: JobShape) -> list[tuple[int]]:
    """No tiling, and tiles smaller than all rows; the smallest in any case, whose head holds no logits."""
    smaller = [size for size in TILE_SIZES if size < job.rows]
    return [(size,) for size in (0, *(smaller or TILE_SIZES[-1:]))]


def _plain(name: str) -> Callable[[JobShape], Settings]:
    return lambda job: {"context_parallel": {name: getattr(job, name)}}


def _states(job: JobShape) -> list[tuple[bool]]:
    return [(False,), (True,)] if job.state_on_host or job.can_move_state else [(False,)]


def _state(job: JobShape) -> Settings:
    return {"training": {"enable_cpu_offload": job.state_on_host}}


AXES = (
    Axis(("checkpoint", "offload", "hidden_on_host"), _inputs, _checkpointing, last=2),
    Axis(("tile_size",), _tile_sizes, _plain("tile_size")),
    Axis(("stash", "stash_budget"), lambda _: [(s, 0.0) for s in STASHES], _stash, last=2),
    Axis(("head_chunk",), lambda job: [(c,) for c in all_head_chunks(job)], _plain("head_chunk"), ("upipe",)),
    Axis(
        ("query_tiles",),
        lambda job: [(t,) for t in QUERY_TILES if t <= job.tokens],
        _plain("query_tiles"),
        ("upipe",),
        both_ends=True,
    ),
    Axis(
        ("sequence_chunk",),
        lambda job: [(chunk_of("fpdt", job.ulysses, c),) for c in SEQUENCE_CHUNKS],
        _plain("sequence_chunk"),
        ("fpdt",),
    ),
    Axis(("state_on_host",), _states, _state, last=2, at_start=False),  # groups are made for it
)
AT_START = tuple(axis for axis in AXES if axis.at_start)


def candidates(job: JobShape, axes: Sequence[Axis] = AXES) -> Iterator[JobShape]:
    """All settings of ``job``'s method."""
    yield from _span(job, axes, lambda axis, values: values)


def sparing(job: JobShape, axes: Sequence[Axis] = AXES) -> Iterator[JobShape]:
    """The settings of ``job``'s method among which are those that need least memory."""
    yield from _span(job, axes, lambda axis, values: [*values[: int(axis.both_ends)], *values[-axis.last :]])


def _span(
    job: JobShape, axes: Sequence[Axis], choose: Callable[[Axis, Sequence[tuple[Any, ...]]], Sequence[tuple[Any, ...]]]
) -> Iterator[JobShape]:
    axes = [axis for axis in axes if job.method in axis.methods]
    for values in product(*(choose(axis, axis.values(job)) for axis in axes)):
        chosen = zip(axes, values, strict=True)
        spanned = replace(
            job, **{name: v for axis, value in chosen for name, v in zip(axis.fields, value, strict=True)}
        )
        if _runs(spanned):
            yield spanned


def settings_of(job: JobShape, axes: Sequence[Axis] = AXES) -> Settings:
    """The fields that give a job file the settings of ``job``, by section."""
    settings: Settings = {}
    for axis in axes:
        if job.method in axis.methods:
            for section, values in axis.fields_of_file(job).items():
                settings.setdefault(section, {}).update(values)
    return settings
