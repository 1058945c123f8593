"""Tensors in host memory: buffers come back, block inputs leave and return in time, gradients stay what they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan_upipe.dry_run.live_bytes import LiveBytes
from torchtitan_upipe.stash.host_pool import HostCopy, HostPool
from torchtitan_upipe.stash.offload import BlockOffload, OffloadedBlock

BLOCKS, N, D = 6, 64, 16
U = N * D * 4  # bytes of a block's input
CPU = torch.device("cpu")


class Block(nn.Module):
    """A residual block that notes its runs."""

    def __init__(self, index: int, events: list[str]) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(D, 3 * D), nn.GELU(), nn.Linear(3 * D, D))
        self.index, self.events = index, events

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        self.events.append(f"run {self.index}")
        return x + self.inner(x) + bias


class Model(nn.Module):
    def __init__(self, offload: BlockOffload | None, depth: int = BLOCKS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.events: list[str] = []
        blocks = [Block(i, self.events) for i in range(depth)]
        self.blocks = nn.ModuleList(OffloadedBlock(b, offload) if offload else CheckpointWrapper(b) for b in blocks)
        self.bias = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.bias)
        return x


def step(model: Model) -> list[Tensor]:
    """Gradients of a loss."""
    model.zero_grad()
    x = torch.randn(1, N, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    model(x).square().sum().backward()
    grads = [x.grad, *(parameter.grad for parameter in model.parameters())]
    return [grad.clone() for grad in grads if grad is not None]


# --- pool -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("shape", [(3, 5, 7), (4,), (), (0, 3)])
def test_there_and_back(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pool = HostPool()
    tensor = (100 * torch.randn(shape)).to(dtype)
    copy = pool.put(tensor)
    assert pool.bytes == pool.bytes_in_use == tensor.nbytes
    expected = tensor.clone()
    copy.settle()
    tensor.zero_()
    back = copy.get()
    assert back.dtype == dtype
    assert torch.equal(back, expected)
    assert pool.bytes_in_use == 0


def test_strides_are_not_kept() -> None:
    tensor = torch.randn(4, 6).t()
    back = HostPool().put(tensor).get()
    assert back.is_contiguous()
    assert torch.equal(back, tensor)


def test_buffers_serve_any_dtype_of_their_size() -> None:
    pool = HostPool()
    for tensor in (torch.randn(8), torch.randn(16).bfloat16(), torch.arange(4)):
        assert torch.equal(pool.put(tensor).get(), tensor)
        assert pool.bytes == 32
    first, second = pool.put(torch.ones(8)), pool.put(torch.zeros(8))  # both in use
    assert pool.bytes == pool.bytes_in_use == 64
    assert torch.equal(first.get(), torch.ones(8))
    assert torch.equal(second.get(), torch.zeros(8))
    pool.put(torch.ones(9)).get()
    assert (pool.bytes, pool.bytes_in_use) == (64 + 36, 0)


def test_settled_tensors_are_let_go() -> None:
    with LiveBytes() as meter:
        tensor = torch.ones(1000) + 1
        copy = HostPool().put(tensor)
        assert meter.live == 2 * tensor.nbytes  # the tensor and its buffer
        del tensor
        assert meter.live == 8000
        copy.settle()
        assert meter.live == 4000


def test_a_dropped_copy_gives_its_buffer_back() -> None:
    pool = HostPool()
    copy = pool.put(torch.ones(8))
    copy.fetch()
    del copy
    assert (pool.bytes, pool.bytes_in_use) == (32, 0)


def test_a_copy_is_handed_out_once() -> None:
    copy = HostPool().put(torch.ones(8))
    copy.get()
    copy.fetch()  # no more than a hint
    with pytest.raises(RuntimeError, match="asked for a second time"):
        copy.get()


def test_what_was_fetched_is_read_without_a_copy_and_the_host_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(2, 5, 3)
    copy = HostPool().put(tensor)
    copy.fetch()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", None)  # nothing is made now
        first = copy.read(slice(None))
    second = copy.read(slice(None))
    assert torch.equal(first, tensor)
    assert torch.equal(second, tensor)
    assert first.data_ptr() != second.data_ptr()
    copy.fetch()
    assert torch.equal(copy.read(slice(1, 3)), tensor[:, 1:3])
    assert torch.equal(copy.get(), tensor)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_run_beside_the_computation() -> None:
    pool = HostPool()
    kept = []
    for i in range(8):
        x = torch.full((1 << 22,), float(i), device="cuda")
        kept.append(pool.put(x))
        del x
        torch.randn(2048, 2048, device="cuda").matmul(torch.randn(2048, 2048, device="cuda"))
        kept[-1].settle()
        torch.full((1 << 22,), -1.0, device="cuda")  # may take the place of x
    assert pool.acquire(16, torch.device("cuda")).is_pinned()
    for i in reversed(range(8)):
        back = kept[i].get()
        kept[i - 1].fetch()
        assert torch.equal(back, torch.full_like(back, float(i)))
    assert pool.bytes_in_use == 16


# --- block inputs -----------------------------------------------------------------------------------------------------


def test_gradients_to_the_bit() -> None:
    expected = step(Model(None))
    assert len(expected) == 2 + 4 * BLOCKS
    model = Model(BlockOffload(HostPool()))
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(step(model), expected, strict=True))


def test_every_input_travels_once_and_one_block_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(BlockOffload(HostPool()))
    order: dict[HostCopy, int] = {}
    for name in ("fetch", "get"):
        method = getattr(HostCopy, name)

        def noting(copy: HostCopy, method: object = method, name: str = name) -> Tensor | None:
            model.events.append(f"{name} {order[copy]}")
            return method(copy)  # type: ignore[operator]

        monkeypatch.setattr(HostCopy, name, noting)

    put = HostPool.put

    def noting_put(pool: HostPool, tensor: Tensor) -> HostCopy:
        copy = put(pool, tensor)
        model.events.append(f"put {len(order)}")
        order[copy] = len(order)
        return copy

    monkeypatch.setattr(HostPool, "put", noting_put)
    step(model)
    forward = [event for i in range(BLOCKS) for event in (f"put {i}", f"run {i}")]
    backward: list[str] = []
    for i in reversed(range(BLOCKS)):
        backward += [f"get {i}", f"fetch {i}", *([f"fetch {i - 1}"] if i else []), f"run {i}"]
    assert model.events == forward + backward


def test_bytes_do_not_grow_from_the_second_step_on() -> None:
    model = Model(BlockOffload(HostPool()))
    pool = model.blocks[0].offload.pool
    for _ in range(3):
        step(model)
        assert (pool.bytes, pool.bytes_in_use) == (BLOCKS * U, 0)


def measure(depth: int, offload: BlockOffload | None) -> tuple[int, int]:
    """Device bytes after forward and at the peak of forward and backward, beside parameters, gradients and ``x``."""
    model = Model(offload, depth)
    step(model)
    meter = LiveBytes()
    if offload:
        buffers = [offload.pool.acquire(U, CPU) for _ in range(depth)]  # host memory, on CPU like everything else
        meter.ignore(*buffers)
        for buffer in buffers:
            offload.pool.release(buffer, CPU)
    x = torch.randn(1, N, D)
    meter.ignore(x, *model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None))
    with meter:
        out = model(x)
        after_forward = meter.live - out.nbytes
        out.backward(torch.ones_like(out))
    return after_forward, meter.peak


def test_inputs_leave_the_device() -> None:
    """No block's input is on the device after forward, and never more than two of them."""
    kept = {depth: measure(depth, None) for depth in (4, 6, 12)}
    offloaded = {depth: measure(depth, BlockOffload(HostPool())) for depth in (4, 6, 12)}
    for depth in (4, 6, 12):
        assert (kept[depth][0], offloaded[depth][0]) == ((depth - 1) * U, 0)
    assert kept[12][1] == kept[6][1] + 6 * U == kept[4][1] + 8 * U
    assert offloaded[12][1] == offloaded[6][1] == offloaded[4][1] == kept[4][1]  # three inputs, or two and a gradient


def test_other_arguments_stay() -> None:
    """The bias, an argument of every block, is no block's input."""
    model = Model(BlockOffload(HostPool()))
    step(model)
    assert model.blocks[0].offload.pool.bytes == BLOCKS * U


def test_a_forward_pass_without_backward_gives_the_buffers_back() -> None:
    model = Model(BlockOffload(HostPool()))
    pool = model.blocks[0].offload.pool
    out = model(torch.randn(1, N, D))
    assert pool.bytes_in_use == BLOCKS * U
    del out
    assert pool.bytes_in_use == 0
    with torch.no_grad():
        model(torch.randn(1, N, D))
    assert pool.bytes_in_use == 0


def test_two_forward_passes_before_backward() -> None:
    """As with two models' losses summed: both keep their inputs, whichever goes back first."""
    model = Model(BlockOffload(HostPool()))
    expected = [2 * grad for grad in step(model)[1:]]
    x = torch.randn(1, N, D, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    first, second = model(x).square().sum(), model(x).square().sum()
    first.backward()
    second.backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_a_second_backward_pass_is_refused() -> None:
    loss = Model(BlockOffload(HostPool()))(torch.randn(1, N, D)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run forward again before another backward pass"):
        loss.backward()


def test_names_of_parameters_stay() -> None:
    names = list(Model(None).state_dict())
    assert list(Model(BlockOffload(HostPool())).state_dict()) == names
    assert "blocks.0.inner.0.weight" in names


def test_rows_are_read_in_contiguous_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA stages a strided copy by the CPU at once, before what was put has arrived."""
    tensor = torch.randn(3, 10, 4)
    copy = HostPool().put(tensor)
    strided = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.copy_.default:
                strided.append(not (args[0].is_contiguous() and args[1].is_contiguous()))
            return func(*args, **(kwargs or {}))

    with Copies():
        rows = copy.read(slice(2, 7))
    assert torch.equal(rows, tensor[:, 2:7])
    assert strided == [False] * 3
    assert rows.untyped_storage().data_ptr() != copy.read(slice(2, 7)).untyped_storage().data_ptr()  # the host's stay
