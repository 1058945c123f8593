"""What the methods send, pair of ranks by pair of ranks. Each rank runs alone here and its exchanges are written down:
what one rank sends to another must be what the other expects, in every exchange, in forward and in backward.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.reference import Case, Shape, run_method
from tests.strategies import patient, schedules
from torchtitan_upipe.cp.attention import LocalAttention
from torchtitan_upipe.cp.collectives import HeadExchange
from torchtitan_upipe.cp.fpdt import FPDT
from torchtitan_upipe.cp.head_schedule import HeadSchedule, build_head_schedule
from torchtitan_upipe.cp.ulysses import Ulysses
from torchtitan_upipe.cp.upipe import UPipe
from torchtitan_upipe.stash.stash import KeptOnDevice, Stash

WIDTH = 2
CHUNK = 3  # tokens of a rank in a sequence chunk


class RecordedExchange(HeadExchange):
    """A rank whose all-to-alls bring zeros; keeps what each sends to every rank and expects of it, in elements."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(None)
        self.rank, self.size = rank, size
        self.calls: list[tuple[list[int], list[int]]] = []

    def _all_to_all(self, send: Tensor, send_sizes: list[int], receive_sizes: list[int]) -> Tensor:
        assert send.numel() == sum(send_sizes)
        self.calls.append((send_sizes, receive_sizes))
        return send.new_zeros(sum(receive_sizes))


class NoAttention:
    """Results of the right shapes: what is sent does not depend on their values."""

    name = "none"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(q), q.new_zeros(q.shape[0], q.shape[2], q.shape[1])

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

    def backward_rows(self, q: Tensor) -> int | None:
        return None


def record(method: str, schedule: HeadSchedule, case: Case) -> list[list[tuple[list[int], list[int]]]]:
    """The exchanges of every rank in one forward and backward pass."""
    found = []
    for rank, mine in enumerate(torch.arange(case.shape.length).chunk(schedule.degree)):
        exchange, attention = RecordedExchange(rank, schedule.degree), LocalAttention(NoAttention())
        stash, heads = Stash if "stash" in method else None, (schedule.num_heads, schedule.num_kv_heads)
        if method == "ulysses":
            layer: Ulysses | UPipe | FPDT = Ulysses(*heads, exchange, attention)
        elif "fpdt" in method:
            layer = FPDT(*heads, exchange, attention, stash, KeptOnDevice, CHUNK * schedule.degree)
        else:
            layer = UPipe(schedule, exchange, attention, stash)
        run_method(case, layer, mine, torch.float64)
        found.append(exchange.calls)
    return found


def elements_moved(schedule: HeadSchedule, shape: Shape, tokens: int) -> tuple[int, int]:
    """Elements that change ranks when all queries go where they are computed, and when all keys do.

    ``tokens`` of each rank are exchanged at a time.
    """
    if tokens < shape.length // schedule.degree:
        rest = replace(shape, length=shape.length - tokens * schedule.degree)
        first = elements_moved(schedule, replace(shape, length=tokens * schedule.degree), tokens)
        queries, keys = elements_moved(schedule, rest, min(tokens, rest.length // schedule.degree))
        return queries + first[0], keys + first[1]
    queries = keys = 0
    for rank in range(schedule.degree):
        for stage in schedule.stages:
            for interval in stage.rows(tokens).computed_by(rank):
                queries += len(stage.queries.heads[rank]) * sum(row // tokens != rank for row in range(*interval))
        needed = {
            h * schedule.num_kv_heads // schedule.num_heads for s in schedule.stages for h in s.queries.heads[rank]
        }
        keys += len(needed) * (shape.length - tokens)
    return queries * shape.batch * WIDTH, keys * shape.batch * WIDTH


# how often queries (with q: outputs and their gradients) and keys (with values) go from rank to rank
MOVES = {
    "upipe": (6, 6),  # q, o | q, o, do, dq;  k, v | k, v, dk, dv
    "upipe, stash": (6, 6),  # o goes to the heads' ranks again instead of being computed there and sent back
    "fpdt": (6, 6),  # likewise, chunk by chunk
    "fpdt, stash": (6, 6),
    "ulysses": (4, 4),  # q, o | do, dq;  k, v | dk, dv
}


def check(method: str, schedule: HeadSchedule, shape: Shape) -> None:
    by_rank = record(method, schedule, Case(shape))
    assert len({len(calls) for calls in by_rank}) == 1  # all take part in every exchange, or the others hang
    moved = 0
    for exchange in zip(*by_rank, strict=True):
        for sender, (sent, _) in enumerate(exchange):
            for receiver, (_, expected) in enumerate(exchange):
                assert sent[receiver] == expected[sender]
                moved += sent[receiver] if sender != receiver else 0
    tokens = shape.length // schedule.degree
    if "upipe" not in method:
        schedule = build_head_schedule(shape.heads, shape.kv_heads, schedule.degree, shape.heads)
    queries, keys = elements_moved(schedule, shape, min(tokens, CHUNK) if "fpdt" in method else tokens)
    assert moved == MOVES[method][0] * queries + MOVES[method][1] * keys


@pytest.mark.parametrize("method", MOVES)
@settings(patient, max_examples=12)
@given(schedules(max_heads=12, max_degree=6), st.integers(1, 7), st.integers(1, 2))
@example(build_head_schedule(14, 2, 4, 14), 4, 1)  # the last stage brings KV heads to some of the ranks only
@example(build_head_schedule(3, 1, 8, 3), 1, 2)
def test_each_rank_sends_what_the_other_expects(method: str, schedule: HeadSchedule, tokens: int, batch: int) -> None:
    shape = Shape(schedule.num_heads, schedule.num_kv_heads, WIDTH, dim=4, batch=batch, length=tokens * schedule.degree)
    check(method, schedule, shape)


@pytest.mark.parametrize("method", MOVES)
@pytest.mark.parametrize("heads, kv_heads, degree, chunk", [(32, 8, 16, 8), (28, 4, 8, 28)])
def test_models_send_what_the_other_expects(method: str, heads: int, kv_heads: int, degree: int, chunk: int) -> None:
    check(
        method, build_head_schedule(heads, kv_heads, degree, chunk), Shape(heads, kv_heads, WIDTH, 4, length=2 * degree)
    )
