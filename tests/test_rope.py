"""RoPE without a table: TorchTitan's angles at any position, in slices, and its inverse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchtitan.models.llama3 import TransformerModelArgs
from torchtitan.models.llama3.model.model import apply_rotary_emb, precompute_freqs_cis
from torchtitan.models.qwen3 import Qwen3ModelArgs
from torchtitan.models.qwen3.model.model import apply_rotary_emb as apply_rotary_emb_qwen
from torchtitan.models.qwen3.model.model import precompute_rope_cache

from torchtitan_upipe.cp.frequencies import RopeParameters
from torchtitan_upipe.cp.rope import Rope
from torchtitan_upipe.dry_run.live_bytes import LiveBytes
from torchtitan_upipe.job.model import own_rope
from torchtitan_upipe.tiled import tiles as tiles_module

LENGTH = 8192


def heads(length: int = LENGTH, width: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, length, 2, width, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_llama_rotates_as_torchtitan_does() -> None:
    args = TransformerModelArgs(dim=64, n_heads=4, rope_theta=500000)
    assert args.rope_scaling_args.original_max_position_embeddings == LENGTH  # wavelengths on both sides of it
    table = precompute_freqs_cis(16, LENGTH, args.rope_theta, args.rope_scaling_args)
    x = heads()
    expected, _ = apply_rotary_emb(x, x, table)
    got = Rope(own_rope(args).frequencies(16), torch.arange(LENGTH)[None], interleaved=True)(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-3)  # float32 angles of thousands are off by 5e-4
    torch.testing.assert_close(got[:, :100], expected[:, :100], rtol=0, atol=5e-5)


def test_qwen_rotates_as_torchtitan_does() -> None:
    args = Qwen3ModelArgs(head_dim=16, rope_theta=1000000.0)
    x = heads()
    expected, _ = apply_rotary_emb_qwen(x, x, precompute_rope_cache(16, LENGTH, args.rope_theta))
    got = Rope(own_rope(args).frequencies(16), torch.arange(LENGTH)[None], interleaved=False)(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-3)
    torch.testing.assert_close(got[:, :100], expected[:, :100], rtol=0, atol=5e-5)


@pytest.mark.parametrize("interleaved", [True, False])
def test_products_depend_on_distance_alone_five_million_tokens_on(interleaved: bool) -> None:
    """A float32 table fails here: its angles are off by up to 0.3 rad."""
    frequencies = RopeParameters(1e6).frequencies(16)
    x = heads(8)
    near, far = (Rope(frequencies, torch.arange(8)[None] + first, interleaved)(x) for first in (0, 5_000_000))
    products = [torch.einsum("bihd,bjhd->bhij", r.double(), r.double()) for r in (near, far)]
    torch.testing.assert_close(products[0], products[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_change_nothing_and_the_inverse_undoes(
    interleaved: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    frequencies = RopeParameters(1e6).frequencies(16)
    rope = Rope(frequencies, torch.arange(100)[None] * 1000, interleaved)
    x = heads(100, dtype=dtype)
    whole = rope(x)
    monkeypatch.setattr(tiles_module, "ROWS", 7)
    in_place = x.clone()
    assert rope.rotate_(in_place) is in_place
    assert torch.equal(in_place, whole)
    part = rope.rotate_(x[:, 30:60].clone(), slice(30, 60))
    assert torch.equal(part, whole[:, 30:60])
    back = rope.rotate_(whole.clone(), back=True)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("scale", [1.0, 1.4])
def test_gradients_are_rotated_back(scale: float) -> None:
    rope = Rope(RopeParameters(1e6).frequencies(4), torch.arange(5)[None] * 7, interleaved=True, scale=scale)
    x = heads(5, 4, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(rope, x)


def test_temporaries_are_those_of_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles_module, "ROWS", 64)
    rope = Rope(RopeParameters(1e6).frequencies(16), torch.arange(LENGTH)[None], interleaved=True)
    x = heads(dtype=torch.bfloat16)
    with LiveBytes() as meter:
        meter.ignore(x)
        rope.rotate_(x)
    assert 0 < meter.peak < 0.25 * x.nbytes
