"""The two sizes of the command: what a GPU shall show, and a toy run that any CPU can do."""

from __future__ import annotations

from benchmarks.gpu.items import Sizes
from benchmarks.rehearse import ROOT

K, M = 2**10, 2**20
LLAMA = "train_configs/llama3_8b_{}.toml"

STASHES = tuple(f"upipe head_chunk=8 stash={stash}" for stash in ("device", "host", "none"))
WITHOUT_BUDGET = tuple(arm + " stash_budget_gib=0" for arm in STASHES)  # the 5M job has one, for all its layers

REAL = Sizes(
    toy=False,
    tests=(str(ROOT / "tests"), "-m", "cuda"),
    kernels=("sdpa", "cudnn", "flash2", "flash3"),
    tokens=(16 * K, 64 * K, 256 * K, M),
    heads=((1, 1), (4, 1)),  # of a rank of eight: UPipe at 8 heads a stage, Ulysses
    head_dim=128,
    products=((8192, 8192, 8192), (8192, 4096, 14336), (131072, 4096, 4096)),
    copied=2**30,
    timed=0.3,
    startup=25.0,
    ranks=8,
    rehearsals=tuple(
        (LLAMA.format(name), tokens, arm)
        for name, tokens in {"128k": 128 * K, "512k": 512 * K, "1m": M, "3m": 3 * M, "5m": 5 * M}.items()
        for arm in ("ulysses", *(WITHOUT_BUDGET if tokens == 5 * M else STASHES))
    ),
    one_gpu=LLAMA.format("1gpu_512k"),
    flavors=("8B", "8B_16layers", "8B_8layers"),
    lengths=(512 * K, 256 * K, 128 * K, 64 * K),
    traced=512 * K,
    traced_heads=(32, 8, 8),
)

TOY = Sizes(
    toy=True,
    tests=(str(ROOT / "tests/test_cuda.py"), "-m", "not cuda", "-k", "test_kernel and 4-1-bf16 and True"),
    kernels=("sdpa", "cudnn"),
    tokens=(64, 128),
    heads=((1, 1), (4, 1)),
    head_dim=32,
    products=((64, 32, 48),),
    copied=2**16,
    timed=0.002,
    startup=0.0,
    ranks=2,
    rehearsals=tuple(
        ("train_configs/llama3_debug.toml", tokens, f"{arm} parallelism.context_parallel_degree=2")
        for tokens, arm in ((256, "upipe head_chunk=4 stash=host"), (2 * M, "ulysses"))
    ),
    one_gpu="train_configs/llama3_debug.toml",
    flavors=("debug_kv2",),
    lengths=(2**30, 256),
    traced=128,
    traced_heads=(8, 2, 4),
)
