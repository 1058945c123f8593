"""The attention layer of every method against the unsharded one: output and every gradient (docs/design.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from tests.ranks import run_ranks
from tests.reference import Case, Shape, relative_error, run_layer, run_method
from tests.strict import strict_kernel
from torchtitan_upipe.cp.build import build_method
from torchtitan_upipe.cp.head_schedule import HeadPlacement, HeadSchedule, KernelCall, Stage, round_head_chunk
from torchtitan_upipe.cp.upipe import UPipe
from torchtitan_upipe.data.sharding import shard_positions
from torchtitan_upipe.kernels.contract import AttentionKernel
from torchtitan_upipe.kernels.select import build_kernel
from torchtitan_upipe.stash.host_pool import HostPool
from torchtitan_upipe.stash.stash import Stash

Variant = tuple[str, int, str, int]  # method, head or sequence chunk, stash (and query tiles: "host/3"), ring degree

SHAPES = {
    "mha": Shape(8, 8, batch=2),
    "gqa": Shape(16, 4),
    "mqa": Shape(8, 1, interleaved=False),
    "kv2": Shape(8, 2, batch=2),  # KV < C at C = 4
    "wide": Shape(8, 4, head_dim=16, dim=96, norm=True, interleaved=False),  # H*d = 128, D = 96: Qwen3-like
    "norm": Shape(12, 4, norm=True, batch=2, scale=1.25),  # YaRN's attention factor
    "ragged": Shape(12, 6, scale=1.5),  # ranks of 3 heads cut across KV heads of 2
    # head counts that the ranks do not divide: teams of ranks share heads
    "rest": Shape(14, 2),  # as Qwen2.5-7B's 28 and 4, halved
    "fifteen": Shape(15, 5, batch=2),
    "few": Shape(3, 1, norm=True),  # fewer heads than ranks
    "two": Shape(2, 2),
    "bias": Shape(7, 1, bias=True, batch=2),  # as Qwen2's
}

# Documents of many lengths, one token among them; none divides anything. The second sequence is one document.
PACKED = ((0, 5, 6, 29, 41), (0,))


HALF = {"causal": slice(0, None, 2), "packed": slice(1, None, 2)}  # of the variants; docs/correctness.md has all

SEQUENCE_CHUNKS = (64, 28, 8)  # of 64 tokens: one chunk, three with a shorter last, eight
STASHES = ("device", "none", "host/3", "none/5", "host")  # and how many query tiles


def packed(shape: Shape) -> Shape:
    return replace(shape, starts=PACKED[: shape.batch])


def variants(shape: Shape, degree: int) -> list[Variant]:
    """Every method, split of ``degree`` into ulysses x ring (all ring: pure ring), and several chunks."""
    which: list[Variant] = []
    for ring in [r for r in (1, 2, 4) if degree % r == 0]:
        chunks = sorted({round_head_chunk(shape.heads, degree // ring, u) for u in range(1, shape.heads + 1)})
        if len(chunks) > 6:
            chunks = chunks[:: len(chunks) // 3]  # 1, ..., H
        which.append(("ulysses", 0, "none", ring))
        kinds = islice(cycle(STASHES), shape.heads + ring, None)  # each shape pairs them with the chunks in its own way
        which += [("upipe", u, stash, ring) for u, stash in zip(chunks, kinds, strict=False)]
    which += [
        ("fpdt", chunk, stash, 1) for chunk, stash in zip(SEQUENCE_CHUNKS, ("device", "none", "host"), strict=True)
    ]
    return which


def build(
    shape: Shape,
    variant: Variant,
    device: str = "cpu",
    kernel: AttentionKernel | None = None,
    pool: HostPool | None = None,
) -> Any:
    method, chunk, stash_and_tiles, ring_degree = variant
    stash, _, tiles = stash_and_tiles.partition("/")
    pool = pool or HostPool()
    new_stash = {"none": None, "device": Stash, "host": partial(Stash, pool.put)}[stash]
    world = dist.get_world_size() if dist.is_initialized() else 1
    ulysses_group = ring_group = None
    if ring_degree == world > 1:
        ring_group = dist.group.WORLD
    elif ring_degree > 1:
        grid = init_device_mesh("cpu", (ring_degree, world // ring_degree), mesh_dim_names=("ring", "ulysses"))
        ulysses_group, ring_group = grid.get_group("ulysses"), grid.get_group("ring")
    elif world > 1:
        ulysses_group = dist.group.WORLD
    return build_method(
        method,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_chunk=0 if method == "fpdt" else chunk,
        new_stash=new_stash,
        query_tiles=int(tiles or 1),
        put_away=pool.put,
        sequence_chunk=chunk if method == "fpdt" else 0,
        ulysses_group=ulysses_group,
        ring_group=ring_group,
        kernel=kernel or build_kernel("sdpa", device),
    )


def my_tokens(shape: Shape, variant: Variant) -> Tensor:
    return shard_positions(shape.length, dist.get_rank(), *layout(variant, dist.get_world_size()))


def layout(variant: Variant, degree: int) -> tuple[int, int, int]:
    """Ulysses and ring degree, and the sequence chunk, of how ``variant`` shards a sequence."""
    method, chunk, _, ring = variant
    return degree // ring, ring, chunk if method == "fpdt" else 0


def layer_rank(shape: Shape, dtype: torch.dtype, which: list[Variant], seed: int = 0) -> list[dict[str, Tensor]]:
    case = Case(shape, seed).rounded(dtype)
    return [run_method(case, build(shape, variant), my_tokens(shape, variant), dtype) for variant in which]


def strict_rank(shape: Shape, which: list[Variant], *kernel_and_largest: Any) -> tuple[list[Any], dict[str, int]]:
    """Results on a strict kernel, and how often each of its operators was called."""
    with pytest.MonkeyPatch.context() as patch:
        kernel, operators = strict_kernel(patch, *kernel_and_largest)
        results = []
        for variant in which:
            method = build(shape, variant, kernel=kernel)
            results.append(
                run_method(Case(shape).rounded(torch.float32), method, my_tokens(shape, variant), torch.float32)
            )
    return results, operators.calls


def gather(ranks: list[dict[str, Tensor]], variant: Variant) -> dict[str, Tensor]:
    """Outputs and ``dx`` in the order of the sequence; weight gradients summed, as FSDP would."""
    length, degree = sum(r["y"].shape[1] for r in ranks), len(ranks)
    order = torch.cat([shard_positions(length, rank, *layout(variant, degree)) for rank in range(degree)]).argsort()
    return {
        name: torch.cat([r[name] for r in ranks], dim=1)[:, order]
        if name in ("y", "x")
        else torch.stack([r[name].double() for r in ranks]).sum(0)
        for name in ranks[0]
    }


@pytest.mark.parametrize("mask", ["causal", "packed"])
@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_float32_matches_the_unsharded_float64_layer(name: str, degree: int, mask: str) -> None:
    """Every method and chunk with either mask; docs/correctness.md and the slow test have all of them with both."""
    check_float32(name, degree, mask, HALF[mask])


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["causal", "packed"])
@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_the_whole_matrix_in_float32(name: str, degree: int, mask: str) -> None:
    check_float32(name, degree, mask, slice(None))


def check_float32(name: str, degree: int, mask: str, some: slice) -> None:
    shape = SHAPES[name] if mask == "causal" else packed(SHAPES[name])
    truth = run_layer(Case(shape).rounded(torch.float32), torch.float64)
    which = variants(shape, degree)[some]
    ranks = run_ranks(layer_rank, degree, shape, torch.float32, which)
    for i, variant in enumerate(which):
        got = gather([r[i] for r in ranks], variant)
        assert got.keys() == truth.keys()
        errors = {key: relative_error(got[key], truth[key]) for key in truth}
        assert max(errors.values()) < 1e-5, (variant, errors)


@pytest.mark.parametrize("mask", ["causal", "packed"])
@pytest.mark.parametrize("name", ["mha", "kv2", "rest"])
def test_nothing_asks_more_of_a_kernel_than_cuda_kernels_promise(name: str, mask: str) -> None:
    """Every method, ring and hybrids, batch 2, query tiles, documents, on tests/strict.py."""
    shape = SHAPES[name] if mask == "causal" else packed(SHAPES[name])
    calls = check_strict(shape, variants(shape, 4)[HALF[mask]])
    assert set(calls) == {"forward", "backward", "varlen forward", "varlen backward"}


@pytest.mark.parametrize("mask", ["causal", "packed"])
@pytest.mark.parametrize("kernel, largest", [("sdpa", 1 << 9), ("flash2", 1 << 9), ("cudnn", 1 << 31)])
def test_each_wrapper_keeps_its_kernels_contract(kernel: str, largest: int, mask: str) -> None:
    """The same of some layers on each kernel, where 32 bits end early."""
    shape = SHAPES["kv2"] if mask == "causal" else packed(SHAPES["kv2"])
    calls = check_strict(shape, variants(shape, 4)[::3], kernel, largest)
    assert ("varlen backward" in calls) == (kernel != "cudnn")


def check_strict(shape: Shape, which: list[Variant], *kernel_and_largest: Any) -> dict[str, int]:
    truth = run_layer(Case(shape).rounded(torch.float32), torch.float64)
    ranks = run_ranks(strict_rank, 4, shape, which, *kernel_and_largest)
    for i, variant in enumerate(which):
        got = gather([r[0][i] for r in ranks], variant)
        errors = {key: relative_error(got[key], truth[key]) for key in truth}
        assert max(errors.values()) < 1e-5, (variant, errors)
    return ranks[0][1]


BFLOAT16 = ("gqa", "kv2", "wide", "rest", "few", "bias")


@pytest.mark.parametrize("mask", ["causal", "packed"])
@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_is_as_good_as_the_unsharded_bfloat16_layer(name: str, degree: int, mask: str) -> None:
    # A bias gives the values of a head a common part, which stays in the outputs: where partial outputs are merged, it
    # is rounded once more than in the plain layer (measured: 1.32).
    assert bfloat16_ratio(name, mask, degree, HALF[mask]) < (1.4 if SHAPES[name].bias else 1.2)


def bfloat16_ratio(name: str, mask: str, degree: int, some: slice = slice(None)) -> float:
    """The worst variant's error over the plain bfloat16 layer's own, of the output or of any gradient."""
    shape = replace(SHAPES[name], dim=128, head_dim=32, length=128)
    shape = shape if mask == "causal" else packed(shape)
    which = variants(shape, degree)[some]
    # the gradient of a norm weight or a bias has 32 elements: one draw of its error says little, four say enough
    seeds = range(4 if shape.norm or shape.bias else 1)
    ranks = run_ranks(drawn_layer_rank, degree, shape, torch.bfloat16, which, seeds)
    squares = [bfloat16_square_errors(shape, which, seed, [r[seed] for r in ranks]) for seed in seeds]
    return max(
        (sum(s[i][key] for s in squares) / sum(s[-1][key] for s in squares)) ** 0.5
        for i in range(len(which))
        for key in squares[0][-1]
    )


def drawn_layer_rank(shape: Shape, dtype: torch.dtype, which: list[Variant], seeds: Sequence[int]) -> list[Any]:
    return [layer_rank(shape, dtype, which, seed) for seed in seeds]


def bfloat16_square_errors(
    shape: Shape, which: list[Variant], seed: int, ranks: list[list[dict[str, Tensor]]]
) -> list[dict[str, float]]:
    """Squared relative errors of each variant's output and gradients and, last, of the plain bfloat16 layer's."""
    case = Case(shape, seed).rounded(torch.bfloat16)
    truth, plain = run_layer(case, torch.float64), run_layer(case, torch.bfloat16)
    got = [gather([r[i] for r in ranks], variant) for i, variant in enumerate(which)]
    return [{key: relative_error(result[key], truth[key]) ** 2 for key in truth} for result in (*got, plain)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gqa", "kv2", "ragged"])
def test_one_stage_and_one_chunk_are_bit_equal_to_ulysses(name: str, dtype: torch.dtype) -> None:
    shape = SHAPES[name]
    which: list[Variant] = [("upipe", shape.heads, "device", 1), ("fpdt", shape.length, "device", 1)]
    ranks = run_ranks(layer_rank, 4, shape, dtype, [("ulysses", 0, "none", 1), *which])
    for ulysses, *others in ranks:
        assert all(torch.equal(ulysses["y"], other["y"]) for other in others)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["gqa", "kv2", "wide"])
def test_bfloat16_on_one_gpu(name: str) -> None:
    shape = replace(SHAPES[name], dim=512, head_dim=64, length=1024)
    case = Case(shape).rounded(torch.bfloat16)
    truth, plain = run_layer(case, torch.float64), run_layer(case, torch.bfloat16, "cuda")
    for variant in variants(shape, 1):
        got = run_method(case, build(shape, variant, "cuda"), torch.arange(shape.length), torch.bfloat16, "cuda")
        for key in truth:
            error = relative_error(got[key].cpu(), truth[key])
            assert error < 1.2 * relative_error(plain[key].cpu(), truth[key]), (variant, key)


def perturbed_rank(shape: Shape, variant: Variant, tokens: list[int]) -> list[Tensor]:
    """For each of ``tokens``: which of this rank's tokens change their output when that token of the input does."""
    mine = my_tokens(shape, variant)

    def output(case: Case) -> Tensor:
        return run_method(case, build(shape, variant), mine, torch.float32)["y"]

    moved = []
    for token in tokens:
        case = Case(shape)
        before = output(case)
        case.x[:, token] += 1
        moved.append(mine[(before != output(case)).any(dim=-1).any(dim=0)])
    return moved


PROBES: dict[str, Variant] = {
    "ulysses": ("ulysses", 0, "none", 1),
    "upipe": ("upipe", 4, "device", 1),
    "upipe-teams": ("upipe", 1, "device", 1),
    "ring": ("ring", 0, "none", 4),
    "hybrid-ulysses": ("ulysses", 0, "none", 2),
    "hybrid-upipe": ("upipe", 4, "device", 2),
    "hybrid-upipe-teams": ("upipe", 1, "device", 2),
    "fpdt": ("fpdt", 12, "device", 1),
    "fpdt-host": ("fpdt", 20, "host", 1),
}


@pytest.mark.parametrize("variant", PROBES.values(), ids=PROBES)
def test_a_token_changes_itself_and_what_comes_after(variant: Variant) -> None:
    """To the bit: every output before the changed token stays, every one from it on moves."""
    shape, tokens = SHAPES["kv2"], [0, 21, 63]
    ranks = run_ranks(perturbed_rank, 4, shape, variant, tokens)
    for token, *moved in zip(tokens, *ranks, strict=True):
        assert sorted(torch.cat(moved).tolist()) == list(range(token, shape.length))


@pytest.mark.parametrize("variant", PROBES.values(), ids=PROBES)
def test_a_token_changes_only_its_own_document(variant: Variant) -> None:
    shape, tokens = packed(replace(SHAPES["kv2"], batch=1)), [0, 5, 21, 63]
    ranks = run_ranks(perturbed_rank, 4, shape, variant, tokens)
    for token, *moved in zip(tokens, *ranks, strict=True):
        end = min([start for start in PACKED[0] if start > token], default=shape.length)
        assert sorted(torch.cat(moved).tolist()) == list(range(token, end))


def test_errors_do_not_grow_with_the_ring() -> None:
    shape = replace(SHAPES["gqa"], dim=128, head_dim=32, length=256)
    case = Case(shape).rounded(torch.bfloat16)
    truth = run_layer(case, torch.float64)
    errors = {}
    for degree in (1, 4):
        ring: Variant = ("ring", 0, "none", degree)
        ranks = run_ranks(layer_rank, degree, shape, torch.bfloat16, [ring])
        got = gather([r[0] for r in ranks], ring)
        errors[degree] = {key: relative_error(got[key], truth[key]) for key in truth}
    for key in truth:
        assert errors[4][key] < 1.5 * errors[1][key], (key, errors)


# --- a wrong schedule must be noticed -------------------------------------------------------------------------------


def swap_two_query_heads(schedule: HeadSchedule) -> HeadSchedule:
    """Rank 0 computes query head 6 in stage 0 and head 1 in the last stage: each meets the other's KV head."""

    def put(index: int, heads: tuple[int, ...]) -> Stage:
        stage = schedule.stages[index]
        return replace(stage, queries=HeadPlacement((heads, *stage.queries.heads[1:])))

    return replace(schedule, stages=(put(0, (0, 6)), *schedule.stages[1:-1], put(-1, (1, 7))))


def use_the_other_kv_head(schedule: HeadSchedule) -> HeadSchedule:
    """Rank 0's first call of stage 0 reads KV head 1 instead of 0."""
    stage = schedule.stages[0]
    (call, *more), *others = stage.calls
    wrong = KernelCall(call.queries, call.block, (1, 2))
    return replace(schedule, stages=(replace(stage, calls=((wrong, *more), *others)), *schedule.stages[1:]))


def mutated_rank(shape: Shape, head_chunk: int, mutate: Any) -> dict[str, Tensor]:
    upipe = build(shape, ("upipe", head_chunk, "device", 1))
    assert isinstance(upipe, UPipe)
    upipe.schedule = mutate(upipe.schedule)
    return run_method(Case(shape), upipe, my_tokens(shape, ("upipe", head_chunk, "device", 1)), torch.float32)


@pytest.mark.parametrize(
    "mutate, head_chunk", [(swap_two_query_heads, 4), (use_the_other_kv_head, 16)], ids=["query", "key"]
)
def test_a_mutated_schedule_is_wrong(mutate: Any, head_chunk: int) -> None:
    shape = SHAPES["gqa"]
    truth = run_layer(Case(shape), torch.float64)
    got = gather(run_ranks(mutated_rank, 2, shape, head_chunk, mutate), ("upipe", head_chunk, "device", 1))
    assert relative_error(got["y"], truth["y"]) > 1e-2
