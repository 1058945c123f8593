"""Part 2: rates of attention kernels, matrix products and copies; and which kernel ``"auto"`` should choose by them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from benchmarks.gpu.items import Item, Part, Setup, skip
from benchmarks.results import Record
from torchtitan_upipe.kernels.rates import BACKWARD, Rate, RatesOfDevice
from torchtitan_upipe.kernels.select import build_kernel, check_kernel

TERA = 1e12
CALLS = 4  # of a function that is timed, at least
MOST = 120.0  # seconds after which a rate hangs, unless it was expected to take long


def rates_part(setup: Setup) -> Part:
    """Products and copies, then attention from the shortest sequence to the longest."""
    sizes, device = setup.sizes, setup.device_type

    def item(key: str, function: Callable[..., Record], *arguments: object) -> Item:
        run = partial(setup.worker.call, function=function, arguments=(*arguments, device, sizes.timed))
        return Item(key, run, most=MOST)

    items = [item(f"product {m}x{k}x{n}", measure_product, (m, k, n)) for m, k, n in sizes.products]
    items += [item(f"copy {name}", measure_copy, name, sizes.copied) for name in COPIES]
    items += [
        Item(
            attention_key(kernel, tokens, heads),
            partial(_attention, setup, kernel, tokens, heads, kv_heads),
            partial(_estimate, setup, kernel, tokens, heads),
            MOST,
        )
        for tokens in sizes.tokens
        for heads, kv_heads in sizes.heads
        for kernel in sizes.kernels
    ]
    return Part("rates", 15, items)


def attention_key(kernel: str, tokens: int, heads: int) -> str:
    """The key of a kernel's line."""
    return f"attention {kernel} {tokens} tokens {heads} heads"


def _attention(setup: Setup, kernel: str, tokens: int, heads: int, kv_heads: int, left: float) -> Record:
    sizes, device = setup.sizes, setup.device_type
    try:
        check_kernel(kernel, device, torch.bfloat16)
    except ValueError as error:
        return skip(str(error))
    about = {"kernel": kernel, "tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": sizes.head_dim}
    shape = (tokens, heads, kv_heads, sizes.head_dim)
    return about | setup.worker.call(left, measure_attention, (kernel, shape, device, sizes.timed))


def _estimate(setup: Setup, kernel: str, tokens: int, heads: int) -> float:
    """By the next shorter sequence of the same kernel, since time grows with the square."""
    for shorter in sorted((t for t in setup.sizes.tokens if t < tokens), reverse=True):
        line = setup.lines.get(attention_key(kernel, shorter, heads), {})
        if line.get("status") == "ok":
            return setup.sizes.startup + CALLS * line["seconds_of_both"] * (tokens / shorter) ** 2
    return 0.0


# --- measured in the worker -------------------------------------------------------------------------------------------


def seconds_of(function: Callable[[], object], timed: float) -> float:
    """Median seconds of a call of ``function``, with the device waited for, over about ``timed`` seconds."""
    function()
    timer = Timer("function()", globals={"function": function})
    return float(timer.blocked_autorange(min_run_time=timed).median)


def measure_attention(kernel_name: str, shape: tuple[int, int, int, int], device: str, timed: float) -> Record:
    """Causal attention in bfloat16; FLOPs count the visible half of the square, backward 2.5 times forward.

    Args:
        shape: tokens, query heads, KV heads, width of a head.
    """
    tokens, heads, kv_heads, width = shape
    kernel = build_kernel(kernel_name, device, width)
    q, k, v, do = (
        torch.randn(1, tokens, n, width, device=device, dtype=torch.bfloat16)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    scale = width**-0.5
    forward = seconds_of(lambda: kernel.forward(q, k, v, scale=scale, causal=True), timed)
    out, lse = kernel.forward(q, k, v, scale=scale, causal=True)
    backward = seconds_of(lambda: kernel.backward(do, q, k, v, out, lse, scale=scale, causal=True), timed)
    work = 2 * tokens**2 * heads * width / TERA
    return {
        "forward_tflops": work / forward,
        "backward_tflops": BACKWARD * work / backward,
        "forward_seconds": forward,
        "backward_seconds": backward,
        "seconds_of_both": forward + backward,
    }


def measure_product(shape: tuple[int, int, int], device: str, timed: float) -> Record:
    """A bfloat16 matrix product ``[m, k] x [k, n]``."""
    m, k, n = shape
    a, b = (torch.randn(*size, device=device, dtype=torch.bfloat16) for size in ((m, k), (k, n)))
    seconds = seconds_of(lambda: a @ b, timed)
    return {"tflops": 2 * m * k * n / TERA / seconds}


def measure_copy(name: str, size: int, device: str, timed: float) -> Record:
    """A copy of ``size`` bytes, or two at once; host memory is pinned on CUDA."""
    copy, moved = COPIES[name]
    cuda = device == "cuda"
    ours, other = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    hosts = [torch.ones(size, dtype=torch.uint8, pin_memory=cuda) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)] if cuda else []
    seconds = seconds_of(lambda: copy(ours, other, *hosts, streams), timed)
    return {"bytes_per_second": moved * size / seconds}


Streams = list[torch.cuda.Stream]


def _within_device(ours: Tensor, other: Tensor, host: Tensor, _: Tensor, streams: Streams) -> None:
    other.copy_(ours)


def _to_host(ours: Tensor, other: Tensor, host: Tensor, _: Tensor, streams: Streams) -> None:
    host.copy_(ours, non_blocking=True)


def _to_device(ours: Tensor, other: Tensor, host: Tensor, _: Tensor, streams: Streams) -> None:
    ours.copy_(host, non_blocking=True)


def _both_ways(ours: Tensor, other: Tensor, host: Tensor, second: Tensor, streams: Streams) -> None:
    pairs = ((ours, host), (second, other))
    for index, (target, source) in enumerate(pairs):
        with torch.cuda.stream(streams[index]) if streams else nullcontext():
            target.copy_(source, non_blocking=True)


COPIES: dict[str, tuple[Callable[..., None], int]] = {  # and by what to multiply the bytes of a tensor
    "within the device, read and written": (_within_device, 2),
    "device to host": (_to_host, 1),
    "host to device": (_to_device, 1),
    "both ways at once, summed": (_both_ways, 2),
}


# --- what they say together -------------------------------------------------------------------------------------------


def rates_of_run(lines: Iterable[Record]) -> RatesOfDevice | None:
    """The table's entry for the device of these lines, at the longest sequence of one head that most kernels did.

    A kernel that has failed, in a test or while it was timed, is left out.
    """
    lines = list(lines)
    wrong = {line.get("kernel") for line in lines if line["status"] == "failed"}
    timed = [line for line in lines if line["status"] == "ok" and "forward_tflops" in line]
    timed = [line for line in timed if line["heads"] == 1 and line["kernel"] not in wrong]
    if not timed:
        return None
    by_length: dict[int, list[Record]] = {}
    for line in timed:
        by_length.setdefault(line["tokens"], []).append(line)
    tokens = max(by_length, key=lambda length: (len(by_length[length]), length))
    first = by_length[tokens][0]
    versions, hardware = first["versions"], first["hardware"]
    source = f"measured: python -m benchmarks.gpu, commit {first['commit']}, torch {versions['torch']}"
    rates = {
        line["kernel"]: Rate(*(float(f"{line[name]:.4g}") for name in ("forward_tflops", "backward_tflops")))
        for line in by_length[tokens]
    }
    major, minor = hardware["capability"] or (0, 0)
    return RatesOfDevice(hardware["device"], (major, minor), source, tokens, first["head_dim"], rates)


def fastest_kernel(setup: Setup) -> str:
    """The attention kernel that further items use: the fastest that the lines have, or ``"auto"``."""
    entry = rates_of_run(setup.lines.values())
    return "auto" if entry is None else min(entry.rates, key=lambda name: entry.rates[name].seconds)
