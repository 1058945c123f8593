"""The whole step of docs/memory.md, predicted: ``tests/measure_memory.py`` writes the page."""

from __future__ import annotations

from collections.abc import Mapping

from torchtitan_upipe.job.read import read_job  # isort: skip  (first: it chooses the device before torchtitan is imported)

from tests.jobs import ROOT
from tests.measure import table
from torchtitan_upipe.device import SIMULATED
from torchtitan_upipe.memory.ledger import predict

STATE = "enable_cpu_offload"
HIDDEN = {"hidden_states": "host", "tile_size": 8192}
STEPS: list[tuple[str, int, int, dict[str, object]]] = [  # job file, million tokens, ranks, overrides
    ("llama3_8b_5m", 5, 8, {"query_tiles": 1}),
    ("llama3_8b_5m", 5, 8, {"query_tiles": 4}),
    ("llama3_8b_5m", 5, 8, {"method": "ulysses", "head_chunk": 0}),
    ("llama3_8b_5m", 5, 8, {"query_tiles": 4, **HIDDEN}),
    ("llama3_8b_5m", 5, 8, {"query_tiles": 8, **HIDDEN}),
    ("llama3_8b_5m", 5, 8, {"query_tiles": 4, "head_chunk": 1, **HIDDEN}),
    ("llama3_8b_5m", 5, 8, {"method": "ulysses", "head_chunk": 0, **HIDDEN}),
    ("llama3_8b_5m", 8, 8, {"query_tiles": 4}),
    ("llama3_8b_5m", 8, 8, {"query_tiles": 4, **HIDDEN}),
    ("llama3_8b_5m", 8, 8, {"query_tiles": 4, "head_chunk": 2, **HIDDEN}),
    ("qwen3_32b_4m", 6, 16, {"query_tiles": 4}),
    ("qwen3_32b_4m", 4, 16, {"query_tiles": 4, "head_chunk": 1, **HIDDEN}),
    ("qwen3_32b_4m", 4, 16, {"query_tiles": 4, STATE: True, **HIDDEN}),
    ("llama3_8b_1gpu_1m", 1, 1, {"query_tiles": 8}),
    ("llama3_8b_1gpu_1m", 1, 1, {"query_tiles": 4, "head_chunk": 2, **HIDDEN}),
]


def spelled(options: Mapping[str, object]) -> list[str]:
    """As on the command line."""
    words = []
    for name, value in options.items():
        section, _, field = name.rpartition(".")
        words += (
            [f"--{section}.{'' if value else 'no-'}{field}"] if isinstance(value, bool) else [f"--{name}", str(value)]
        )
    return words


def step_args(name: str, millions: int, ranks: int, overrides: Mapping[str, object]) -> list[str]:
    """The job of a row: everything that can wait in host memory does."""
    options = {
        "training.seq_len": millions * 2**20,
        "parallelism.context_parallel_degree": ranks,
        "training.enable_cpu_offload": overrides.get(STATE, False) or ranks == 1,
        "context_parallel.stash": "host",
        "context_parallel.stash_budget_gib": 0,
        **{f"context_parallel.{key}": value for key, value in overrides.items() if key != STATE},
    }
    hidden = overrides.get("hidden_states") == "host"
    if overrides.get("method") == "ulysses" and not hidden:
        options["context_parallel.stash"] = "none"
    options["activation_checkpoint.offload"] = not hidden
    return ["--job.config_file", str(ROOT / f"train_configs/{name}.toml"), *spelled(options)]


def whole_steps() -> str:
    """Predicted peak of a training step."""
    rows = []
    for name, millions, ranks, overrides in STEPS:
        config = read_job(step_args(name, millions, ranks, overrides), ranks, SIMULATED)
        full, bare = (predict(config, ranks, workspace=workspace) for workspace in (True, False))
        rows.append(
            (
                f"{config.model.name.split('_')[0]} {config.model.flavor}",
                f"{millions}M",
                ranks,
                ", ".join(f"{key} {value}" for key, value in overrides.items()),
                f"{full.device_bytes / 2**30:.1f} ({bare.device_bytes / 2**30:.1f})",
                f"{full.host_bytes / 2**30:.0f}",
                full.moment,
            )
        )
    columns = ("model", "tokens", "ranks", "", "device GiB (workspace not counted)", "host GiB a rank", "moment")
    return table(columns, rows)
