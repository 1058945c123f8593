"""CUDA's operators without a GPU: torch's own shape functions take the arguments that the kernels' wrappers pass.

Nothing is computed. Tensors are on the ``meta`` device, which every build of torch has, or fake ones on ``cuda``, which
need a CUDA build and no driver: there what asks whether a tensor is on CUDA is told yes. Streams and page-locked memory
need a driver: copies to the host have the CPU's here (test_transfers.py looks at their order).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # on fake tensors
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from tests import by_hand
from tests.reference import Shape
from tests.test_layer import HALF, SHAPES, Variant, build, packed, variants
from torchtitan_upipe.cp.rope import Rope
from torchtitan_upipe.cp.strategy import AttentionWeights
from torchtitan_upipe.cp.transform import NormThenRope
from torchtitan_upipe.data.sharding import shard_positions
from torchtitan_upipe.kernels.sdpa import CudaFlashKernel, CudnnKernel
from torchtitan_upipe.stash.host_pool import HostPool
from torchtitan_upipe.stash.transfers import Transfers

RANK, RANKS = 1, 4
FAKE_CUDA = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(torch.version.cuda is None, reason="fake CUDA tensors need a CUDA build of torch"),
)


@pytest.fixture(params=["meta", FAKE_CUDA])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A device type, among whose tensors the test runs; with its backward passes, and ranks that do not exist."""
    fake = request.param == "cuda"
    if fake:
        monkeypatch.setattr(torch.autograd, "grad", by_hand.grad)
    dist.init_process_group(f"cpu:fake,{request.param}:fake", rank=RANK, world_size=RANKS, store=FakeStore())
    with FakeTensorMode() if fake else nullcontext():
        yield request.param
    dist.destroy_process_group()


class FlashCalls(TorchDispatchMode):
    """Counts calls of the attention operators, and looks at what they would read by address."""

    def __init__(self) -> None:
        super().__init__()
        self.forward: Counter[str] = Counter()
        self.backward: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if "flash_attention" in name:
            ways = self.backward if "backward" in name else self.forward
            ways["square" if "scaled_dot_product" in name else "stretches"] += 1
            q, k, v = args[1:4] if ways is self.backward else args[:3]
            assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
            if ways is self.backward:
                assert args[5].is_contiguous()
        return func(*args, **(kwargs or {}))


def heads(device: str, count: int, length: int = 48, width: int = 16) -> Tensor:
    return torch.empty(2, length, count, width, dtype=torch.bfloat16, device=device)


def check(outputs: tuple[Tensor, ...], like: tuple[Tensor, ...]) -> None:
    for output, wanted in zip(outputs, like, strict=True):
        assert (output.shape, output.dtype, output.device) == (wanted.shape, wanted.dtype, wanted.device)
        assert output.stride(-1) == 1


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("count, kv_count", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("kernel", [CudaFlashKernel(), CudnnKernel()], ids=["sdpa", "cudnn"])
def test_one_call(kernel: CudaFlashKernel | CudnnKernel, count: int, kv_count: int, causal: bool, device: str) -> None:
    keys = 48 if causal else 64
    q, k, v = heads(device, count), heads(device, kv_count, keys), heads(device, kv_count, keys)
    out, lse = kernel.forward(q, k, v, scale=0.3, causal=causal)
    check((out, lse), (q, torch.empty(2, count, 48, device=device)))
    strided = torch.empty(count, 2, 48, device=device).transpose(0, 1)
    with FlashCalls():
        check(kernel.backward(torch.empty_like(q), q, k, v, out, strided, scale=0.3, causal=causal), (q, k, v))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("count, kv_count", [(4, 4), (4, 2), (6, 1)])
def test_one_call_for_many_stretches(count: int, kv_count: int, causal: bool, device: str) -> None:
    kernel, rows = CudaFlashKernel(), [5, 1, 42]
    keys = rows if causal else [9, 1, 54]
    q, k, v = heads(device, count), heads(device, kv_count, sum(keys)), heads(device, kv_count, sum(keys))
    with FlashCalls() as calls:
        out, lse = kernel.forward_varlen(q, k, v, rows, keys, scale=0.3, causal=causal)
        check((out, lse), (q, torch.empty(2, count, 48, device=device)))
        strided = torch.empty(2, 48, count, device=device).transpose(1, 2)
        grads = kernel.backward_varlen(torch.empty_like(q), q, k, v, out, strided, rows, keys, scale=0.3, causal=causal)
    check(grads, (q, k, v))
    assert calls.forward == calls.backward == {"stretches": 1}


class DriverlessTransfers(Transfers):
    """Copies with the CPU's streams, of pageable memory; of no memory at all where tensors have none."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, torch.cpu)

    def host_memory(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device="meta" if self.device.type == "meta" else "cpu")


def layer(shape: Shape, variant: Variant, device: str) -> tuple[list[Tensor], Tensor]:
    """Leaves and output of this rank's layer, in bfloat16."""
    with unset_fake_temporarily():  # meshes read their tensors back
        method = build(shape, variant, kernel=CudaFlashKernel(), pool=HostPool(DriverlessTransfers))
    width, tokens = shape.head_dim, len(shard_positions(shape.length, RANK, RANKS // variant[3], variant[3]))

    def leaf(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device=device, requires_grad=True)

    weights = {"wq": leaf(shape.heads * width, shape.dim), "wo": leaf(shape.dim, shape.heads * width)}
    weights |= {name: leaf(shape.kv_heads * width, shape.dim) for name in ("wk", "wv")}
    weights |= {name: leaf(width) for name in ("q_norm", "k_norm") if shape.norm}
    x = leaf(shape.batch, tokens, shape.dim)
    frequencies = torch.empty(width // 2, dtype=torch.float64, device=device)
    positions = torch.empty(len(shape.positions), tokens, dtype=torch.int64, device=device)
    transform = NormThenRope(Rope(frequencies, positions, shape.interleaved), 1e-6)
    return [x, *weights.values()], method(x, AttentionWeights(**weights), transform, width, shape.documents)


@pytest.mark.parametrize("mask", ["causal", "packed"])
@pytest.mark.parametrize("name", ["mha", "kv2", "wide", "rest"])
def test_every_layer(name: str, mask: str, device: str) -> None:
    """Forward and backward of all methods, rings, chunks and stashes on the device, with CUDA's attention."""
    shape = SHAPES[name] if mask == "causal" else packed(SHAPES[name])
    used = Counter[str]()
    for variant in variants(shape, RANKS)[HALF[mask]]:
        method, _, stash, _ = variant
        with FlashCalls() as calls:
            leaves, y = layer(shape, variant, device)
            check((y,), leaves[:1])
            check(torch.autograd.grad(y, leaves, torch.empty_like(y)), tuple(leaves))
        if "/" not in stash:  # of a query tile's backward, keys may be split further
            runs = 2 if method in ("upipe", "fpdt") and stash == "none" else 1
            assert calls.forward == {way: runs * count for way, count in calls.backward.items()}
        used += calls.forward
    assert set(used) == {"square", "stretches"}


# --- what dry runs say of CUDA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [FAKE_CUDA], indirect=True)
def test_cudas_norm_keeps_its_arguments_and_a_scale(device: str) -> None:
    """As ``FusedRMSNorm`` of dry_run/simulate.py, its stand-in, does."""
    x, weight = (torch.empty(*size, dtype=torch.bfloat16, device=device, requires_grad=True) for size in ((6, 8), (8,)))
    node = F.rms_norm(x, weight.shape, weight, 1e-5).grad_fn
    kept = tuple(getattr(node, name) for name in dir(node) if name.startswith("_saved_"))
    check(tuple(t for t in kept if isinstance(t, Tensor)), (x, torch.empty(6, 1, device=device), weight))


@pytest.mark.parametrize("device", [FAKE_CUDA], indirect=True)
def test_cudas_log_softmax_copies_bfloat16_before_it_widens(device: str) -> None:
    """Why tiled/loss.py widens by itself."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    found = {}
    for dtype in (torch.float16, torch.bfloat16):
        names: list[str] = []
        with Names():
            F.log_softmax(torch.empty(4, 8, dtype=dtype, device=device), dim=-1, dtype=torch.float32)
        found[dtype] = [name for name in names if "softmax" in name or "copy" in name]
    assert found == {
        torch.float16: ["_log_softmax.default"],
        torch.bfloat16: ["_to_copy.default", "_log_softmax.default"],
    }
