"""Part 5: a profiler's trace of one UPipe layer with its stash on the host: do the copies hide beside the kernels?"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.items import Item, Part, Setup
from benchmarks.gpu.rates import fastest_kernel
from benchmarks.local_group import join_alone
from benchmarks.results import Record
from torchtitan_upipe.cp.build import build_method
from torchtitan_upipe.cp.rope import Rope
from torchtitan_upipe.cp.strategy import AttentionWeights
from torchtitan_upipe.cp.transform import NormThenRope
from torchtitan_upipe.kernels.select import build_kernel
from torchtitan_upipe.stash.host_pool import HostPool
from torchtitan_upipe.stash.stash import Stash

KEY = "trace of one layer with a host stash"
Span = tuple[float, float]  # microseconds


@dataclass(frozen=True)
class Layer:
    """One rank of a layer: ``tokens`` of the whole sequence over ``ranks`` ranks, Llama3's width of ``heads * d``."""

    tokens: int
    ranks: int
    heads: int
    kv_heads: int
    head_chunk: int
    head_dim: int


def trace_part(setup: Setup) -> Part:
    """One item."""
    sizes = setup.sizes
    layer = Layer(sizes.traced, sizes.ranks, *sizes.traced_heads, sizes.head_dim)

    def run(left: float) -> Record:
        kernel = fastest_kernel(setup)
        path = setup.folder / "layer.trace.json.gz"
        return setup.worker.call(left, trace_layer, (layer, kernel, setup.device_type, str(path)))

    return Part("trace", 5, [Item(KEY, run, lambda: sizes.startup)])


def trace_layer(layer: Layer, kernel: str, device: str, path: str) -> Record:
    """Forward and backward of rank 0, alone (``benchmarks.local_group``), once to warm up and once traced."""
    join_alone(0, layer.ranks)
    try:
        run = _prepare(layer, kernel, device)
        run()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
        with profile(activities=activities) as profiler:
            run()
        profiler.export_chrome_trace(path)
    finally:
        dist.destroy_process_group()
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    return {"trace": Path(path).name, "kernel_used": kernel, **vars(layer), **overlap(events)}


def _prepare(layer: Layer, kernel_name: str, device: str) -> Any:
    dtype, width = torch.bfloat16, layer.heads * layer.head_dim
    pool = HostPool()
    kernel = build_kernel(kernel_name, device, layer.head_dim)
    method = build_method(
        "upipe",
        num_heads=layer.heads,
        num_kv_heads=layer.kv_heads,
        head_chunk=layer.head_chunk,
        new_stash=partial(Stash, pool.put),
        ulysses_group=dist.group.WORLD,
        ring_group=None,
        kernel=kernel,
    )
    rows = layer.tokens // layer.ranks

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, dtype=dtype).mul_(width**-0.5).requires_grad_()

    x, (wq, wo) = draw(1, rows, width), (draw(width, width) for _ in range(2))
    wk, wv = (draw(layer.kv_heads * layer.head_dim, width) for _ in range(2))
    dy = torch.randn_like(x)
    frequencies = 500000.0 ** -(torch.arange(0, layer.head_dim, 2, device=device).double() / layer.head_dim)
    transform = NormThenRope(Rope(frequencies, torch.arange(rows, device=device)[None], True), 0.0)

    def run() -> None:
        method(x, AttentionWeights(wq, wk, wv, wo), transform, layer.head_dim).backward(dy)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def overlap(events: Iterable[dict[str, Any]]) -> Record:
    """What a trace's events say: time of kernels, of copies from and to the host, and of both at once.

    Args:
        events: of a Chrome trace; ``gpu_memcpy`` and ``kernel`` are the categories of a device's own time.
    """
    kernels: list[Span] = []
    copies: list[Span] = []
    for event in events:
        span = (event.get("ts", 0.0), event.get("ts", 0.0) + event.get("dur", 0.0))
        if event.get("cat") == "kernel":
            kernels.append(span)
        elif event.get("cat") == "gpu_memcpy" and any(way in event["name"] for way in ("HtoD", "DtoH")):
            copies.append(span)
    busy = _union(kernels)
    copied = sum(end - start for start, end in copies)
    hidden = sum(_within(copy, busy) for copy in copies)
    return {
        "copies": len(copies),
        "kernel_seconds": sum(end - start for start, end in busy) / 1e6,
        "copy_seconds": copied / 1e6,
        "hidden_share": hidden / copied if copied else None,
    }


def _union(spans: Iterable[Span]) -> list[Span]:
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _within(span: Span, busy: Sequence[Span]) -> float:
    return sum(max(0.0, min(span[1], end) - max(span[0], start)) for start, end in busy)
