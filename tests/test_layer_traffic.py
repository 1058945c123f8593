"""What one attention layer sends, and what it computes twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.ranks import run_ranks
from tests.reference import Case, Shape
from tests.test_layer import SHAPES, Variant, build
from torchtitan_upipe.cp.collectives import Traffic
from torchtitan_upipe.cp.stashing import StashForBothRuns, StashingMethod
from torchtitan_upipe.cp.strategy import AttentionWeights
from torchtitan_upipe.kernels.select import build_kernel


class CountingKernel:
    name = "counting"

    def __init__(self) -> None:
        self.kernel, self.forwards, self.backwards = build_kernel("sdpa", "cpu"), 0, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.forwards += 1
        return self.kernel.forward(*args, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        self.backwards += 1
        return self.kernel.backward(*args, **kwargs)

    def backward_rows(self, q: Tensor) -> int | None:
        return self.kernel.backward_rows(q)


def traffic_rank(shape: Shape, variant: Variant, checkpointed: bool) -> dict[str, tuple[int, int, int, int]]:
    """``{"forward" | "backward": (all-to-alls, bytes, attention forwards, attention backwards)}`` of one layer."""
    case, rank, degree = Case(shape), dist.get_rank(), dist.get_world_size()
    method = build(shape, variant)
    method.attention.kernel = kernel = CountingKernel()
    tokens = shape.length // degree
    mine = slice(rank * tokens, (rank + 1) * tokens)
    x = case.x[:, mine].float().requires_grad_()
    weights = AttentionWeights(**{k: w.float().requires_grad_() for k, w in case.weights.items()})
    transform = case.transform(shape.positions[:, mine])

    counts = {}

    @contextlib.contextmanager
    def counted(phase: str) -> Iterator[None]:
        method.exchange.traffic, kernel.forwards, kernel.backwards = Traffic(), 0, 0
        yield
        traffic = method.exchange.traffic
        counts[phase] = (traffic.calls, traffic.bytes, kernel.forwards, kernel.backwards)

    with counted("forward"):
        if checkpointed:
            options = {"context_fn": StashForBothRuns(method)} if isinstance(method, StashingMethod) else {}
            y = checkpoint(method, x, weights, transform, shape.head_dim, use_reentrant=False, **options)
        else:
            y = method(x, weights, transform, shape.head_dim, shape.documents)
    with counted("backward"):
        y.backward(case.dy[:, mine].float())
    return counts


# 16 query heads on 4 ranks; 4 KV heads (one a rank), or 2 (each sent to two ranks)
TRAFFIC_SHAPES = {"gqa": SHAPES["gqa"], "copies": Shape(16, 2)}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["ac-none", "ac-full"])
@pytest.mark.parametrize("name", TRAFFIC_SHAPES)
def test_all_to_alls_and_attention_calls_of_one_layer(name: str, checkpointed: bool) -> None:
    shape, degree = TRAFFIC_SHAPES[name], 4
    counts = {
        variant: run_ranks(traffic_rank, degree, shape, variant, checkpointed)[0]
        for variant in [("ulysses", 0, "none", 1), ("upipe", 4, "device", 1), ("upipe", 4, "none", 1)]
    }
    ulysses, stashed, bare = counts.values()

    # q, k, v, o of this rank; a piece for every other rank: [B, N, heads of one rank, d] floats
    head = shape.length // degree * shape.head_dim * 4 * (degree - 1)
    once = head * (4 + 1 + 1 + 4)  # q and o: 4 heads a rank; k and v: 1 head a rank
    stages = 4
    forward_calls = 2 * stages + 2  # q and o of every stage, k and v once
    assert ulysses["forward"] == (4, once, 1, 0)
    assert stashed["forward"] == bare["forward"] == (forward_calls, once, stages, 0)

    # backward: Ulysses sends the gradients; under AC it first sends everything again
    assert ulysses["backward"] == ((8, 2 * once, 1, 1) if checkpointed else (4, once, 0, 1))
    # UPipe projects and exchanges again and sends gradients; with a stash, AC costs no exchange and no attention more
    assert stashed["backward"] == (2 * forward_calls, 2 * once, 0, stages)
    # without one, attention is computed twice: under AC in the second run, which keeps it for the backward at its end
    again = checkpointed
    assert bare["backward"] == ((2 + again) * forward_calls, (2 + again) * once, stages, stages)

    # over the training step, under full AC: the bytes of Ulysses, and no attention computed twice
    if checkpointed:
        assert stashed["forward"][1] + stashed["backward"][1] == ulysses["forward"][1] + ulysses["backward"][1]
        assert stashed["forward"][2] + stashed["backward"][2] == stages


@pytest.mark.parametrize("checkpointed", [False, True], ids=["ac-none", "ac-full"])
@pytest.mark.parametrize("name", TRAFFIC_SHAPES)
def test_a_chunk_is_exchanged_once_and_each_pair_of_chunks_met_once(name: str, checkpointed: bool) -> None:
    """FPDT: the bytes of UPipe; of 3 chunks a query chunk meets the 6 pairs that are not in its future."""
    shape, degree = TRAFFIC_SHAPES[name], 4
    variants: list[Variant] = [("upipe", shape.heads, "host", 1), ("fpdt", 24, "host", 1), ("fpdt", 24, "none", 1)]
    upipe, stashed, bare = (run_ranks(traffic_rank, degree, shape, v, checkpointed)[0] for v in variants)
    for phase in ("forward", "backward"):
        assert stashed[phase][:2] == (3 * upipe[phase][0], upipe[phase][1])
    assert stashed["forward"][2:] == (6, 0)
    assert stashed["backward"][2:] == (0, 6)
    # without a stash attention is computed again once, under checkpointing in the second run
    assert bare["backward"][2:] == (6, 6)


def test_pairs_of_chunks_without_a_common_document_are_skipped() -> None:
    """Documents from 0, 5, 6, 29 and 41: of chunks [0, 24), [24, 48), [48, 64) only neighbours share one."""
    shape = replace(SHAPES["gqa"], starts=((0, 5, 6, 29, 41),))
    counts = run_ranks(traffic_rank, 1, shape, ("fpdt", 24, "device", 1), False)[0]
    squares = 5 + 2  # of documents, two of which are cut by a chunk's edge
    assert counts["forward"][2] == counts["backward"][3] == squares + 2
