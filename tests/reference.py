"""The unsharded attention layer in plain autograd: what every method is judged by (docs/design.md)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_upipe.cp.rope import Rope
from torchtitan_upipe.cp.strategy import AttentionWeights
from torchtitan_upipe.cp.transform import NormThenRope
from torchtitan_upipe.data.documents import positions_in_documents
from torchtitan_upipe.kernels.visibility import Documents

EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """An attention layer: ``H`` query heads, ``G`` KV heads, width ``d`` per head, model width ``D``.

    ``starts`` are the first positions of packed documents, per sequence of the batch; ``scale`` is RoPE's.
    """

    heads: int
    kv_heads: int
    head_dim: int = 16
    dim: int = 48
    norm: bool = False
    bias: bool = False
    interleaved: bool = True
    batch: int = 1
    length: int = 64
    starts: tuple[tuple[int, ...], ...] | None = None
    scale: float = 1.0

    @property
    def documents(self) -> Documents | None:
        return None if self.starts is None else Documents(self.starts)

    @property
    def positions(self) -> Tensor:
        """Positions of all tokens for RoPE, ``[B or 1, S]``."""
        if self.documents is None:
            return torch.arange(self.length).unsqueeze(0)
        return positions_in_documents(self.documents, self.length)

    @property
    def mask(self) -> Tensor:
        """Who sees whom, ``[B or 1, 1, S, S]`` bool: the definition, token by token."""
        later = torch.ones(self.length, self.length, dtype=torch.bool).triu(1)
        if self.starts is None:
            return ~later[None, None]
        token = torch.arange(self.length)
        number = torch.stack([(token[:, None] >= torch.tensor(starts)).sum(1) for starts in self.starts])
        return (~later & (number[:, :, None] == number[:, None, :])).unsqueeze(1)


@dataclass
class Case:
    """Inputs of one layer in float64; every rank and the reference draw the same ones."""

    shape: Shape
    seed: int = 0
    dtype: torch.dtype = torch.float64  # to which inputs are rounded
    x: Tensor = field(init=False)
    dy: Tensor = field(init=False)
    weights: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        s = self.shape
        gen = torch.Generator().manual_seed(self.seed)

        def draw(*size: int, std: float = 1.0) -> Tensor:
            return torch.randn(*size, generator=gen, dtype=torch.float64) * std

        self.x, self.dy = draw(s.batch, s.length, s.dim), draw(s.batch, s.length, s.dim)
        self.weights = {
            "wq": draw(s.heads * s.head_dim, s.dim, std=s.dim**-0.5),
            "wk": draw(s.kv_heads * s.head_dim, s.dim, std=s.dim**-0.5),
            "wv": draw(s.kv_heads * s.head_dim, s.dim, std=s.dim**-0.5),
            "wo": draw(s.dim, s.heads * s.head_dim, std=(s.heads * s.head_dim) ** -0.5),
        }
        if s.bias:
            names = {"bq": s.heads, "bk": s.kv_heads, "bv": s.kv_heads}
            self.weights |= {name: draw(heads * s.head_dim, std=0.3) for name, heads in names.items()}
        if s.norm:
            self.weights |= {"q_norm": 1 + draw(s.head_dim, std=0.1), "k_norm": 1 + draw(s.head_dim, std=0.1)}

    def rounded(self, dtype: torch.dtype) -> Case:
        """The same case with inputs rounded to ``dtype`` (and back to float64): what a low-precision run is given."""
        case = Case(self.shape, self.seed, dtype)
        case.x, case.dy = case.x.to(dtype).double(), case.dy.to(dtype).double()
        case.weights = {name: w.to(dtype).double() for name, w in case.weights.items()}
        return case

    def block_weights(self) -> dict[str, Tensor]:
        """The layer's weights and those of a block around it, with an inner width of ``3 D``."""
        gen, dim = torch.Generator().manual_seed(self.seed + 1000), self.shape.dim

        def draw(*size: int, std: float) -> Tensor:
            return (torch.randn(*size, generator=gen, dtype=torch.float64) * std).to(self.dtype).double()

        return self.weights | {
            "attention_norm": 1 + draw(dim, std=0.1),
            "ffn_norm": 1 + draw(dim, std=0.1),
            "w1": draw(3 * dim, dim, std=dim**-0.5),
            "w2": draw(dim, 3 * dim, std=(3 * dim) ** -0.5),
            "w3": draw(3 * dim, dim, std=dim**-0.5),
        }

    def transform(self, positions: Tensor) -> NormThenRope:
        """Norm and RoPE of the given positions ``[B or 1, N]``."""
        frequencies = 10000.0 ** -(
            torch.arange(0, self.shape.head_dim, 2, device=positions.device).double() / self.shape.head_dim
        )
        return NormThenRope(Rope(frequencies, positions, self.shape.interleaved, self.shape.scale), EPS)


def _leaf(t: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    return t.to(device, dtype, copy=True).requires_grad_()


def run_layer(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """Output and gradients of the plain unsharded layer in ``dtype``."""
    x = _leaf(case.x, dtype, device)
    w = {name: _leaf(t, dtype, device) for name, t in case.weights.items()}
    y = plain_attention(case, x, w)
    y.backward(case.dy.to(device, dtype))
    grads = {name: t.grad for name, t in w.items() if t.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **grads}


def run_block(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients of the plain unsharded pre-norm block with a SwiGLU, in ``dtype``."""
    x, w = _leaf(case.x, dtype, "cpu"), {name: _leaf(t, dtype, "cpu") for name, t in case.block_weights().items()}
    width = (case.shape.dim,)
    h = x + plain_attention(case, F.rms_norm(x, width, w["attention_norm"], EPS), w)
    n = F.rms_norm(h, width, w["ffn_norm"], EPS)
    y = h + F.linear(F.silu(F.linear(n, w["w1"])) * F.linear(n, w["w3"]), w["w2"])
    y.backward(case.dy.to(dtype))
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **{name: t.grad for name, t in w.items() if t.grad is not None}}


def plain_attention(case: Case, x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """``y [B, S, D]`` of the normalised ``x``, in ordinary autograd."""
    s, device = case.shape, x.device
    transform = case.transform(s.positions.to(device))
    q = transform(F.linear(x, w["wq"], w.get("bq")).unflatten(-1, (-1, s.head_dim)), w.get("q_norm"))
    k = transform(F.linear(x, w["wk"], w.get("bk")).unflatten(-1, (-1, s.head_dim)), w.get("k_norm"))
    v = F.linear(x, w["wv"], w.get("bv")).unflatten(-1, (-1, s.head_dim))
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if s.starts is None else s.mask.to(device),
        is_causal=s.starts is None,
        enable_gqa=True,
    )
    return F.linear(o.transpose(1, 2).flatten(2), w["wo"])


def run_method(case: Case, method: object, mine: Tensor, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """Output and gradients of the tokens ``mine``, one rank's share under a context-parallel method."""
    s = case.shape
    x = _leaf(case.x[:, mine], dtype, device)
    w = {name: _leaf(t, dtype, device) for name, t in case.weights.items()}
    transform = case.transform(s.positions[:, mine].to(device))
    y = method(x, AttentionWeights(**w), transform, s.head_dim, s.documents)  # type: ignore[operator]
    y.backward(case.dy[:, mine].to(device, dtype))
    grads = {name: t.grad for name, t in w.items() if t.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **grads}


def relative_error(value: Tensor, truth: Tensor) -> float:
    """``||value - truth|| / ||truth||`` in float64."""
    return float((value.double() - truth.double()).norm() / truth.double().norm())
