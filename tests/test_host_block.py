"""A block whose hidden states are in host memory: the same numbers as the unsharded block, and little on the device."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.late_streams import LateStreams
from tests.ranks import run_ranks
from tests.reference import EPS, Case, Shape, relative_error, run_block
from tests.test_layer import SHAPES, Variant, build, gather, my_tokens, packed
from torchtitan_upipe.cp.host_block import BlockWeights, HostBlock
from torchtitan_upipe.cp.strategy import AttentionWeights
from torchtitan_upipe.cp.upipe import UPipe
from torchtitan_upipe.stash.hidden import HiddenStates
from torchtitan_upipe.stash.host_pool import HostPool
from torchtitan_upipe.stash.stash import Stash
from torchtitan_upipe.stash.transfers import Transfers

TILE = 13  # divides nothing


def run_host_block(
    case: Case, variant: Variant, mine: Tensor, dtype: torch.dtype, pool: HostPool, keeps: bool
) -> dict[str, Tensor]:
    """Output and gradients of this rank's tokens."""
    shape, hidden = case.shape, HiddenStates(pool, TILE)
    method = build(shape, variant)
    assert isinstance(method, UPipe)
    block = HostBlock(method, hidden, partial(Stash, pool.put), keeps, (EPS, EPS))
    w = {name: t.to(dtype, copy=True).requires_grad_() for name, t in case.block_weights().items()}
    attention = AttentionWeights(**{name: w[name] for name in AttentionWeights.__dataclass_fields__ if name in w})
    norm_and_mlp = {name: w[name] for name in ("attention_norm", "ffn_norm", "w1", "w2", "w3")}

    def handle(values: Tensor) -> Tensor:
        new = hidden.new(values.shape, dtype, values.device)
        hidden.of(new).write(slice(None), values.to(dtype))
        return new

    x = handle(case.x[:, mine]).requires_grad_()
    y = block(
        x,
        BlockWeights(attention=attention, **norm_and_mlp),
        case.transform(shape.positions[:, mine]),
        shape.head_dim,
        shape.documents,
    )
    y_rows, whole = hidden.of(y), [slice(0, len(mine))]
    result = {"y": next(y_rows.read(whole)).clone()}
    dx, *grads = torch.autograd.grad(y, [x, *w.values()], handle(case.dy[:, mine]))
    result["x"] = next(hidden.of(dx).read(whole)).clone()
    return result | dict(zip(w, grads, strict=True))


def block_rank(shape: Shape, dtype: torch.dtype, which: list[Variant], seed: int = 0) -> list[dict[str, Tensor]]:
    case = Case(shape, seed).rounded(dtype)
    return [
        run_host_block(case, variant, my_tokens(shape, variant), dtype, HostPool(), keeps=i % 2 == 0)
        for i, variant in enumerate(which)
    ]


def host_variants(shape: Shape, degree: int) -> list[Variant]:
    """UPipe with few and all heads (as Ulysses has them), query tiles, a ring, a hybrid."""
    chunk = min(degree, shape.heads)
    which: list[Variant] = [("upipe", chunk, "host", 1), ("upipe", chunk, "host/3", 1), ("upipe", 0, "host", 1)]
    return which + [("upipe", 0, "host", ring) for ring in (2, 4) if degree % ring == 0]


@pytest.mark.parametrize("mask", ["causal", "packed"])
@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("name", ["mha", "kv2", "wide", "rest", "few"])
def test_float32_matches_the_unsharded_float64_block(name: str, degree: int, mask: str) -> None:
    shape = SHAPES[name] if mask == "causal" else packed(SHAPES[name])
    truth = run_block(Case(shape).rounded(torch.float32), torch.float64)
    which = host_variants(shape, degree)
    ranks = run_ranks(block_rank, degree, shape, torch.float32, which)
    for i, variant in enumerate(which):
        got = gather([r[i] for r in ranks], variant)
        assert got.keys() == truth.keys()
        errors = {key: relative_error(got[key], truth[key]) for key in truth}
        assert max(errors.values()) < 1e-5, (variant, errors)


@pytest.mark.parametrize("degree", [1, 4])
@pytest.mark.parametrize("name", ["kv2", "wide"])
def test_bfloat16_is_as_good_as_the_unsharded_bfloat16_block(name: str, degree: int) -> None:
    shape = replace(SHAPES[name], dim=128, head_dim=32, length=128)
    which, squares = host_variants(shape, degree), []
    for seed in range(4):  # a norm weight's gradient has few elements
        case = Case(shape, seed).rounded(torch.bfloat16)
        truth, plain = run_block(case, torch.float64), run_block(case, torch.bfloat16)
        ranks = run_ranks(block_rank, degree, shape, torch.bfloat16, which, seed)
        got = [gather([r[i] for r in ranks], variant) for i, variant in enumerate(which)]
        squares.append([{key: relative_error(r[key], truth[key]) ** 2 for key in truth} for r in (*got, plain)])
    for i, variant in enumerate(which):
        for key in squares[0][-1]:
            ratio = (sum(s[i][key] for s in squares) / sum(s[-1][key] for s in squares)) ** 0.5
            assert ratio < 1.2, (variant, key)


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("tiles", ["host", "host/3"])
def test_a_block_waits_for_its_copies(tiles: str, keeps: bool) -> None:
    """On a side stream that copies as late as it may."""
    case, variant, mine = Case(SHAPES["kv2"]), ("upipe", 2, tiles, 1), torch.arange(64)
    assert not dist.is_initialized()
    expected = run_host_block(case, variant, mine, torch.float32, HostPool(), keeps)
    streams = LateStreams()
    pool = HostPool(partial(Transfers, streams=streams))
    for _ in range(2):
        got = run_host_block(case, variant, mine, torch.float32, pool, keeps)
        for name, value in expected.items():
            assert torch.equal(got[name], value), name
    assert streams.broken == []
    assert pool.bytes_in_use == 0
