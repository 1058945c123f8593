"""Tiled norm, feed-forward and loss against the plain modules: values, every gradient, and what they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

from tests.reference import relative_error
from torchtitan_upipe.dry_run.live_bytes import LiveBytes
from torchtitan_upipe.tiled.loss import tiled_cross_entropy
from torchtitan_upipe.tiled.mlp import tiled_feed_forward
from torchtitan_upipe.tiled.norm import tiled_rms_norm

B, N, D, INNER, VOCABULARY = 2, 64, 96, 256, 400
ROWS = B * N
TILES = [1, 16, 33, ROWS - 1, ROWS, 10 * ROWS]
EPS = 1e-6

Inputs = dict[str, Tensor]
Function = Callable[[Inputs], Tensor]


def draw(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=gen, dtype=torch.float64) for shape in shapes]


def norm_inputs() -> Inputs:
    x, weight = draw((B, N, D), (D,))
    return {"x": x, "norm": 1 + weight / 10}


def mlp_inputs() -> Inputs:
    h, norm, w1, w2, w3 = draw((B, N, D), (D,), (INNER, D), (D, INNER), (INNER, D))
    return {"h": h, "norm": 1 + norm / 10, "w1": w1 * D**-0.5, "w2": w2 * INNER**-0.5, "w3": w3 * D**-0.5}


def loss_inputs() -> Inputs:
    h, norm, output = draw((B, N, D), (D,), (VOCABULARY, D))
    return {"h": h, "norm": 1 + norm / 10, "output": output * D**-0.5}


def labels_with_ignored() -> Tensor:
    """Among the ignored labels are those of rows 16 to 65: whole tiles of 16 and of 33 rows."""
    gen = torch.Generator().manual_seed(1)
    labels = torch.randint(VOCABULARY, (ROWS,), generator=gen)
    labels[torch.rand(ROWS, generator=gen) < 0.1] = -100
    labels[16:66] = -100
    return labels.view(B, N)


def plain_norm(t: Inputs) -> Tensor:
    return F.rms_norm(t["x"], (D,), t["norm"], EPS)


def plain_mlp(t: Inputs) -> Tensor:
    n = F.rms_norm(t["h"], (D,), t["norm"], EPS)
    return t["h"] + F.linear(F.silu(F.linear(n, t["w1"])) * F.linear(n, t["w3"]), t["w2"])


def plain_loss(t: Inputs, labels: Tensor | None = None) -> Tensor:
    labels = labels_with_ignored() if labels is None else labels
    logits = F.linear(F.rms_norm(t["h"], (D,), t["norm"], EPS), t["output"]).flatten(0, 1)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels.flatten(), reduction="sum")


def tiled_norm(tile_size: int) -> Function:
    return lambda t: tiled_rms_norm(t["x"], t["norm"], EPS, tile_size)


def tiled_mlp(tile_size: int) -> Function:
    return lambda t: tiled_feed_forward(*t.values(), eps=EPS, tile_size=tile_size)


def tiled_loss(tile_size: int, labels: Tensor | None = None) -> Function:
    labels = labels_with_ignored() if labels is None else labels
    return lambda t: tiled_cross_entropy(t["h"], labels, t["norm"], t["output"], eps=EPS, tile_size=tile_size)


PARTS: dict[str, tuple[Callable[[], Inputs], Function, Callable[[int], Function]]] = {
    "norm": (norm_inputs, plain_norm, tiled_norm),
    "mlp": (mlp_inputs, plain_mlp, tiled_mlp),
    "loss": (loss_inputs, plain_loss, tiled_loss),
}


def run(function: Function, inputs: Inputs, dtype: torch.dtype, scale: float = 1.0) -> Inputs:
    """Value and every gradient, of ``scale`` times the loss or of a random gradient."""
    leaves = {name: t.to(dtype, copy=True).requires_grad_() for name, t in inputs.items()}
    out = function(leaves)
    grad = torch.tensor(scale) if out.dim() == 0 else draw(tuple(out.shape), seed=2)[0]
    out.backward(grad.to(out))
    return {"out": out.detach()} | {name: t.grad for name, t in leaves.items() if t.grad is not None}


@pytest.mark.parametrize("tile_size", TILES)
@pytest.mark.parametrize("part", PARTS)
def test_float32_and_float64(part: str, tile_size: int) -> None:
    make, plain, tiled = PARTS[part]
    truth = run(plain, make(), torch.float64)
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        result = run(tiled(tile_size), make(), dtype)
        assert result.keys() == truth.keys() == {"out", *make()}
        assert {name: relative_error(result[name], truth[name]) < bound for name in truth} == dict.fromkeys(truth, True)


@pytest.mark.parametrize("tile_size", TILES[1:])
@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("part", PARTS)
def test_bfloat16_is_as_good_as_plain(part: str, scale: float, tile_size: int) -> None:
    make, plain, tiled = PARTS[part]
    inputs = {name: t.bfloat16().double() for name, t in make().items()}
    truth = run(plain, inputs, torch.float64, scale)
    honest, result = run(plain, inputs, torch.bfloat16, scale), run(tiled(tile_size), inputs, torch.bfloat16, scale)
    for name in truth:
        assert result[name].dtype == honest[name].dtype
        error, bound = relative_error(result[name], truth[name]), relative_error(honest[name], truth[name])
        assert error <= 1.2 * bound, (name, error / bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", ["norm", "mlp"])
def test_forward_to_the_bit(part: str, dtype: torch.dtype) -> None:
    make, plain, tiled = PARTS[part]
    inputs = {name: t.to(dtype) for name, t in make().items()}
    for tile_size in TILES if part == "norm" else [ROWS]:
        assert torch.equal(tiled(tile_size)(inputs), plain(inputs))


@pytest.mark.parametrize("tile_size", TILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_to_the_bit(dtype: torch.dtype, tile_size: int) -> None:
    """The plain loss where there is one tile, else the running sum of the plain losses of the tiles."""
    inputs = {name: t.to(dtype) for name, t in loss_inputs().items()}
    expected = torch.zeros(())
    labels = labels_with_ignored().flatten().split(tile_size)
    for h, tile_labels in zip(inputs["h"].flatten(0, 1).split(tile_size), labels, strict=True):
        expected += plain_loss(inputs | {"h": h.unsqueeze(0)}, tile_labels)
    assert torch.equal(tiled_loss(tile_size)(inputs), expected)
    if tile_size >= ROWS:
        assert torch.equal(expected, plain_loss(inputs))


@pytest.mark.parametrize("tile_size", TILES)
def test_half_the_loss_has_half_the_gradients(tile_size: int) -> None:
    whole = run(tiled_loss(tile_size), loss_inputs(), torch.float32)
    half = run(tiled_loss(tile_size), loss_inputs(), torch.float32, scale=0.5)
    for name in loss_inputs():
        assert torch.equal(half[name], whole[name] / 2)
        assert whole[name].any()


def test_ignored_labels_count_for_nothing() -> None:
    labels = torch.full((B, N), -100)
    result = run(tiled_loss(16, labels), loss_inputs(), torch.float32)
    assert all(not t.any() for t in result.values())  # and no NaN, of which any() is true
    ignored = labels_with_ignored() == -100
    result = run(tiled_loss(16), loss_inputs(), torch.float32)
    assert not result["h"][ignored].any()
    assert result["h"][~ignored].any(dim=-1).all()


def test_loss_without_gradients() -> None:
    """Evaluation makes no gradient of any weight: less than one of them is live."""
    leaves = {name: t.float().requires_grad_() for name, t in loss_inputs().items()}
    labels = labels_with_ignored()
    with torch.no_grad(), watch(*leaves.values(), labels) as meter:
        loss = tiled_loss(8, labels)(leaves)
    assert not loss.requires_grad
    assert torch.equal(loss, tiled_loss(8, labels)(leaves).detach())
    assert 8 * VOCABULARY * 4 < meter.peak < leaves["output"].nbytes / 2


@pytest.mark.parametrize("part", PARTS)
def test_a_second_backward_pass(part: str) -> None:
    """Norm and feed-forward give the same again; the loss, which gives its gradients away, refuses."""
    make, _, tiled = PARTS[part]
    leaves = {name: t.float().requires_grad_() for name, t in make().items()}
    total = tiled(16)(leaves).sum()
    first = torch.autograd.grad(total, list(leaves.values()), retain_graph=True)
    if part == "loss":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(total, list(leaves.values()))
    else:
        second = torch.autograd.grad(total, list(leaves.values()))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("part", PARTS)
def test_rows_that_do_not_lie_side_by_side(part: str) -> None:
    make, plain, tiled = PARTS[part]
    first, *rest = make()
    strided = make() | {first: make()[first].transpose(0, 1).contiguous().transpose(0, 1)}
    assert not strided[first].is_contiguous()
    leaves = {name: t.requires_grad_() for name, t in strided.items()}
    tiled(16)(leaves).sum().backward()  # the gradient of a sum is one number, expanded
    truth = {name: t.requires_grad_() for name, t in make().items()}
    plain(truth).sum().backward()
    for name in (first, *rest):
        grad, expected = leaves[name].grad, truth[name].grad
        assert grad is not None
        assert expected is not None
        assert relative_error(grad, expected) < 1e-14


# --- autocast ---------------------------------------------------------------------------------------------------------


def test_residual_stays_wide_beside_narrow_weights() -> None:
    """As under autocast: hidden states and norm in float32, products in bfloat16."""
    inputs = {name: t.float() if name in ("h", "norm") else t.bfloat16().float() for name, t in mlp_inputs().items()}

    def autocast(t: Inputs) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain_mlp(t)

    def mixed(t: Inputs) -> Tensor:
        narrow = (t[name].bfloat16() for name in ("w1", "w2", "w3"))
        with torch.autocast("cpu", torch.bfloat16):
            return tiled_feed_forward(t["h"], t["norm"], *narrow, eps=EPS, tile_size=16)

    truth = run(plain_mlp, inputs, torch.float64)
    honest, result = run(autocast, inputs, torch.float32), run(mixed, inputs, torch.float32)
    for name in truth:
        assert result[name].dtype == honest[name].dtype == torch.float32
        error, bound = relative_error(result[name], truth[name]), relative_error(honest[name], truth[name])
        assert 1e-5 < error <= 1.2 * bound, (name, error / bound)


# --- memory -----------------------------------------------------------------------------------------------------------

ROWS_M, D_M, INNER_M, VOCABULARY_M = 1024, 64, 224, 512
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default)


@contextmanager
def watch(*inputs: Tensor) -> Iterator[LiveBytes]:
    meter = LiveBytes()
    meter.ignore(*inputs)
    with meter:
        yield meter


class Largest(TorchDispatchMode):
    """The largest number of elements that any operator has returned, and how many matrix products ran."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_iter(result) if isinstance(t, Tensor)]
        self.elements = max([self.elements, *sizes])
        self.products += func in PRODUCTS
        return result


def big_mlp() -> list[Tensor]:
    h, norm, w1, w2, w3 = draw((1, ROWS_M, D_M), (D_M,), (INNER_M, D_M), (D_M, INNER_M), (INNER_M, D_M))
    return [t.bfloat16().requires_grad_() for t in (h, norm, w1, w2, w3)]


def test_peak_of_the_feed_forward() -> None:
    """Beside its result: one gradient as large as ``h``, weight gradients, and the inner tensors of one tile."""
    u = ROWS_M * D_M * 2
    leaves = big_mlp()
    wide = (3 * D_M * INNER_M + D_M) * 4  # the sums of the weights' gradients
    for tile_size in (32, 128):
        row, inner = tile_size * D_M * 2, tile_size * INNER_M * 2
        with watch(*leaves) as forward:
            out = tiled_feed_forward(*leaves, eps=EPS, tile_size=tile_size)
        assert u + inner < forward.peak < u + 2 * inner + 6 * row
        grad = torch.ones_like(out)
        with watch(*leaves, out, grad) as backward:
            out.backward(grad)
        # four inner tensors and, on CPU, a factor of a weight's gradient in float32
        at_tile, at_end = 6 * inner + 8 * row, wide // 2
        assert u + wide + 4 * inner < backward.peak < u + wide + max(at_tile, at_end)


def test_the_feed_forward_keeps_its_input_alone() -> None:
    leaves = big_mlp()
    with watch(*leaves) as meter:
        out = tiled_feed_forward(*leaves, eps=EPS, tile_size=32)
        assert meter.live == out.nbytes


def test_checkpointing_leaves_the_feed_forwards_second_run_out() -> None:
    """Per tile: 3 products in forward; 2 again, 6 for gradients in backward. Nothing more under checkpointing."""
    leaves, tile_size = big_mlp(), 256
    products = []
    for wrapped in (False, True):

        def run_mlp(*tensors: Tensor) -> Tensor:
            return tiled_feed_forward(*tensors, eps=EPS, tile_size=tile_size)

        with Largest() as count:
            out = checkpoint(run_mlp, *leaves, use_reentrant=False) if wrapped else run_mlp(*leaves)
            out.sum().backward()
        products.append(count.products)
    assert products == [ROWS_M // tile_size * (3 + 2 + 6)] * 2


@pytest.mark.parametrize("with_gradients", [True, False])
def test_logits_are_never_whole(with_gradients: bool) -> None:
    tile_size = 32
    h, norm, output = (t.bfloat16().requires_grad_() for t in draw((1, ROWS_M, D_M), (D_M,), (VOCABULARY_M, D_M)))
    labels = torch.randint(VOCABULARY_M, (1, ROWS_M))
    with torch.set_grad_enabled(with_gradients), Largest() as largest, watch(h, labels, norm, output) as meter:
        loss = tiled_cross_entropy(h, labels, norm, output, eps=EPS, tile_size=tile_size)
        if with_gradients:
            loss.backward()
    assert tile_size * VOCABULARY_M <= largest.elements <= max(h.numel(), output.numel()) < ROWS_M * VOCABULARY_M / 4
    logits = tile_size * VOCABULARY_M
    sums = h.nbytes + output.numel() * 4 if with_gradients else 0
    at_tile = 8 * logits  # float32 logits and their log-softmax; those in bfloat16 are gone by then
    at_end = output.nbytes if with_gradients else 0
    assert sums < meter.peak < sums + max(at_tile, at_end) + 8 * tile_size * D_M * 4
