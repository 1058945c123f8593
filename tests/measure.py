"""Measure what the README and docs/correctness.md state: ``python -m tests.measure docs/correctness.md``."""

from __future__ import annotations

import platform
import sys
import tempfile
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist

from tests.jobs import from_seed, seed_checkpoint, train
from tests.ranks import run_ranks
from tests.reference import Case, Shape, relative_error, run_layer
from tests.test_head_schedule import MODELS, imbalance
from tests.test_layer import (
    BFLOAT16,
    SHAPES,
    Variant,
    bfloat16_ratio,
    build,
    gather,
    layer_rank,
    packed,
    variants,
)
from tests.test_layer_traffic import traffic_rank
from torchtitan_upipe.cp.head_schedule import build_head_schedule
from torchtitan_upipe.cp.strategy import AttentionWeights
from torchtitan_upipe.dry_run.live_bytes import LiveBytes

# Llama3-8B's heads (32 query, 8 KV, C = 8) at a sixteenth of its width; N = 2048 tokens a rank keep weights small.
MEMORY_SHAPE = Shape(32, 8, head_dim=8, dim=256, length=16384)


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table between empty lines."""
    columns = list(header)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n" + "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def layer_errors() -> str:
    """Worst error over outputs and gradients, methods, head chunks and splits; causal and packed."""
    rows = []
    for (name, whole), mask in product(SHAPES.items(), ("causal", "packed")):
        shape = whole if mask == "causal" else packed(whole)
        case = Case(shape).rounded(torch.float32)
        truth, plain = run_layer(case, torch.float64), run_layer(case, torch.float32)
        own = max(relative_error(plain[k], truth[k]) for k in truth)
        for degree in (1, 2, 4):
            which = variants(shape, degree)
            ranks = run_ranks(layer_rank, degree, shape, torch.float32, which, timeout=900)
            worst = max(relative_error(g[k], truth[k]) for g in _each(ranks, which) for k in truth)
            ratio = bfloat16_ratio(name, mask, degree) if name in BFLOAT16 else None
            heads = f"H={shape.heads} G={shape.kv_heads}" + (" q/k norm" if shape.norm else "")
            shown = "-" if ratio is None else f"{ratio:.2f}"
            rows.append((name, heads, mask, degree, len(which), f"{worst:.1e}", f"{own:.1e}", shown))
    return table(
        (
            "layer",
            "heads",
            "mask",
            "C",
            "variants",
            "worst float32 error",
            "plain float32 layer's own",
            "worst bf16 error / plain bf16 layer's own",
        ),
        rows,
    )


def _each(ranks: list[list[dict[str, torch.Tensor]]], which: list[Variant]) -> list[dict[str, torch.Tensor]]:
    return [gather([r[i] for r in ranks], variant) for i, variant in enumerate(which)]


def balance() -> str:
    """Most loaded rank's attention work over the mean, worst and best head chunk."""
    rows = []
    for name, (heads, kv_heads, degree) in MODELS.items():
        found = {imbalance(build_head_schedule(heads, kv_heads, degree, u), 2**16) - 1 for u in range(1, heads + 1)}
        rows.append((name, f"H={heads} G={kv_heads}", degree, f"{min(found):.2%}", f"{max(found):.2%}"))
    return table(("model", "heads", "C", "best head chunk", "worst head chunk"), rows)


def losses() -> str:
    """Logged losses of ten steps against one rank."""
    rows = []
    models = {"llama3 debug_kv2": ("llama3_upipe", "debug_kv2"), "qwen3 debug": ("qwen3_upipe", "debug")}
    for label, (name, flavor) in models.items():
        model = {"model__name": name, "model__flavor": flavor}
        with tempfile.TemporaryDirectory() as folder:
            seed = from_seed(seed_checkpoint(Path(folder) / "seed", **model))
            one = train(Path(folder) / "one", 1, *seed, **model, context_parallel__method="ulysses")
            for degree in (2, 4):
                for method, chunk in (("ulysses", 0), ("upipe", degree), ("upipe", 0), ("fpdt", 64)):
                    field = "sequence_chunk" if method == "fpdt" else "head_chunk"
                    options = {"context_parallel__method": method, f"context_parallel__{field}": chunk}
                    log = train(Path(folder) / f"{method}{chunk}{degree}", degree, *seed, **model, **options)
                    loss = max(abs(a / b - 1) for a, b in zip(log.loss, one.loss, strict=True))
                    norm = max(abs(a / b - 1) for a, b in zip(log.grad_norm, one.grad_norm, strict=True))
                    rows.append((label, method, chunk or "H", degree, f"{loss:.1e}", f"{norm:.1e}"))
    return table(("model", "method", "chunk", "C", "worst loss difference", "worst gradient norm difference"), rows)


def traffic() -> str:
    """All-to-alls and attention calls of one layer."""
    shape, rows = SHAPES["gqa"], []
    for ac in (False, True):
        for variant in [
            ("ulysses", 0, "none", 1),
            ("upipe", 4, "device", 1),
            ("upipe", 4, "none", 1),
            ("fpdt", 24, "host", 1),
            ("fpdt", 24, "none", 1),
        ]:
            counts = run_ranks(traffic_rank, 4, shape, variant, ac, timeout=900)[0]
            method, chunk, stash, _ = variant
            chunks = {"upipe": f", U={chunk}, stash {stash}", "fpdt": f", 3 chunks, stash {stash}"}
            label = method + chunks.get(method, "")
            calls, sent, forwards, backwards = (sum(pair) for pair in zip(*counts.values(), strict=True))
            rows.append((label, "full" if ac else "none", calls, sent, forwards, backwards))
    return table(
        ("method", "AC", "all-to-alls", "bytes sent by a rank", "attention forwards", "attention backwards"), rows
    )


def memory_rank(variant: Variant) -> float:
    """Peak live bytes of one layer's forward and backward on this rank, in ``u``."""
    shape, rank, degree = MEMORY_SHAPE, dist.get_rank(), dist.get_world_size()
    case, method = Case(shape), build(shape, variant)
    tokens = shape.length // degree
    mine = slice(rank * tokens, (rank + 1) * tokens)
    x = case.x[:, mine].float().requires_grad_()
    dy = case.dy[:, mine].float()
    weights = AttentionWeights(**{name: w.float().requires_grad_() for name, w in case.weights.items()})
    transform = case.transform(shape.positions[:, mine])
    with LiveBytes() as meter:
        meter.ignore(x, dy, *(w for w in vars(weights).values() if w is not None))
        method(x, weights, transform, shape.head_dim).backward(dy)
    return meter.peak / (x.numel() * x.element_size())


def memory() -> str:
    """Peak live memory of one layer, forward and backward."""
    cases: list[Variant] = [("ulysses", 0, "none", 1)]
    cases += [("upipe", chunk, stash, 1) for chunk in (32, 16, 8) for stash in ("device", "none")]
    rows = []
    for variant in cases:
        results = run_ranks(memory_rank, 8, variant, timeout=600)
        method, chunk, stash, _ = variant
        rows.append((method, chunk or 32, "-" if method == "ulysses" else stash, f"{max(results):.2f}"))
    return table(("method", "head chunk", "stash", "peak of forward + backward [u]"), rows)


PAGE = """# Measured: correctness, traffic and layer memory

Made by `python -m tests.measure docs/correctness.md` on CPU with gloo, {versions}.

## One layer against the unsharded float64 layer

`||value - truth|| / ||truth||`, the worst of the output and every gradient over Ulysses, UPipe (up to six head chunks,
with and without stash), ring and hybrids (every split of C into ulysses x ring degree), and FPDT (three sequence
chunks). Packed: documents of 1 to 23 tokens and one of a whole sequence. `tests/test_layer.py` asserts 1e-5 and, where
a bf16 ratio is shown, 1.2, with biases 1.4 (d = 32, D = 128, S = 128; for "few", "wide" and "bias" the root mean square
over four draws, since the gradient of a norm weight or a bias has only 32 elements).
{layer_errors}
## Balance of attention work

The most loaded rank's visible (query, key) pairs over the mean rank's, minus one, at S = 65536, over all head chunks
from 1 to H; counted over the schedule. `tests/test_head_schedule.py` asserts 5%.
{balance}
## Ten training steps against one rank

Relative differences of what the trainer logged, float32. `tests/test_train.py` asserts 1e-5 and 1e-4.
{losses}
## What one layer sends and computes

H = 16, G = 4, C = 4, S = 64, d = 16, float32; forward and backward together. `tests/test_layer.py` asserts both apart.
{traffic}
## Peak live memory of one layer

Llama3-8B's heads (H = 32, G = 8) at C = 8, N = 2048 tokens a rank, d = 8, float32 on CPU; all tensors made during
forward and backward, dx (1u) and weight gradients (0.3u) included; x, dy and weights not. `u` is one hidden tensor
`[N, D]`. Products over all heads and RoPE work in slices, an eighth of the shard here and 8192 rows at long contexts,
where they are small (docs/memory.md). GPU kernels have workspaces of their own: these are not the figures of a bf16 run
on GPUs.
{memory}"""


def main(path: Path) -> None:
    """Write the whole page."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
    parts = (layer_errors, balance, losses, traffic, memory)
    path.write_text(PAGE.format(versions=versions, **{part.__name__: part() for part in parts}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
