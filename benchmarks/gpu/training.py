"""Part 4: real training on one GPU, at the longest context that its memory, the host's and the time allow."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from benchmarks.gpu.items import Item, Part, Setup, skip
from benchmarks.gpu.rates import fastest_kernel, rates_of_run
from benchmarks.prediction import Prediction, predict
from benchmarks.processes import run_logged
from benchmarks.rehearse import ROOT, TEXT
from benchmarks.results import GIB, Record
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.job.shape import JobShape, job_shape
from torchtitan_upipe.kernels.rates import BACKWARD
from torchtitan_upipe.memory.startup import RESERVE

STEPS = 3  # the first is not timed
ASSUMED = {"cuda": 3e14, "cpu": 1e10}  # FLOP/s of attention where no line has them, and of matrix products
HOST = 2e10  # bytes per second of an optimizer on the host, which reads and writes 32 bytes a parameter
DRAWN = 1e8  # initial weights that a host draws in a second
HOST_SHARE = 0.75  # of the host's memory that a job may take; pinned memory is rounded up

KEY = "training on one GPU"


@dataclass(frozen=True)
class Choice:
    """A job that fits.

    Attributes:
        seconds: that its steps may take, estimated.
    """

    arguments: list[str]
    flavor: str
    tokens: int
    prediction: Prediction
    seconds: float


def training_part(setup: Setup) -> Part:
    """One item."""
    return Part("training", 25, [Item(KEY, lambda left: train(setup, left), lambda: setup.sizes.startup)])


def train(setup: Setup, left: float) -> Record:
    """A few real steps; loss, and the peak beside the predicted one."""
    choice = choose(setup, left - setup.sizes.startup)
    if isinstance(choice, str):
        return skip(choice)
    result, log = setup.folder / "training.json", setup.folder / "training.log"
    result.unlink(missing_ok=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    options = ["--result", str(result), "--warmup", "1", "--steps", str(STEPS - 1)]
    folder = ["--job.dump_folder", str(setup.folder / "training")]
    broken_off = run_logged(
        [*launcher, "-m", "benchmarks.measured", *options, *choice.arguments, *folder],
        log,
        left,
        {"OMP_NUM_THREADS": str(os.cpu_count() if setup.device_type == "cuda" else 1)},  # an optimizer on the host
    )
    about = {"flavor": choice.flavor, "tokens": choice.tokens, "log": str(log), "estimated_seconds": choice.seconds}
    about |= {"predicted": asdict(choice.prediction)}
    if broken_off is not None:
        return about | broken_off
    if not result.exists():
        return about | {"status": "failed", "reason": "it ended without a result; see its log"}
    outcome = about | json.loads(result.read_text())
    if outcome["status"] == "ok" and not all(math.isfinite(loss) for loss in outcome["loss"]):
        outcome |= {"status": "failed", "reason": f"losses {outcome['loss']}"}
    return outcome


def choose(setup: Setup, seconds: float) -> Choice | str:
    """The first of :func:`jobs` that fits into memory and ``seconds``, or why none does."""
    device, host = memory_of(setup.device_type)
    reasons = []
    for arguments, flavor, tokens in jobs(setup):
        config = read_job(arguments, world_size=1)
        prediction = predict(config, workspace=setup.device_type == "cuda")
        assert prediction is not None
        needed = seconds_of_job(setup, job_shape(config, world_size=1), config.training.enable_cpu_offload)
        if prediction.device_bytes <= device and prediction.host_bytes <= host and needed <= seconds:
            return Choice(arguments, flavor, tokens, prediction, needed)
        reasons.append(
            f"{flavor} at {tokens} tokens needs {prediction.device_bytes / GIB:.0f} GiB of the device's "
            f"{device / GIB:.0f}, {prediction.host_bytes / GIB:.0f} of the host's {host / GIB:.0f}, and about "
            f"{needed:.0f} s of {max(seconds, 0):.0f}"
        )
    return reasons[-1]


def jobs(setup: Setup) -> Iterator[tuple[list[str], str, int]]:
    """Command lines: the largest model first, of each the longest context first."""
    sizes = setup.sizes
    kernel = ["--context_parallel.attention_kernel", fastest_kernel(setup)]
    fixed = ["--job.config_file", str(ROOT / sizes.one_gpu), *TEXT, *kernel]
    fixed += ["--parallelism.context_parallel_degree", "1", "--parallelism.data_parallel_shard_degree", "1"]
    for flavor in sizes.flavors:
        own = ["--model.flavor", flavor, "--experimental.custom_import", "benchmarks.flavors"]
        for tokens in sizes.lengths:
            yield [*fixed, *own, "--training.seq_len", str(tokens)], flavor, tokens


def memory_of(device_type: str) -> tuple[float, float]:
    """Bytes of the device and of the host that a job may take."""
    host = HOST_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    device = torch.cuda.get_device_properties().total_memory if device_type == "cuda" else host
    return device - RESERVE[device_type], host


def seconds_of_job(setup: Setup, job: JobShape, on_host: bool) -> float:
    """Estimated: attention by measured rates where there are such, the rest by round numbers.

    Args:
        on_host: parameters and optimizer are in host memory.
    """
    model, entry, assumed = job.model, rates_of_run(setup.lines.values()), ASSUMED[setup.device_type]
    tera = 2 * job.length**2 * model.heads * model.head_dim * model.layers / 1e12
    rates = [] if entry is None else [rate.seconds for rate in entry.rates.values()]
    attention = tera * (min(rates) if rates else (1 + BACKWARD) / (assumed / 1e12))
    parameters = model.layers * sum(math.prod(shape) for shape in model.block) + 2 * model.vocab * model.dim
    products = 8 * parameters * job.length * job.batch / assumed  # forward twice, backward
    step = attention + products + (32 * parameters / HOST if on_host else 0.0)
    return STEPS * step + (parameters / DRAWN if on_host else 0.0)
