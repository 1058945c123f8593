"""Run real training jobs on forked gloo ranks and read back what they logged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent

# A tiny job in float32; every test adds what it is about.
BASE = {
    "job.config_file": ROOT / "train_configs/llama3_debug.toml",
    "model.hf_assets_path": ROOT / "torchtitan_upipe/assets/tokenizer",
    "model.flavor": "debug_kv2",
    "training.mixed_precision_param": "float32",
    "training.seq_len": 256,
    "training.steps": 10,
    "optimizer.lr": 1e-3,
    "context_parallel.head_chunk": 0,
    "activation_checkpoint.mode": "none",
}


@dataclass(frozen=True)
class Log:
    """What the trainer logged, by step."""

    loss: list[float]
    grad_norm: list[float]
    validation: list[float]


def job_args(folder: Path, world_size: int, *flags: str, **options: object) -> list[str]:
    """The command line of a job; ``section__field=value`` overrides ``BASE``, ``flags`` are passed as they stand.

    Context parallelism takes all ranks unless ``parallelism__context_parallel_degree`` says otherwise.
    """
    named = {name.replace("__", "."): value for name, value in options.items()}
    settings = {
        **BASE,
        "parallelism.context_parallel_degree": world_size,
        "parallelism.data_parallel_shard_degree": -1,
        "job.dump_folder": folder,
        **named,
    }
    words: list[str] = []
    for name, value in settings.items():
        section, _, last = name.rpartition(".")
        words += (
            ([f"--{name}"] if value else [f"--{section}.no-{last}"])
            if isinstance(value, bool)
            else [f"--{name}", str(value)]
        )
    return words + list(flags)


def train(folder: Path, world_size: int, *flags: str, timeout: float = 240, **options: object) -> Log:
    """Run the job of :func:`job_args` and read what it logged."""
    codes = run_ranks(
        run_main, world_size, job_args(folder, world_size, *flags, **options), init=False, timeout=timeout
    )
    assert codes == [0] * world_size
    return read_log(folder)


def run_main(args: list[str]) -> int:
    from torchtitan_upipe.train import main

    return main(args)


def read_log(folder: Path) -> Log:
    """What the trainer of ``folder`` logged."""
    names = ("loss_metrics/global_avg_loss", "grad_norm", "validation_metrics/loss")
    return Log(*(read_scalars(folder, name) for name in names))


def read_scalars(folder: Path, name: str) -> list[float]:
    """A scalar of the TensorBoard runs below ``folder``, in step order, the newest of a step."""
    values: dict[int, float] = {}
    for run in sorted(folder.glob("tb/*/events*"), key=lambda p: p.stat().st_mtime_ns):
        events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
        if name in events.Tags()["scalars"]:
            values.update((event.step, event.value) for event in events.Scalars(name))
    return [value for _, value in sorted(values.items())]


def seed_checkpoint(folder: Path, **options: object) -> Path:
    """Write initial weights that do not depend on any sharding; return the checkpoint's folder."""
    train(folder, 1, "--checkpoint.enable", "--checkpoint.create_seed_checkpoint", **options)
    return folder / "checkpoint" / "step-0"


def from_seed(seed: Path) -> list[str]:
    """Flags to start from ``seed`` and save nothing."""
    return ["--checkpoint.enable", "--checkpoint.load_only", "--checkpoint.initial_load_path", str(seed)]
