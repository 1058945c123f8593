"""What is cut for the ranks of an exchange, put together again: all ranks in one process."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import patient, schedules
from torchtitan_upipe.cp.head_schedule import HeadPlacement, HeadSchedule
from torchtitan_upipe.cp.shards import join_queries, select_heads, split_keys, split_queries, sum_copies

BATCH, WIDTH = 2, 2


def numbered(*shape: int) -> Tensor:
    """Every element another whole number, so that sums are exact."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)


@settings(patient, max_examples=50)
@given(schedules(max_heads=16, max_degree=8), st.integers(1, 6))
def test_queries_reach_the_ranks_that_compute_them_and_come_back(schedule: HeadSchedule, tokens: int) -> None:
    ranks = range(schedule.degree)
    everything = numbered(BATCH, schedule.degree * tokens, schedule.num_heads, WIDTH)
    for stage in schedule.stages:
        rows, heads = stage.rows(tokens), select_heads(everything, stage.queries.distinct)
        shards = heads.split(tokens, dim=1)
        sent = [split_queries(shard, stage.queries, rows, rank) for rank, shard in enumerate(shards)]
        for rank in ranks:
            gathered = torch.cat([pieces[rank] for pieces in sent], dim=1)  # what the all-to-all does
            computed = [everything[:, slice(*interval)] for interval in rows.computed_by(rank)]
            assert torch.equal(gathered, torch.cat(computed, dim=1)[:, :, list(stage.queries.heads[rank])])
            assert torch.equal(join_queries(sent[rank], stage.queries, rows, rank), shards[rank])


@st.composite
def placements(draw: st.DrawFn) -> HeadPlacement:
    """Consecutive heads on each rank, some on several, perhaps none on a rank."""
    heads = []
    for _ in range(draw(st.integers(1, 6))):
        first = draw(st.integers(0, 8))
        heads.append(tuple(range(first, first + draw(st.integers(0, 3)))))
    return HeadPlacement(tuple(heads))


@patient
@given(placements())
def test_keys_reach_every_rank_that_needs_them(placement: HeadPlacement) -> None:
    everything = numbered(BATCH, 3, 12, WIDTH)
    distinct = everything[:, :, list(placement.distinct)]
    for piece, heads in zip(split_keys(distinct, placement), placement.heads, strict=True):
        assert torch.equal(piece, everything[:, :, list(heads)])
        assert piece.untyped_storage().data_ptr() == distinct.untyped_storage().data_ptr()  # a view


@patient
@given(placements())
def test_summing_copies_is_the_transpose_of_splitting_keys(placement: HeadPlacement) -> None:
    heads = numbered(BATCH, 3, len(placement.distinct), WIDTH) % 97
    pieces = split_keys(heads, placement)
    grads = [numbered(*piece.shape) % 89 + rank for rank, piece in enumerate(pieces)]
    summed = sum_copies(grads, placement)
    assert summed.shape == heads.shape
    split_product = sum(float((piece * grad).sum()) for piece, grad in zip(pieces, grads, strict=True))
    assert split_product == float((heads * summed).sum())


def test_copies_are_rounded_once() -> None:
    ranks = 8
    copies = [torch.randn(1, 16, 1, 32, generator=torch.Generator().manual_seed(r)).bfloat16() for r in range(ranks)]
    summed = sum_copies(copies, HeadPlacement(((0,),) * ranks))
    assert summed.dtype == torch.bfloat16
    assert torch.equal(summed, torch.stack(copies).double().sum(0).bfloat16())


@patient
@given(st.lists(st.integers(0, 11), min_size=1, max_size=8))
def test_selected_heads(wanted: list[int]) -> None:
    heads = numbered(BATCH, 3, 12, WIDTH)
    selected = select_heads(heads, wanted)
    assert torch.equal(selected, heads[:, :, wanted])
    if wanted == list(range(wanted[0], wanted[0] + len(wanted))):
        assert selected.untyped_storage().data_ptr() == heads.untyped_storage().data_ptr()  # a view
