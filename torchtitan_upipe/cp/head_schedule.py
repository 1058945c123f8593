"""Which rank computes which heads in which stage. Pure Python: no torch, no device, no group.

The base plan is Ulysses' own layout sliced in time: rank ``r`` owns query heads ``[r*H/C, (r+1)*H/C)`` and stage ``s``
takes the ``s``-th ``U/C`` of each rank's heads. Query head ``h`` always meets KV head ``h // (H/G)``, so no weight is
ever permuted. A rank's query heads come in rising order, hence each KV head is needed during one run of consecutive
stages: it arrives at the first and leaves, with its gradient, after the last (the GQA schedule of arXiv 2602.21196).

Where a stage has fewer heads than ranks (``U < C``, ``H < C``, or the heads left over where ``C`` does not divide
``H``), ranks form teams: a team computes one head, each member a segment of its queries (``segments.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby

from torchtitan_upipe.cp.segments import QueryRows
from torchtitan_upipe.kernels.visibility import Interval


@dataclass(frozen=True)
class HeadPlacement:
    """Heads laid out by rank: ``heads[r]`` are the head indices that rank ``r`` holds: consecutive, rising."""

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
        team: ranks that share each query head; rank ``r`` computes segment ``r % team`` of its head's queries.
        queries: the query heads computed now.
        fetch: the KV heads that arrive now; on each rank they form the block named by this stage's index.
        calls: the attention calls of each rank.
        leave: for each rank, the blocks not needed after this stage.
        release: the KV heads of those blocks, whose gradients travel back now.
    """

    team: int
    queries: HeadPlacement
    fetch: HeadPlacement
    calls: tuple[tuple[KernelCall, ...], ...]
    leave: tuple[tuple[int, ...], ...]
    release: HeadPlacement

    def rows(self, tokens: int, tile: Interval | None = None) -> QueryRows:
        """Which query rows each rank computes, for shards of ``tokens`` tokens, of which ``tile`` (or all) now."""
        return QueryRows(self.team, len(self.queries.heads), tokens, tile or (0, tokens))


@dataclass(frozen=True)
class HeadSchedule:
    """The stages of one attention layer over ``degree`` ranks; ``head_chunk`` is the one in effect, rounded."""

    num_heads: int
    num_kv_heads: int
    degree: int
    head_chunk: int
    stages: tuple[Stage, ...]


def round_head_chunk(num_heads: int, degree: int, head_chunk: int) -> int:
    """The largest chunk, not above ``head_chunk``, that keeps all ranks equally busy.

    A multiple of ``degree``, or a divisor of it where there are fewer heads than ranks in a stage.
    """
    most = min(head_chunk, num_heads)
    return most - most % degree if most >= degree else _largest_divisor(degree, most)


def check_heads(num_heads: int, num_kv_heads: int, head_chunk: int) -> None:
    """Refuse head counts that no model has.

    Raises:
        ValueError: ``H % G != 0``, or ``U`` is not in ``[1, H]``.
    """
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{num_heads} query heads cannot share {num_kv_heads} KV heads evenly; check the model flavor."
        )
    if not 1 <= head_chunk <= num_heads:
        raise ValueError(
            f"head_chunk = {head_chunk} must be between 1 and {num_heads}, the model's query heads; "
            f"nearest: {min(max(head_chunk, 1), num_heads)}."
        )


@cache
def build_head_schedule(num_heads: int, num_kv_heads: int, degree: int, head_chunk: int) -> HeadSchedule:
    """Build the schedule.

    Args:
        num_heads: query heads ``H``.
        num_kv_heads: KV heads ``G``; ``H % G == 0``.
        degree: ranks ``C`` of the all-to-all, any number.
        head_chunk: query heads ``U`` of the whole group per stage, rounded by :func:`round_head_chunk`. ``U = H`` is
            Ulysses where ``C`` divides ``H``.

    Raises:
        ValueError: see :func:`check_heads`.
    """
    check_heads(num_heads, num_kv_heads, head_chunk)
    chunk = round_head_chunk(num_heads, degree, head_chunk)
    bands = list(_bands(num_heads, degree, chunk))
    teams = [band.team for band in bands for _ in range(band.stages)]
    ranks = [
        _rank_plan([heads for band in bands for heads in band.of_rank(rank)], num_heads // num_kv_heads)
        for rank in range(degree)
    ]
    stages = tuple(_join_ranks(team, plans) for team, *plans in zip(teams, *ranks, strict=True))
    return HeadSchedule(num_heads, num_kv_heads, degree, chunk, stages)


@dataclass(frozen=True)
class _Band:
    """Query heads ``[first, first + per_team * degree / team)``, shared out to teams and walked through in time."""

    first: int
    per_team: int
    team: int
    per_stage: int

    @property
    def stages(self) -> int:
        return -(-self.per_team // self.per_stage)

    def of_rank(self, rank: int) -> list[tuple[int, ...]]:
        """The query heads of ``rank`` in each stage."""
        start = self.first + rank // self.team * self.per_team
        owned = range(start, start + self.per_team)
        return [tuple(owned[s : s + self.per_stage]) for s in range(0, self.per_team, self.per_stage)]


def _bands(num_heads: int, degree: int, chunk: int) -> Iterator[_Band]:
    first = 0
    while first < num_heads:
        left = num_heads - first
        teams = degree if min(left, chunk) >= degree else _largest_divisor(degree, min(left, chunk))
        band = _Band(first, left // teams, degree // teams, max(chunk // degree, 1) if teams == degree else 1)
        yield band
        first += band.per_team * teams


def _largest_divisor(number: int, at_most: int) -> int:
    return max(d for d in range(1, at_most + 1) if number % d == 0)


@dataclass(frozen=True)
class _RankStage:
    queries: tuple[int, ...]
    fetch: tuple[int, ...]
    calls: tuple[KernelCall, ...]
    leave: tuple[int, ...]
    release: tuple[int, ...]


def _rank_plan(queries: list[tuple[int, ...]], heads_per_kv: int) -> list[_RankStage]:
    """The plan of a rank that computes the query heads ``queries[s]`` in stage ``s``, rising over the stages."""
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


def _join_ranks(team: int, ranks: list[_RankStage]) -> Stage:
    return Stage(
        team=team,
        queries=HeadPlacement(tuple(r.queries for r in ranks)),
        fetch=HeadPlacement(tuple(r.fetch for r in ranks)),
        calls=tuple(r.calls for r in ranks),
        leave=tuple(r.leave for r in ranks),
        release=HeadPlacement(tuple(r.release for r in ranks)),
    )
