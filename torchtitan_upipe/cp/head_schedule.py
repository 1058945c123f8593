"""Which rank computes which heads in which stage. Pure Python: no torch, no device, no group.

The base plan is Ulysses' own layout sliced in time: rank ``r`` owns query heads ``[r*H/C, (r+1)*H/C)`` and stage ``s``
takes the ``s``-th ``U/C`` of each rank's heads. Query head ``h`` always meets KV head ``h // (H/G)``, so no weight is
ever permuted. A rank's query heads come in rising order, hence each KV head is needed during one run of consecutive
stages: it arrives at the first and leaves, with its gradient, after the last (the GQA schedule of arXiv 2602.21196).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class HeadPlacement:
    """Heads laid out by rank: ``heads[r]`` are the head indices that rank ``r`` holds, in order."""

    heads: tuple[tuple[int, ...], ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of heads on each rank."""
        return tuple(len(h) for h in self.heads)

    @property
    def distinct(self) -> tuple[int, ...]:
        """The heads that any rank holds, each once, rising."""
        return tuple(sorted({head for heads in self.heads for head in heads}))


@dataclass(frozen=True)
class KernelCall:
    """One attention call of a rank: query heads of the stage against KV heads of one resident block.

    ``queries`` and ``keys`` are (start, stop) among the rank's query heads of this stage and among the heads of
    block ``block``. Every KV head of a call serves equally many query heads, as kernels with native GQA ask.
    """

    queries: tuple[int, int]
    block: int
    keys: tuple[int, int]


@dataclass(frozen=True)
class Stage:
    """One stage of the attention layer, for all ranks.

    Attributes:
        queries: the query heads computed now.
        fetch: the KV heads that arrive now; on each rank they form the block named by this stage's index.
        calls: the attention calls of each rank.
        leave: for each rank, the blocks not needed after this stage.
        release: the KV heads of those blocks, whose gradients travel back now.
    """

    queries: HeadPlacement
    fetch: HeadPlacement
    calls: tuple[tuple[KernelCall, ...], ...]
    leave: tuple[tuple[int, ...], ...]
    release: HeadPlacement


@dataclass(frozen=True)
class HeadSchedule:
    """The stages of one attention layer over ``degree`` ranks."""

    num_heads: int
    num_kv_heads: int
    degree: int
    head_chunk: int
    stages: tuple[Stage, ...]


def check_head_chunk(num_heads: int, num_kv_heads: int, degree: int, head_chunk: int) -> None:
    """Refuse head counts that have no schedule.

    Raises:
        ValueError: ``H % G != 0``, ``H % C != 0``, or ``U`` is not a multiple of ``C`` within ``[C, H]``.
    """
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{num_heads} query heads cannot share {num_kv_heads} KV heads evenly; check the model flavor."
        )
    if num_heads % degree:
        divisors = [c for c in range(1, num_heads + 1) if num_heads % c == 0]
        near = sorted(sorted(divisors, key=lambda c: abs(c - degree))[:2])
        raise ValueError(
            f"{num_heads} query heads cannot be split over {degree} context-parallel ranks; "
            f"set context_parallel_degree to a divisor, e.g. {' or '.join(map(str, near))}."
        )
    if head_chunk % degree or not degree <= head_chunk <= num_heads:
        below = min(max(head_chunk // degree * degree, degree), num_heads)
        above = min(below + degree, num_heads)
        nearest = f"{below} or {above}" if below != above else f"{below}"
        raise ValueError(
            f"head_chunk = {head_chunk} must be a multiple of ulysses_degree = {degree} "
            f"and at most {num_heads}, the model's query heads; nearest: {nearest}."
        )


def build_head_schedule(num_heads: int, num_kv_heads: int, degree: int, head_chunk: int) -> HeadSchedule:
    """Build the schedule.

    Args:
        num_heads: query heads ``H``.
        num_kv_heads: KV heads ``G``; ``H % G == 0``.
        degree: ranks ``C`` of the all-to-all; ``H % C == 0``.
        head_chunk: query heads ``U`` of the whole group per stage, a multiple of ``C``; the last stage of
            ``P = ceil(H/U)`` may be smaller. ``U = H`` is Ulysses.

    Raises:
        ValueError: see :func:`check_head_chunk`.
    """
    check_head_chunk(num_heads, num_kv_heads, degree, head_chunk)
    ranks = [_rank_plan(rank, num_heads, num_kv_heads, degree, head_chunk) for rank in range(degree)]
    stages = tuple(_join_ranks(stage_of_ranks) for stage_of_ranks in zip(*ranks, strict=True))
    return HeadSchedule(num_heads, num_kv_heads, degree, head_chunk, stages)


@dataclass(frozen=True)
class _RankStage:
    queries: tuple[int, ...]
    fetch: tuple[int, ...]
    calls: tuple[KernelCall, ...]
    leave: tuple[int, ...]
    release: tuple[int, ...]


def _rank_plan(rank: int, num_heads: int, num_kv_heads: int, degree: int, head_chunk: int) -> list[_RankStage]:
    heads_per_kv = num_heads // num_kv_heads
    per_rank, per_stage = num_heads // degree, head_chunk // degree
    owned = range(rank * per_rank, (rank + 1) * per_rank)
    queries = [tuple(owned[start : start + per_stage]) for start in range(0, per_rank, per_stage)]
    needed = [tuple(dict.fromkeys(h // heads_per_kv for h in stage)) for stage in queries]

    block_of: dict[int, tuple[int, int]] = {}  # KV head -> (block, position in the block)
    fetches = []
    for s, kv_heads in enumerate(needed):
        fetch = tuple(kv for kv in kv_heads if kv not in block_of)
        block_of.update((kv, (s, i)) for i, kv in enumerate(fetch))
        fetches.append(fetch)
    last_use = {block_of[kv][0]: s for s, kv_heads in enumerate(needed) for kv in kv_heads}

    plan = []
    for s, stage in enumerate(queries):
        leave = tuple(block for block, last in sorted(last_use.items()) if last == s)
        release = tuple(kv for block in leave for kv in fetches[block])
        calls = _kernel_calls([block_of[h // heads_per_kv] for h in stage])
        plan.append(_RankStage(stage, fetches[s], calls, leave, release))
    return plan


def _kernel_calls(places: list[tuple[int, int]]) -> tuple[KernelCall, ...]:
    """Group a stage's query heads, given where the KV head of each one lies, into as few calls as GQA kernels allow."""
    calls: list[KernelCall] = []
    ratio = start = 0
    for (block, position), run in groupby(places):
        length = len(list(run))
        extends = calls and ratio == length and calls[-1].block == block and calls[-1].keys[1] == position
        if extends:
            first = calls.pop()
            calls.append(KernelCall((first.queries[0], start + length), block, (first.keys[0], position + 1)))
        else:
            calls.append(KernelCall((start, start + length), block, (position, position + 1)))
        ratio, start = length, start + length
    return tuple(calls)


def _join_ranks(ranks: tuple[_RankStage, ...]) -> Stage:
    return Stage(
        queries=HeadPlacement(tuple(r.queries for r in ranks)),
        fetch=HeadPlacement(tuple(r.fetch for r in ranks)),
        calls=tuple(r.calls for r in ranks),
        leave=tuple(r.leave for r in ranks),
        release=HeadPlacement(tuple(r.release for r in ranks)),
    )
