"""What only a GPU can show: ``python -m pytest -m cuda``. The same bodies run on CPU where a CPU kernel can.

Kernels, layers, tiles and training on one device, each against the unsharded float64 reference; copies beside the
computation against the same without them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from tests.jobs import job_args, read_log
from tests.reference import Case, Shape, relative_error, run_layer, run_method
from tests.strict import strict_kernel
from tests.test_command import torchrun
from tests.test_kernels import SCALE, draw, truth
from tests.test_layer import SHAPES, build, packed, variants
from tests.test_tiled import PARTS, labels_with_ignored, plain_loss, run, tiled_loss
from torchtitan_upipe.kernels.contract import AttentionKernel, VarlenKernel, does_varlen
from torchtitan_upipe.kernels.select import CUDA_ONLY, build_kernel, check_kernel
from torchtitan_upipe.stash.host_pool import HostPool
from torchtitan_upipe.stash.offload import BlockOffload, OffloadedBlock

MARKS = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=MARKS)])
kernels = pytest.mark.parametrize("name", ["sdpa", "cudnn", "flash2", "flash3"])
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])

TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
QUERIES, KEYS = (5, 130, 1, 64), (77, 3, 1, 200)  # stretches of a variable-length call


@pytest.fixture
def kernel(name: str, device: str, record_property: Callable[[str, object], None]) -> AttentionKernel:
    """The kernel, or a skipped test that says what it needs; the benchmarks do not use one that has failed here."""
    record_property("kernel", name)
    if device == "cpu" and name in CUDA_ONLY:
        pytest.skip(f"{name} is for CUDA")
    try:
        check_kernel(name, device, torch.bfloat16)
    except ValueError as error:
        pytest.skip(str(error))
    return build_kernel(name, device)


def rounded(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What a kernel is given, in float64 again."""
    return [t.to(dtype).double().requires_grad_() for t in tensors]


def assert_close(got: tuple[Tensor, ...], out: Tensor, lse: Tensor, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Output, log-sum-exp and gradients against those of the float64 inputs."""
    got_out, got_lse, *grads = got
    assert got_out.dtype == dtype
    assert got_lse.dtype == torch.float32
    assert relative_error(got_out.cpu(), out.detach()) < TOLERANCE[dtype]
    assert relative_error(got_lse.cpu(), lse.detach()) < TOLERANCE[dtype] / 10
    for grad, reference in zip(grads, inputs, strict=True):
        assert reference.grad is not None
        assert grad.shape == reference.shape
        assert relative_error(grad.cpu(), reference.grad) < TOLERANCE[dtype]


# --- kernels ----------------------------------------------------------------------------------------------------------


def both_passes(
    kernel: AttentionKernel, device: str, dtype: torch.dtype, qkv: list[Tensor], dout: Tensor, causal: bool
) -> tuple[Tensor, ...]:
    inputs = [t.detach().to(device, dtype) for t in qkv]
    out, lse = kernel.forward(*inputs, scale=SCALE, causal=causal)
    return out, lse, *kernel.backward(dout.to(device, dtype), *inputs, out, lse, scale=SCALE, causal=causal)


@devices
@kernels
@dtypes
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 1), (6, 2)])
@pytest.mark.parametrize("queries, keys, causal", [(200, 200, True), (200, 200, False), (72, 200, False)])
def test_kernel(
    kernel: AttentionKernel,
    device: str,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    causal: bool,
) -> None:
    q, k, v = draw(heads, kv_heads, length=keys, width=64)
    qkv = rounded([q[:, :queries] / 2, k, v], dtype)
    out, lse = truth(*qkv, causal=causal)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    out.backward(dout.double())
    assert_close(both_passes(kernel, device, dtype, qkv, dout, causal), out, lse, qkv, dtype)


def stretched(function: Callable[..., Any], tensors: list[Tensor], lengths: list[tuple[int, ...]]) -> list[Any]:
    """``function`` of each stretch."""
    parts = [t.split(list(each), dim=1) for t, each in zip(tensors, lengths, strict=True)]
    return [function(*part) for part in zip(*parts, strict=True)]


def check_varlen(
    kernel: VarlenKernel, device: str, dtype: torch.dtype, heads: int, kv_heads: int, causal: bool
) -> None:
    rows, keys = QUERIES, QUERIES if causal else KEYS
    q, k, v = draw(heads, kv_heads, length=max(sum(rows), sum(keys)), width=64)
    qkv = rounded([q[:, : sum(rows)] / 2, k[:, : sum(keys)], v[:, : sum(keys)]], dtype)
    parts = stretched(lambda *part: truth(*part, causal=causal), qkv, [rows, keys, keys])
    out, lse = torch.cat([part[0] for part in parts], dim=1), torch.cat([part[1] for part in parts], dim=2)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    out.backward(dout.double())

    inputs, options = [t.detach().to(device, dtype) for t in qkv], {"scale": SCALE, "causal": causal}
    got, got_lse = kernel.forward_varlen(*inputs, rows, keys, **options)
    grads = kernel.backward_varlen(dout.to(device), *inputs, got, got_lse, rows, keys, **options)
    assert_close((got, got_lse, *grads), out, lse, qkv, dtype)


@devices
@kernels
@dtypes
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("causal", [True, False])
def test_many_stretches_in_one_call(
    kernel: AttentionKernel,
    name: str,
    device: str,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    causal: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On CPU by operators that promise what CUDA's do (tests/strict.py)."""
    if device == "cpu":
        kernel = strict_kernel(monkeypatch)[0]
    if not does_varlen(kernel):
        pytest.skip(f"{name} has no variable-length call")
    check_varlen(kernel, device, dtype, heads, kv_heads, causal)


# --- layers -----------------------------------------------------------------------------------------------------------


@devices
@kernels
@pytest.mark.parametrize("mask", ["causal", "packed"])
@pytest.mark.parametrize("shape_name", ["gqa", "kv2", "wide"])
def test_layer(kernel: AttentionKernel, device: str, shape_name: str, mask: str) -> None:
    """Every method, head chunk, stash and number of query tiles: as good as the plain bfloat16 layer."""
    shape = replace(SHAPES[shape_name], dim=128, head_dim=64, length=384 if device == "cuda" else 128)
    shape = shape if mask == "causal" else packed(shape)
    which = variants(shape, 1)
    draws = (8 if device == "cuda" else 4) if shape.norm else 1  # a norm's weight has few elements
    squares = [layer_square_errors(kernel, shape, device, seed) for seed in range(draws)]
    for i, variant in enumerate(which):
        for key in squares[0][-1]:
            ratio = (sum(s[i][key] for s in squares) / sum(s[-1][key] for s in squares)) ** 0.5
            assert ratio < 1.2, (variant, key)


def layer_square_errors(kernel: AttentionKernel, shape: Shape, device: str, seed: int) -> list[dict[str, float]]:
    """Squared errors of each variant and, last, of the plain layer."""
    case = Case(shape, seed).rounded(torch.bfloat16)
    reference, mine = run_layer(case, torch.float64), torch.arange(shape.length)
    results = [
        run_method(case, build(shape, variant, device, kernel), mine, torch.bfloat16, device)
        for variant in variants(shape, 1)
    ]
    results.append(run_layer(case, torch.bfloat16, device))
    return [{key: relative_error(r[key].cpu(), reference[key]) ** 2 for key in reference} for r in results]


@devices
@pytest.mark.parametrize("tiles", [1, 3])
def test_a_stash_on_the_host_changes_nothing(device: str, tiles: int) -> None:
    """Again and again in the same buffers: a copy that ran too late or too early would show."""
    shape = replace(SHAPES["gqa"], dim=128, head_dim=64, length=4096 if device == "cuda" else 96)
    case, mine = Case(shape).rounded(torch.bfloat16), torch.arange(shape.length)
    on_device, on_host = (
        build(shape, ("upipe", 4, f"{stash}/{tiles}", 1), device, build_kernel("sdpa", device))
        for stash in ("device", "host")
    )
    expected = run_method(case, on_device, mine, torch.bfloat16, device)
    for _ in range(8 if device == "cuda" else 2):
        got = run_method(case, on_host, mine, torch.bfloat16, device)
        assert torch.equal(got["y"], expected["y"])
        for name, tensor in got.items():  # CUDA's backward kernel adds in no fixed order
            assert relative_error(tensor, expected[name]) < 5e-3, name


# --- block inputs in host memory --------------------------------------------------------------------------------------


def gradients(device: str, width: int, rows: int, offload: BlockOffload | None) -> list[Tensor]:
    """Of six checkpointed blocks: matrix products, whose order of sums is fixed."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(6)]
    model = nn.ModuleList(
        OffloadedBlock(block, offload) if offload else CheckpointWrapper(block) for block in blocks
    ).to(device, torch.bfloat16)
    x = torch.randn(1, rows, width).to(device, torch.bfloat16).requires_grad_()
    hidden = x
    for block in model:
        hidden = hidden + block(hidden)
    hidden.float().square().mean().backward()
    return [t.grad for t in (x, *model.parameters()) if t.grad is not None]


@devices
def test_block_inputs_on_the_host_change_nothing(device: str) -> None:
    """To the bit, in buffers that are pinned on CUDA and used again in each of many steps."""
    width, rows = (1024, 16384) if device == "cuda" else (16, 64)
    expected, offload = gradients(device, width, rows, None), BlockOffload(HostPool())
    for _ in range(5):
        got = gradients(device, width, rows, offload)
        assert len(got) == len(expected) == 1 + 4 * 6
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert offload.pool.bytes == 6 * rows * width * 2
    assert offload.pool.acquire(2 * rows * width, torch.device(device)).is_pinned() == (device == "cuda")


# --- norm, feed-forward and loss in tiles -----------------------------------------------------------------------------


@devices
@pytest.mark.parametrize("tile_size", [33, 128, 1280])
@pytest.mark.parametrize("part", PARTS)
def test_tiles(part: str, tile_size: int, device: str) -> None:
    make, plain, tiled = PARTS[part]
    if part == "loss":
        labels = labels_with_ignored().to(device)
        plain, tiled = partial(plain_loss, labels=labels), partial(tiled_loss, labels=labels)
    inputs = {name: t.to(torch.bfloat16).double() for name, t in make().items()}
    on_device = {name: t.to(device) for name, t in inputs.items()}
    reference = run(PARTS[part][1], inputs, torch.float64)
    own, got = run(plain, on_device, torch.bfloat16), run(tiled(tile_size), on_device, torch.bfloat16)
    for name in reference:
        plain_error = relative_error(own[name].cpu(), reference[name])
        assert relative_error(got[name].cpu(), reference[name]) < max(1.2 * plain_error, 2e-3), name


# --- training ---------------------------------------------------------------------------------------------------------

EVERYTHING_ON_THE_HOST = {
    "context_parallel__head_chunk": 4,
    "context_parallel__stash": "host",
    "context_parallel__query_tiles": 2,
    "context_parallel__tile_size": 64,
    "activation_checkpoint__mode": "full",
    "activation_checkpoint__offload": True,
}
JOBS: dict[str, dict[str, object]] = {
    "upipe": EVERYTHING_ON_THE_HOST,
    "ulysses": {"context_parallel__method": "ulysses"},
}


@pytest.mark.parametrize(
    "job, device",
    [("upipe", "cpu"), pytest.param("upipe", "cuda", marks=MARKS), pytest.param("ulysses", "cuda", marks=MARKS)],
)
def test_ten_steps_in_bfloat16(job: str, device: str, tmp_path: Path) -> None:
    more = {"training__mixed_precision_param": "bfloat16", "optimizer__lr": 1e-2, "training__seq_len": 512}
    args = job_args(tmp_path, 1, **JOBS[job], **more)
    result = torchrun(1, "-m", "torchtitan_upipe.train", *args)
    assert result.returncode == 0, result.stderr[-3000:]
    log = read_log(tmp_path)
    assert len(log.loss) == 10
    assert all(math.isfinite(value) for value in (*log.loss, *log.grad_norm))
    assert min(log.loss[-2:]) < log.loss[0] - 0.3
