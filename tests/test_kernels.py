import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference import relative_error
from torchtitan_upipe.kernels.contract import AttentionKernel
from torchtitan_upipe.kernels.select import build_kernel, check_kernel, resolve_kernel

SCALE = 0.3


def draw(heads: int, kv_heads: int, length: int = 48, width: int = 16) -> list[Tensor]:
    gen = torch.Generator().manual_seed(heads * 10 + kv_heads)
    return [torch.randn(2, length, n, width, generator=gen, dtype=torch.float64) for n in (heads, kv_heads, kv_heads)]


def truth(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Softmax attention by loops over heads: ``out [B, S, h, d]``, ``lse [B, h, S]``."""
    outs, lses = [], []
    for head in range(q.shape[2]):
        kv = head // (q.shape[2] // k.shape[2])
        scores = q[:, :, head] @ k[:, :, kv].transpose(1, 2) * SCALE
        if causal:
            scores = scores + torch.full(scores.shape[-2:], -math.inf, dtype=scores.dtype).triu(1)
        outs.append(F.softmax(scores, dim=-1) @ v[:, :, kv])
        lses.append(scores.logsumexp(dim=-1))
    return torch.stack(outs, dim=2), torch.stack(lses, dim=1)


def check(kernel: AttentionKernel, device: str, dtype: torch.dtype, heads: int, kv_heads: int, causal: bool) -> None:
    qkv = [t.to(dtype).double().requires_grad_() for t in draw(heads, kv_heads)]
    out, lse = truth(*qkv, causal=causal)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    out.backward(dout.double())

    inputs = [t.detach().to(device, dtype) for t in qkv]
    got_out, got_lse = kernel.forward(*inputs, scale=SCALE, causal=causal)
    assert got_lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got_out.shape == out.shape
    assert got_lse.shape == lse.shape
    grads = kernel.backward(dout.to(device), *inputs, got_out, got_lse, scale=SCALE, causal=causal)

    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.5e-2}[dtype]
    assert relative_error(got_out.cpu(), out) < tolerance
    assert relative_error(got_lse.cpu(), lse) < max(tolerance / 10, 1e-6 if dtype != torch.float64 else 0)
    for grad, reference in zip(grads, qkv, strict=True):
        assert reference.grad is not None
        assert grad.shape == reference.shape
        assert relative_error(grad.cpu(), reference.grad) < tolerance


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_cpu_kernels(name: str, dtype: torch.dtype, heads: int, kv_heads: int, causal: bool) -> None:
    check(build_kernel(name, "cpu"), "cpu", dtype, heads, kv_heads, causal)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("name", ["sdpa", "cudnn", "flash2", "flash3", "reference"])
def test_cuda_kernels(name: str, heads: int, kv_heads: int, causal: bool) -> None:
    try:
        check_kernel(name, "cuda", torch.bfloat16)
    except ValueError as error:
        pytest.skip(str(error))
    check(build_kernel(name, "cuda"), "cuda", torch.bfloat16, heads, kv_heads, causal)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without CUDA refuses")
@pytest.mark.parametrize("name", ["cudnn", "flash2", "flash3"])
def test_cuda_kernels_are_refused_on_cpu(name: str) -> None:
    with pytest.raises(ValueError, match="runs on CUDA only and this job runs on cpu"):
        check_kernel(name, "cpu", torch.bfloat16)


def test_cudnn_is_refused_where_gradients_must_repeat() -> None:
    check_kernel("cudnn", "simulated", torch.bfloat16)
    check_kernel("sdpa", "simulated", torch.bfloat16, deterministic=True)
    with pytest.raises(ValueError, match="no deterministic backward"):
        check_kernel("cudnn", "simulated", torch.bfloat16, deterministic=True)


def test_float32_is_refused_by_cuda_flash() -> None:
    with pytest.raises(ValueError, match="computes in bfloat16 on CUDA"):
        check_kernel("sdpa", "cuda", torch.float32)


def test_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="attention_kernel = 'flash5' is unknown; choose one of auto"):
        check_kernel("flash5", "cpu", torch.float32)


def test_each_name_is_its_own_kernel() -> None:
    assert resolve_kernel("auto", "cpu") == "sdpa"
    assert build_kernel("auto", "cpu").name == "sdpa"
    assert build_kernel("reference", "cpu").name == "reference"
