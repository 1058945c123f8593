"""Copies beside the computation: nothing used before its event, held longer than said, or rounded up.

``late_streams.py`` stands for a GPU's side stream.
"""

from __future__ import annotations

import gc
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.late_streams import LateStreams
from tests.reference import Case, Shape, run_method
from tests.test_offload import Model, step
from torchtitan_upipe.cp.build import build_method
from torchtitan_upipe.kernels.contract import AttentionKernel
from torchtitan_upipe.kernels.sdpa import CpuFlashKernel
from torchtitan_upipe.stash.hidden import HiddenStates
from torchtitan_upipe.stash.host_pool import HostPool
from torchtitan_upipe.stash.offload import BlockOffload
from torchtitan_upipe.stash.stash import KeptOnDevice, Stash
from torchtitan_upipe.stash.transfers import Transfers, page_locked
from torchtitan_upipe.tiled import tiles as tiles_module

LAYER = Shape(8, 4, batch=2, norm=True)
CUDA = torch.device("cuda")


def late_pool() -> tuple[HostPool, LateStreams]:
    streams = LateStreams()
    return HostPool(partial(Transfers, streams=streams)), streams


def run(new_stash: Callable[[], Stash], tiles: int = 1, kernel: AttentionKernel | None = None) -> dict[str, Tensor]:
    method = build_method(
        "upipe",
        num_heads=LAYER.heads,
        num_kv_heads=LAYER.kv_heads,
        head_chunk=2,
        new_stash=new_stash,
        query_tiles=tiles,
        ulysses_group=None,
        ring_group=None,
        kernel=kernel or CpuFlashKernel(),
    )
    return run_method(Case(LAYER), method, torch.arange(LAYER.length), torch.float32)


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [8192, 16], ids=["one slice", "many slices"])
@pytest.mark.parametrize("tiles", [1, 3])
def test_a_stash_on_the_host_waits_for_its_copies(monkeypatch: pytest.MonkeyPatch, tiles: int, rows: int) -> None:
    monkeypatch.setattr(tiles_module, "ROWS", rows)
    pool, streams = late_pool()
    expected = run(Stash, tiles)
    for _ in range(2):  # the second time in used buffers
        got = run(lambda: Stash(pool.put), tiles)
        for name, value in expected.items():
            assert torch.equal(got[name], value), name
    assert streams.copies > 2 * 4 * tiles
    assert streams.broken == []
    assert pool.bytes_in_use == 0


def test_block_inputs_wait_for_their_copies() -> None:
    expected = step(Model(None))
    pool, streams = late_pool()
    model = Model(BlockOffload(pool))
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(step(model), expected, strict=True))
    assert streams.copies >= 2 * 2 * 6
    assert streams.broken == []


def test_what_is_dropped_on_its_way_is_waited_for() -> None:
    pool, streams = late_pool()
    copy = pool.put(torch.ones(2, 8))
    copy.begin_read(slice(0, 4))
    copy.fetch()
    del copy
    assert streams.done == streams.copies
    assert streams.broken == []


def test_reads_are_one_ahead() -> None:
    """While the caller has one slice, the next one is on its way, and no other."""
    pool, streams = late_pool()
    stash = Stash(pool.put)
    for stage in range(3):
        stash.put((stage, 0), torch.full((1, 4, 2, 2), float(stage)), torch.zeros(1, 2, 4))
    stash.settle()
    before = streams.copies
    for count, o in enumerate(stash.outputs(((stage, 0), slice(1, 3)) for stage in range(3))):
        assert streams.copies - before == min(count + 2, 3)
        assert streams.done - before == count + 1
        assert torch.equal(o, torch.full((1, 2, 2, 2), float(count)))


# --- what stays on the device -----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Leaving:
    """Put away like a copy to the host, on the device until it is settled."""

    tensor: Tensor
    on_device: set[Leaving]

    def __post_init__(self) -> None:
        self.on_device.add(self)

    def settle(self) -> None:
        self.on_device.discard(self)

    def begin_read(self, rows: slice) -> KeptOnDevice:
        self.settle()
        return KeptOnDevice(self.tensor[:, rows].clone())

    def fetch(self) -> None:
        self.settle()

    def get(self) -> Tensor:
        self.settle()
        return self.tensor


class Watching(CpuFlashKernel):
    """Notes how much of what was put away is still on the device when attention runs, which is when memory peaks."""

    def __init__(self, on_device: set[Leaving]) -> None:
        self.on_device = on_device
        self.forwards: list[int] = []
        self.backwards: list[int] = []

    def forward(self, *qkv: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        self.forwards.append(len(self.on_device))
        return super().forward(*qkv, scale=scale, causal=causal)

    def backward(self, *tensors: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        self.backwards.append(len(self.on_device))
        return super().backward(*tensors, scale=scale, causal=causal)


@pytest.mark.parametrize("tiles", [1, 3])
def test_stashed_tensors_leave_within_a_stage(tiles: int) -> None:
    on_device: set[Leaving] = set()
    kernel = Watching(on_device)
    run(lambda: Stash(lambda t: Leaving(t, on_device)), tiles, kernel)
    assert set(kernel.forwards) == {0, 2}  # of the tile before, o and lse, which have this time to leave
    assert set(kernel.backwards) == {0}  # no head's gradient of the tile or stage before


# --- page-locked memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4096, 5 * 4096 + 1, 3 << 20])
def test_locked_memory_is_as_large_as_asked_for(size: int) -> None:
    streams = LateStreams()
    kept = [page_locked(size, streams.cudart()) for _ in range(5)]  # side by side: no page is locked twice
    assert {memory.nbytes for memory in kept} == {size}
    assert all(at % mmap.PAGESIZE == 0 for at in streams.registered)
    assert sum(streams.registered.values()) == 5 * -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    assert {memory.data_ptr() for memory in kept} == set(streams.registered)
    kept[0].fill_(7)


def test_locked_memory_is_unlocked_before_it_is_freed() -> None:
    streams = LateStreams()
    pool = HostPool(partial(Transfers, streams=streams))
    buffers = [pool.acquire(5000, CUDA) for _ in range(2)]
    assert len(streams.registered) == 2
    pool.release(buffers.pop(), CUDA)
    pool.acquire(5000, CUDA)
    assert len(streams.registered) == 2  # used again
    assert pool.acquire(0, CUDA).nbytes == 0
    del pool
    gc.collect()
    assert streams.registered == {}


def test_no_memory_to_lock() -> None:
    refusing = SimpleNamespace(cudaHostRegister=lambda *_: 2)
    with pytest.raises(MemoryError, match=r"page-lock 0\.00 GiB more of host memory \(CUDA error 2\)"):
        page_locked(5000, refusing)


# --- hidden states ----------------------------------------------------------------------------------------------------


def test_rows_are_written_and_read_in_order() -> None:
    """Two tiles on their way each, in whatever memory was used before."""
    pool, streams = late_pool()
    hidden = HiddenStates(pool, tile_size=3)
    slices = [slice(0, 3), slice(3, 6), slice(6, 7)]
    for attempt in range(2):
        handle = hidden.new(torch.Size((2, 7, 4)), torch.float32, torch.device("cpu"))
        values = torch.randn(2, 7, 4)
        rows = hidden.of(handle)
        before = streams.copies
        for at in slices:
            rows.write(at, values[:, at].clone())
        assert streams.copies - before == 2 * 3  # a sequence at a time
        assert streams.done - before == 2  # the first tile has made room for the third
        for at, tile in zip(slices, rows.read(slices), strict=True):
            assert torch.equal(tile, values[:, at])
            rows.write(at, 2 * tile)  # in its own place, while the next one comes
        assert torch.equal(torch.cat(list(rows.read(slices)), dim=1), 2 * values)
        assert pool.bytes == pool.bytes_in_use == values.nbytes, attempt
        del handle, rows
        assert pool.bytes_in_use == 0
    assert streams.broken == []


def test_a_handle_stands_for_rows_through_autograd_and_for_nothing_else() -> None:
    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            assert hidden.of(grads[0]) is gradient
            return grads[0]

    pool = HostPool()
    hidden = HiddenStates(pool, tile_size=3)
    options = (torch.Size((1, 4, 2)), torch.bfloat16, torch.device("cpu"))
    x = hidden.new(*options).requires_grad_()
    rows = hidden.of(x)
    y = Same.apply(x)
    assert hidden.of(y) is hidden.of(y.detach()) is hidden.of(y.to(torch.bfloat16)) is rows
    assert (y.shape, y.dtype, y.untyped_storage().nbytes()) == (rows.shape, rows.dtype, 2)
    d_y = hidden.new(*options)
    gradient = hidden.of(d_y)
    y.backward(d_y)
    with pytest.raises(RuntimeError, match="nothing but blocks"):
        hidden.of(y + 1)
    assert (y + 1).isnan().all()
