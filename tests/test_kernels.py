import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference import relative_error
from torchtitan_upipe.kernels import select
from torchtitan_upipe.kernels.contract import AttentionKernel
from torchtitan_upipe.kernels.rates import Rate, RatesOfDevice, read_rates, write_rates
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


# --- what "auto" stands for on CUDA -----------------------------------------------------------------------------------

H100 = "NVIDIA H100 80GB HBM3"


def entry(device: str = H100, **rates: tuple[float, float]) -> RatesOfDevice:
    return RatesOfDevice(device, (9, 0), "measured: here", 2**20, 128, {k: Rate(*v) for k, v in rates.items()})


def auto(
    monkeypatch: pytest.MonkeyPatch,
    table: list[RatesOfDevice] | None,
    installed: set[str] = frozenset(),  # type: ignore[assignment]
    device: str = H100,
    head_dim: int = 128,
) -> str:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0) if "A100" in device else (9, 0))
    monkeypatch.setattr(select.importlib.util, "find_spec", lambda module: module if module in installed else None)
    if table is not None:
        monkeypatch.setattr(select, "read_rates", lambda: table)
    return resolve_kernel("auto", "cuda", head_dim)


def test_auto_without_a_rate_of_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped table knows FlashAttention-3 and cuDNN on H100, but not the built-in kernel."""
    assert auto(monkeypatch, None, {"flash_attn_interface"}) == "flash3"
    assert auto(monkeypatch, None) == auto(monkeypatch, None, {"flash_attn"}) == "sdpa"
    assert auto(monkeypatch, None, {"flash_attn_interface"}, device="NVIDIA A100-SXM4-80GB") == "sdpa"
    assert auto(monkeypatch, [], {"flash_attn_interface"}) == "flash3"


def test_auto_follows_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    table = [entry(sdpa=(330, 280), cudnn=(560, 500), flash2=(340, 290), flash3=(600, 400))]
    everything = {"flash_attn", "flash_attn_interface"}
    assert auto(monkeypatch, table, everything) == "cudnn"  # the backward pass counts 2.5 times
    assert auto(monkeypatch, table, device="NVIDIA H200") == "cudnn"  # the same compute capability
    assert auto(monkeypatch, table, device="NVIDIA A100-SXM4-80GB") == "sdpa"
    assert auto(monkeypatch, table, everything, head_dim=256) == "flash3"  # cuDNN cannot
    assert auto(monkeypatch, table, {"flash_attn"}, head_dim=256) == "flash2"
    own = entry("NVIDIA H200", sdpa=(400, 400), cudnn=(300, 300))
    assert auto(monkeypatch, [*table, own], device="NVIDIA H200") == "sdpa"
    torch.use_deterministic_algorithms(True)
    try:
        assert auto(monkeypatch, table) == "sdpa"
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_table_is_written_as_it_is_read(tmp_path: Path) -> None:
    path, first = tmp_path / "rates.json", entry(sdpa=(300, 250))
    write_rates(first, path)
    write_rates(entry("NVIDIA H200", cudnn=(1, 2)), path)
    assert read_rates(path) == [entry("NVIDIA H200", cudnn=(1, 2)), first]
    write_rates(entry(sdpa=(310, 250)), path)
    assert [e.rates["sdpa"].forward for e in read_rates(path) if e.device == H100] == [310]
    assert read_rates()[0].source.startswith("published: ")
