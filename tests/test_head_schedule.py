from __future__ import annotations

from collections import defaultdict
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import patient, schedules
from torchtitan_upipe.cp.head_schedule import HeadSchedule, build_head_schedule, round_head_chunk
from torchtitan_upipe.cp.segments import query_tiles
from torchtitan_upipe.kernels.visibility import Interval

MODELS = {  # query heads, KV heads, ranks
    "Llama3-8B on 8": (32, 8, 8),
    "Llama3-8B on 16": (32, 8, 16),
    "Llama3-8B on 32": (32, 8, 32),
    "Llama3-8B on 64": (32, 8, 64),
    "Qwen2.5-7B on 8": (28, 4, 8),
    "15 heads on 4": (15, 5, 4),
}


@settings(patient, max_examples=200)
@given(schedules(), st.integers(1, 9), st.integers(1, 4))
def test_every_row_of_every_query_head_is_computed_once(schedule: HeadSchedule, tokens: int, tiles: int) -> None:
    found: dict[int, list[Interval]] = defaultdict(list)
    for stage, tile in product(schedule.stages, query_tiles(tokens, tiles)):
        rows = stage.rows(tokens, tile)
        for rank, heads in enumerate(stage.queries.heads):
            for head in heads:
                found[head] += [(start, stop) for start, stop in rows.computed_by(rank) if start < stop]
    assert sorted(found) == list(range(schedule.num_heads))
    for intervals in found.values():
        starts, stops = zip(*sorted(intervals), strict=True)
        assert (*starts, schedule.degree * tokens) == (0, *stops)  # side by side: no gap, no overlap


@settings(patient, max_examples=100)
@given(schedules(), st.integers(1, 9), st.integers(1, 4))
def test_rows_come_from_the_shards_that_hold_them(schedule: HeadSchedule, tokens: int, tiles: int) -> None:
    ranks = range(schedule.degree)
    for team, tile in product({stage.team for stage in schedule.stages}, query_tiles(tokens, tiles)):
        rows = next(stage for stage in schedule.stages if stage.team == team).rows(tokens, tile)
        for rank in ranks:
            shared = [shard * tokens + tile[0] + row for shard in ranks for row in range(*rows.shared(rank, shard))]
            assert shared == [row for interval in rows.computed_by(rank) for row in range(*interval)]
            assert len(shared) == sum(rows.count(rank, shard) for shard in ranks)


@settings(patient, max_examples=200)
@given(schedules())
def test_query_heads_meet_their_own_kv_heads_while_these_are_here(schedule: HeadSchedule) -> None:
    group = schedule.num_heads // schedule.num_kv_heads
    for rank in range(schedule.degree):
        blocks: dict[int, tuple[int, ...]] = {}
        last_use: dict[int, int] = {}
        for s, stage in enumerate(schedule.stages):
            if stage.fetch.heads[rank]:
                blocks[s] = stage.fetch.heads[rank]
            queries = stage.queries.heads[rank]
            covered: tuple[int, ...] = ()
            for call in stage.calls[rank]:
                mine = queries[slice(*call.queries)]
                keys = blocks[call.block][slice(*call.keys)]  # KeyError: the block has left, or never came
                assert len(mine) % len(keys) == 0
                ratio = len(mine) // len(keys)
                assert [keys[i // ratio] for i in range(len(mine))] == [head // group for head in mine]
                covered += mine
                last_use[call.block] = s
            assert covered == queries
            released = tuple(kv for block in stage.leave[rank] for kv in blocks.pop(block))
            assert released == stage.release.heads[rank]
            assert all(last_use[block] == s for block in stage.leave[rank])  # not a stage later than needed
        assert not blocks  # every gradient travels back


@settings(patient, max_examples=200)
@given(schedules())
def test_each_rank_is_sent_each_kv_head_once(schedule: HeadSchedule) -> None:
    group = schedule.num_heads // schedule.num_kv_heads
    for rank in range(schedule.degree):
        needed = {head // group for stage in schedule.stages for head in stage.queries.heads[rank]}
        fetched = [kv for stage in schedule.stages for kv in stage.fetch.heads[rank]]
        released = [kv for stage in schedule.stages for kv in stage.release.heads[rank]]
        assert sorted(fetched) == sorted(released) == sorted(needed)


@settings(patient, max_examples=200)
@given(schedules())
def test_stages_hold_at_most_a_chunk_and_keep_every_rank_busy(schedule: HeadSchedule) -> None:
    for stage in schedule.stages:
        assert len(set(stage.queries.counts)) == 1
        assert stage.queries.counts[0] * schedule.degree == len(stage.queries.distinct) * stage.team
        assert 1 <= len(stage.queries.distinct) <= schedule.head_chunk
        for placement in (stage.queries, stage.fetch, stage.release):  # shards.py cuts slices
            for heads in filter(None, placement.heads):
                assert heads == tuple(range(heads[0], heads[-1] + 1))
    if schedule.num_heads % max(schedule.degree, schedule.head_chunk) == 0:
        assert len(schedule.stages) == schedule.num_heads // schedule.head_chunk


@settings(patient, max_examples=50)
@given(st.integers(1, 48), st.integers(1, 48), st.data())
def test_the_chunk_is_rounded_to_the_nearest_below_that_fits(heads: int, degree: int, data: st.DataObject) -> None:
    asked = data.draw(st.integers(1, heads))
    fits = [u for u in range(1, asked + 1) if u % degree == 0 or degree % u == 0]
    rounded = round_head_chunk(heads, degree, asked)
    assert rounded == max(fits)
    assert build_head_schedule(heads, heads, degree, asked) == build_head_schedule(heads, heads, degree, rounded)


def causal_work(intervals: tuple[Interval, ...]) -> int:
    """(query, key) pairs that the causal mask leaves to the queries of these rows: row ``i`` sees ``i + 1`` keys."""
    return sum((stop * (stop + 1) - start * (start + 1)) // 2 for start, stop in intervals)


def imbalance(schedule: HeadSchedule, length: int) -> float:
    """Work of the most loaded rank against the mean, in the worst stage: ranks wait for each other in every one."""
    worst = 0.0
    for stage in schedule.stages:
        rows = stage.rows(-(-length // schedule.degree))
        work = [len(heads) * causal_work(rows.computed_by(rank)) for rank, heads in enumerate(stage.queries.heads)]
        worst = max(worst, max(work) * len(work) / sum(work))
    return worst


@pytest.mark.parametrize("name", MODELS)
def test_models_are_balanced_with_every_chunk(name: str) -> None:
    heads, kv_heads, degree = MODELS[name]
    for chunk in range(1, heads + 1):
        schedule = build_head_schedule(heads, kv_heads, degree, chunk)
        assert imbalance(schedule, 2**16) <= 1.05
        total = sum(
            len(mine) * causal_work(stage.rows(2**16 // degree).computed_by(rank))
            for stage in schedule.stages
            for rank, mine in enumerate(stage.queries.heads)
        )
        assert total == heads * 2**16 * (2**16 + 1) // 2


@settings(patient, max_examples=100)
@given(schedules(max_heads=128, max_degree=64), st.integers(2**16, 2**23))
def test_any_schedule_is_balanced(schedule: HeadSchedule, length: int) -> None:
    assert imbalance(schedule, length) <= 1.05


def test_llama3_8b_on_eight_ranks() -> None:
    schedule = build_head_schedule(num_heads=32, num_kv_heads=8, degree=8, head_chunk=8)
    first, *rest = schedule.stages
    assert [stage.queries.heads[1] for stage in schedule.stages] == [(4,), (5,), (6,), (7,)]
    assert first.fetch.heads == tuple((r,) for r in range(8))
    assert all(not any(stage.fetch.counts) for stage in rest)  # K and V stay for all four stages
    assert schedule.stages[-1].release.heads == first.fetch.heads
    assert first.rows(2).computed_by(3) == ((0, 16),)
    assert first.rows(2, (1, 2)).computed_by(3) == tuple((2 * r + 1, 2 * r + 2) for r in range(8))


def test_qwen25_7b_on_eight_ranks() -> None:
    schedule = build_head_schedule(num_heads=28, num_kv_heads=4, degree=8, head_chunk=28)
    whole, shared = schedule.stages
    assert whole.queries.heads == tuple(tuple(range(3 * r, 3 * r + 3)) for r in range(8))
    assert whole.team == 1
    assert shared.queries.heads == ((24,), (24,), (25,), (25,), (26,), (26,), (27,), (27,))  # pairs share a head
    assert shared.team == 2
    assert shared.rows(2).computed_by(0) == ((0, 4), (12, 16))
    assert shared.rows(2).computed_by(1) == ((4, 12),)


@pytest.mark.parametrize(
    "heads, kv_heads, chunk, sentence",
    [
        (32, 8, 40, "head_chunk = 40 must be between 1 and 32, .* nearest: 32"),
        (32, 8, 0, "head_chunk = 0 must be between 1 and 32, .* nearest: 1"),
        (32, 8, -8, "head_chunk = -8 must be between 1 and 32, .* nearest: 1"),
        (32, 5, 32, "32 query heads cannot share 5 KV heads"),
    ],
)
def test_impossible_numbers_are_refused(heads: int, kv_heads: int, chunk: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build_head_schedule(heads, kv_heads, 8, chunk)
