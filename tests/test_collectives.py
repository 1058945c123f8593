"""Values say where they come from: token t of batch b, head h, component c is ``1000 t + 100 b + 10 h + c``."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.distributed.utils import set_pg_timeouts

from tests.ranks import RankError, run_ranks
from torchtitan_upipe.cp.collectives import (
    HeadExchange,
    RingExchange,
    differentiable_to_heads,
    differentiable_to_sequence,
)
from torchtitan_upipe.titan.dims import TrainerDims

BATCH, TOKENS, WIDTH = 2, 3, 2


def coded(tokens: range, heads: list[int]) -> Tensor:
    t, b, h, c = torch.tensor(list(tokens)), torch.arange(BATCH), torch.tensor(heads), torch.arange(WIDTH)
    code = 1000 * t[None, :, None, None] + 100 * b[:, None, None, None] + 10 * h[:, None] + c
    return code.double()  # [B, tokens, heads, WIDTH]


def exchange_rank(layout: list[list[int]]) -> tuple[int, int]:
    rank, size = dist.get_rank(), dist.get_world_size()
    exchange = HeadExchange(dist.group.WORLD)
    mine, everything = range(rank * TOKENS, (rank + 1) * TOKENS), range(size * TOKENS)
    counts = [len(heads) for heads in layout]

    received = exchange.to_heads([coded(mine, heads) for heads in layout])
    torch.testing.assert_close(received, coded(everything, layout[rank]), rtol=0, atol=0)
    back = exchange.to_sequence(received, counts)
    for piece, heads in zip(back, layout, strict=True):
        torch.testing.assert_close(piece, coded(mine, heads), rtol=0, atol=0)

    # gradients: the loss sum(w * received) with coded w must give w back in the other layout
    pieces = [torch.zeros_like(piece).requires_grad_() for piece in back]
    (differentiable_to_heads(exchange, pieces, [TOKENS] * size) * coded(everything, layout[rank])).sum().backward()
    for piece, heads in zip(pieces, layout, strict=True):
        torch.testing.assert_close(piece.grad, coded(mine, heads), rtol=0, atol=0)
    heads_shard = torch.zeros_like(received).requires_grad_()
    out = differentiable_to_sequence(exchange, heads_shard, counts, [TOKENS] * size, [TOKENS] * size)
    sum((o * coded(mine, heads)).sum() for o, heads in zip(out, layout, strict=True)).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(heads_shard.grad, coded(everything, layout[rank]), rtol=0, atol=0)
    return exchange.traffic.calls, exchange.traffic.bytes


def timeouts_of_a_hybrid() -> list[float]:
    dims = TrainerDims(dp_replicate=1, dp_shard=1, cp=4, tp=1, pp=1, ep=1, etp=1, world_size=4)
    dims.build_mesh()
    groups = dims.hybrid_groups(ulysses_degree=2, ring_degree=2)
    set_pg_timeouts(timedelta(seconds=77), dims)
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def test_groups_of_a_hybrid_have_the_timeout_of_training() -> None:
    assert run_ranks(timeouts_of_a_hybrid, 4) == [[77.0, 77.0]] * 4


@pytest.mark.parametrize(
    "layout",
    [
        [[0, 1], [2, 3]],
        [[0], [0], [1], [1]],  # copies: fewer heads than ranks
        [[0, 1, 2], [], [3]],  # uneven, and a rank with nothing
    ],
)
def test_exchange_is_a_transpose_and_its_own_gradient(layout: list[list[int]]) -> None:
    results = run_ranks(exchange_rank, len(layout), layout)
    total = sum(len(heads) for heads in layout)
    cell = BATCH * TOKENS * WIDTH * 8
    for rank, (calls, traffic) in enumerate(results):
        sent_to_heads = (total - len(layout[rank])) * cell
        sent_to_sequence = (len(layout) - 1) * len(layout[rank]) * cell
        assert calls == 6
        assert traffic == 3 * sent_to_heads + 3 * sent_to_sequence


def test_one_rank_exchanges_nothing() -> None:
    exchange = HeadExchange(None)
    heads = coded(range(TOKENS), [0, 1])
    assert exchange.to_heads([heads]) is heads
    assert exchange.to_sequence(heads, [2])[0] is heads
    assert exchange.traffic.calls == exchange.traffic.bytes == 0


def ring_rank() -> tuple[list[float], int, int]:
    """Pass this rank's number on until it has come round; two rings share the group, as in attention's backward."""
    ring = RingExchange(dist.group.WORLD)
    other = RingExchange(dist.group.WORLD, ring.traffic)
    passing, seen = (torch.full((2, 3), float(ring.rank)), torch.full((4,), 100.0 + ring.rank)), []
    for _ in range(ring.size):
        ring.start(passing)
        other.start([torch.full((5,), -1.0 - ring.rank)])
        passing = ring.finish()
        (backwards,) = other.finish()
        assert torch.equal(backwards, torch.full((5,), -1.0 - (ring.rank - 1) % ring.size))
        assert torch.equal(passing[1], torch.full((4,), 100.0) + passing[0][0, 0])
        seen.append(float(passing[0][0, 0]))
    return seen, ring.traffic.calls, ring.traffic.bytes


def test_a_ring_brings_every_rank_past_every_other() -> None:
    for rank, (seen, calls, traffic) in enumerate(run_ranks(ring_rank, 4)):
        assert seen == [(rank - 1 - hop) % 4 for hop in range(4)]
        assert calls == 8
        assert traffic == 4 * (6 + 4 + 5) * 4


def test_a_ring_passes_one_set_at_a_time() -> None:
    ring = RingExchange(None)
    with pytest.raises(RuntimeError, match="nothing is under way"):
        ring.finish()
    with pytest.raises(RuntimeError, match="between at least two ranks"):
        ring.start([torch.zeros(1)])


def failing_rank() -> None:
    if dist.get_rank() == 1:
        raise KeyError("the planted failure")
    dist.barrier()


def hanging_rank() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def test_the_harness_reports_the_failing_rank() -> None:
    with pytest.raises(RankError, match="the planted failure"):
        run_ranks(failing_rank, 2)


def test_the_harness_ends_a_hang() -> None:
    with pytest.raises(RankError, match=r"ranks \[1\] did not finish within 5 s"):
        run_ranks(hanging_rank, 2, timeout=5)
