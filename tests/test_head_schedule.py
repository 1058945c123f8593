import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchtitan_upipe.cp.head_schedule import HeadSchedule, build_head_schedule


@st.composite
def schedules(draw: st.DrawFn) -> HeadSchedule:
    degree = draw(st.integers(1, 8))
    heads = degree * draw(st.integers(1, 12))
    kv_heads = draw(st.sampled_from([g for g in range(1, heads + 1) if heads % g == 0]))
    chunk = degree * draw(st.integers(1, heads // degree))
    return build_head_schedule(heads, kv_heads, degree, chunk)


@settings(max_examples=300, deadline=None)
@given(schedules())
def test_every_query_head_once_with_its_own_kv_head(schedule: HeadSchedule) -> None:
    group = schedule.num_heads // schedule.num_kv_heads
    computed = []
    for rank in range(schedule.degree):
        blocks: dict[int, tuple[int, ...]] = {}
        for s, stage in enumerate(schedule.stages):
            if stage.fetch.heads[rank]:
                blocks[s] = stage.fetch.heads[rank]
            queries = stage.queries.heads[rank]
            covered = []
            for call in stage.calls[rank]:
                mine = queries[slice(*call.queries)]
                keys = blocks[call.block][slice(*call.keys)]  # KeyError: the block has left, or never came
                assert len(mine) % len(keys) == 0
                ratio = len(mine) // len(keys)
                for i, head in enumerate(mine):
                    assert keys[i // ratio] == head // group
                covered += mine
            assert tuple(covered) == queries
            computed += queries
            released = tuple(kv for block in stage.leave[rank] for kv in blocks.pop(block))
            assert released == stage.release.heads[rank]
        assert not blocks  # every gradient travels back
    assert sorted(computed) == list(range(schedule.num_heads))


@settings(max_examples=300, deadline=None)
@given(schedules())
def test_each_rank_is_sent_each_kv_head_once(schedule: HeadSchedule) -> None:
    group = schedule.num_heads // schedule.num_kv_heads
    for rank in range(schedule.degree):
        fetched = [kv for stage in schedule.stages for kv in stage.fetch.heads[rank]]
        needed = {head // group for stage in schedule.stages for head in stage.queries.heads[rank]}
        assert sorted(fetched) == sorted(needed)


@settings(max_examples=100, deadline=None)
@given(schedules())
def test_stages_hold_one_chunk_spread_evenly(schedule: HeadSchedule) -> None:
    assert len(schedule.stages) == -(-schedule.num_heads // schedule.head_chunk)
    for stage in schedule.stages:
        assert len(set(stage.queries.counts)) == 1
        assert sum(stage.queries.counts) <= schedule.head_chunk


def test_llama3_8b_on_eight_ranks() -> None:
    schedule = build_head_schedule(num_heads=32, num_kv_heads=8, degree=8, head_chunk=8)
    first, *rest = schedule.stages
    assert [stage.queries.heads[1] for stage in schedule.stages] == [(4,), (5,), (6,), (7,)]
    assert first.fetch.heads == tuple((r,) for r in range(8))
    assert all(not any(stage.fetch.counts) for stage in rest)  # K and V stay for all four stages
    assert schedule.stages[-1].release.heads == first.fetch.heads


@pytest.mark.parametrize(
    "heads, kv_heads, degree, chunk, sentence",
    [
        (32, 8, 8, 12, "head_chunk = 12 must be a multiple of ulysses_degree = 8 .* nearest: 8 or 16"),
        (32, 8, 8, 4, "head_chunk = 4 .* nearest: 8 or 16"),
        (32, 8, 8, 40, "head_chunk = 40 .* at most 32.* nearest: 32"),
        (28, 4, 8, 28, "28 query heads cannot be split over 8 .* e.g. 4 or 7"),
        (32, 5, 1, 32, "32 query heads cannot share 5 KV heads"),
    ],
)
def test_impossible_numbers_are_refused(heads: int, kv_heads: int, degree: int, chunk: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build_head_schedule(heads, kv_heads, degree, chunk)
