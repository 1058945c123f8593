"""The attention kernel in use against attention written out in float64, forward and backward."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchtitan.tools.utils import device_module, device_type

from torchtitan_upipe.checks.report import SLOW, Hosts, Verdict, slow_ones, usual
from torchtitan_upipe.job.shape import JobShape
from torchtitan_upipe.kernels.contract import AttentionKernel
from torchtitan_upipe.kernels.pieces import attend, attend_backward
from torchtitan_upipe.kernels.select import build_kernel
from torchtitan_upipe.kernels.visibility import Tokens, visible_pieces

LENGTH, TIMED = {"cpu": 128, "cuda": 512}, {"cpu": 512, "cuda": 8192}  # tokens
TIMES = 3  # of which the fastest counts
PLAIN = 2.0  # multiple of the error of plain attention in the job's dtype
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 2e-3}  # relative, beside it
HEADS = 4  # query heads of the trial, unless a KV head has more
NAMES = ("out", "lse", "dq", "dk", "dv")
CASES = {  # which tokens ask, and where documents begin, in sixteenths of the sequence
    "causal": ((0, 16), (0,)),
    "packed documents": ((0, 16), (0, 1, 6, 13)),
    "a stretch of queries": ((5, 12), (0,)),
}


@dataclass
class KernelFound:
    """Which kernel a rank runs, its errors and those of plain attention, by case and result, and its FLOP/s."""

    asked: str
    name: str
    dtype: torch.dtype
    errors: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    seconds: float = 0.0
    flops: float = 0.0


def measure_kernel(job: JobShape, mark: Callable[[str], None]) -> KernelFound:
    """This rank's kernel, with the job's widths and as many query heads for each KV head."""
    mark("attention kernel")
    kernel = build_kernel(job.kernel, device_type, job.model.head_dim)
    dtype = {2: torch.bfloat16, 4: torch.float32}[job.element]
    found = KernelFound(job.kernel, kernel.name, dtype)
    ratio = job.model.heads // job.model.kv_heads
    heads = (max(HEADS // ratio, 1) * ratio, max(HEADS // ratio, 1))
    for case, (asking, starts) in CASES.items():
        length = LENGTH[device_type]
        rows = tuple(part * length // 16 for part in asking)
        documents = tuple(part * length // 16 for part in starts)
        errors = _errors(kernel, length, (rows[0], rows[1]), documents, heads, job.model.head_dim, dtype)
        found.errors |= {(case, name): pair for name, pair in zip(NAMES, errors, strict=True)}
    found.seconds, found.flops = _speed(kernel, heads, job.model.head_dim, dtype)
    return found


def _errors(
    kernel: AttentionKernel,
    length: int,
    rows: tuple[int, int],
    starts: tuple[int, ...],
    heads: tuple[int, int],
    width: int,
    dtype: torch.dtype,
) -> list[tuple[float, float]]:
    """Relative errors of :data:`NAMES`: the kernel's, and plain attention's in ``dtype``."""
    q, k, v, dout = _draw(length, heads, width, dtype)
    q, dout = q[:, slice(*rows)], dout[:, slice(*rows)]
    mask = _visible(length, starts)[slice(*rows)]
    truth = _plain(*(t.double() for t in (q, k, v, dout)), mask=mask)
    plain = _plain(q, k, v, dout, mask=mask)
    pieces = visible_pieces(Tokens((rows,)), Tokens(((0, length),)), starts)
    scale = width**-0.5
    out, lse = attend(kernel, q, k, v, pieces, scale=scale)
    got = (out, lse, *attend_backward(kernel, dout, q, k, v, out, lse, pieces, scale=scale))
    return [(_distance(a, t), _distance(b, t)) for a, b, t in zip(got, plain, truth, strict=True)]


def _draw(length: int, heads: tuple[int, int], width: int, dtype: torch.dtype) -> list[Tensor]:
    """``q, k, v, dout [1, S, h, d]``, the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    counts = (heads[0], heads[1], heads[1], heads[0])
    drawn = [torch.randn(1, length, count, width, generator=generator) for count in counts]
    return [t.to(device_type, dtype) for t in drawn]


def _visible(length: int, starts: tuple[int, ...]) -> Tensor:
    """``[S, S]`` bool: who sees whom, by definition."""
    token = torch.arange(length, device=device_type)
    number = (token[:, None] >= torch.tensor(starts, device=device_type)).sum(1)
    return (token[:, None] >= token) & (number[:, None] == number)


def _plain(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, *, mask: Tensor) -> tuple[Tensor, ...]:
    """Softmax attention written out in the dtype given, and its gradients by autograd."""
    q, k, v = (t.detach().clone().requires_grad_() for t in (q, k, v))
    group = q.shape[2] // k.shape[2]
    keys, values = (t.repeat_interleave(group, dim=2).transpose(1, 2) for t in (k, v))
    scores = q.transpose(1, 2) @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, float("-inf"))
    out = (scores.softmax(dim=-1) @ values).transpose(1, 2)
    out.backward(dout)
    assert q.grad is not None
    assert k.grad is not None
    assert v.grad is not None
    return out.detach(), scores.detach().logsumexp(dim=-1), q.grad, k.grad, v.grad


def _distance(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


def _speed(kernel: AttentionKernel, heads: tuple[int, int], width: int, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds and FLOPs of one causal forward and backward."""
    length = TIMED[device_type]
    q, k, v, dout = _draw(length, heads, width, dtype)
    scale, fastest = width**-0.5, float("inf")
    for _ in range(TIMES):
        device_module.synchronize()
        began = time.perf_counter()
        out, lse = kernel.forward(q, k, v, scale=scale, causal=True)
        kernel.backward(dout, q, k, v, out, lse, scale=scale, causal=True)
        device_module.synchronize()
        fastest = min(fastest, time.perf_counter() - began)
    return fastest, 3.5 * 2 * length**2 * width * heads[0]


def judge_kernel(findings: list[KernelFound], hosts: Hosts) -> Verdict:
    """Name ranks whose kernel is wrong, is another than the others', or is slow."""
    failures = []
    for case, name in findings[0].errors:
        off = [rank for rank, found in enumerate(findings) if not _within(found, case, name)]
        if off:
            error, plain = findings[off[0]].errors[case, name]
            failures.append(
                f"the attention kernel {findings[off[0]].name!r} is wrong for {case}: {name} is off by {error:.1e} of "
                f"its norm, where plain attention in {_short(findings[0].dtype)} is off by {plain:.1e}, on "
                f"{hosts.of(off)}."
            )
    for kernel in sorted({found.name for found in findings} - {findings[0].name}):
        others = [rank for rank, found in enumerate(findings) if found.name == kernel]
        failures.append(f"{hosts.of(others)} would run the kernel {kernel!r}, and rank 0 {findings[0].name!r}.")
    seconds = {rank: found.seconds for rank, found in enumerate(findings)}
    often, flops = usual(seconds.values()), findings[0].flops
    failures += [
        f"{hosts.of([rank])} computes attention slowly: {flops / seconds[rank] / 1e12:.3g} TFLOP/s, less than "
        f"1/{SLOW:.0f} of the usual {flops / often / 1e12:.3g}."
        for rank in slow_ones(seconds)
    ]
    worst = max(error for found in findings for error, _ in found.errors.values())
    plain = max(plain for found in findings for _, plain in found.errors.values())
    chosen = f" (chosen by {findings[0].asked!r})" if findings[0].asked == "auto" else ""
    return Verdict(
        f"{findings[0].name}{chosen} in {_short(findings[0].dtype)}, error at most {worst:.1e} (plain attention "
        f"{plain:.1e}), {flops / often / 1e12:.3g} TFLOP/s a rank, the slowest "
        f"{flops / max(seconds.values()) / 1e12:.3g}",
        failures,
    )


def _within(found: KernelFound, case: str, name: str) -> bool:
    error, plain = found.errors[case, name]
    return error <= PLAIN * plain + FLOOR[found.dtype]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
