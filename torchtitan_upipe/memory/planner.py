"""What fits: the longest context of each method, and the fastest settings for a wanted context, by the ledger."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import lcm
from typing import TYPE_CHECKING, Any

from torchtitan_upipe.cp.head_schedule import round_head_chunk
from torchtitan_upipe.data.sharding import chunk_of
from torchtitan_upipe.device import SIMULATED, memory_of_rank
from torchtitan_upipe.job.shape import STASHING, JobShape, job_shape
from torchtitan_upipe.memory.ledger import predict_shape
from torchtitan_upipe.memory.prediction import GIB, Prediction

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

TILE_SIZES = (32768, 16384, 8192)
QUERY_TILES = (1, 2, 4, 8)
SEQUENCE_CHUNKS = (65536, 32768, 16384, 8192)
STASHES = ("device", "host", "none")  # the last computes attention a second time
LONGEST = 2**28  # tokens; no search goes beyond
RESERVE = {"cuda": 4 * GIB, "cpu": 0}  # the device's context, buffers of the communication library, fragmentation


@dataclass(frozen=True)
class Budget:
    """Bytes that one rank may use."""

    device: float
    host: float

    def holds(self, prediction: Prediction) -> bool:
        """Whether the prediction fits."""
        return prediction.device_bytes <= self.device and prediction.host_bytes <= self.host


@dataclass(frozen=True)
class Plan:
    """Settings of a job and what they need."""

    job: JobShape
    prediction: Prediction


def candidates(job: JobShape) -> Iterator[JobShape]:
    """Settings of ``job``'s method, fastest first: time grows with recomputing, then transfers, stages and tiles."""
    full = replace(job, checkpoint=True, tile_size=TILE_SIZES[0], stash_budget=0)
    if job.method not in STASHING:
        for offload in (False, True):
            for tile_size in TILE_SIZES:
                yield replace(full, offload=offload, tile_size=tile_size)
        return
    chunked = list(_chunked(full))
    for stash in STASHES:
        for offload in (False, True):
            for candidate in chunked:
                yield replace(candidate, stash=stash, offload=offload)
    for tile_size in TILE_SIZES[1:]:
        for stash in STASHES:
            yield replace(chunked[-1], stash=stash, offload=True, tile_size=tile_size)


def _chunked(job: JobShape) -> Iterator[JobShape]:
    """``job`` in chunks of heads or of the sequence, largest first."""
    if job.method == "fpdt":
        for chunk in SEQUENCE_CHUNKS:
            yield replace(job, sequence_chunk=chunk_of("fpdt", job.ulysses, chunk))
        return
    for tiles in QUERY_TILES:
        for chunk in head_chunks(job):
            yield replace(job, query_tiles=tiles, head_chunk=chunk)


def head_chunks(job: JobShape) -> list[int]:
    """The head chunks that the schedule does not round, down to one head a rank; largest first."""
    heads = job.model.heads
    found = {round_head_chunk(heads, job.ulysses, chunk) for chunk in range(min(job.ulysses, heads), heads + 1)}
    return sorted((chunk for chunk in found if heads % chunk == 0), reverse=True) or sorted(found, reverse=True)


def fastest(job: JobShape, budget: Budget) -> Plan | None:
    """The first of :func:`candidates` that fits, or None."""
    for candidate in candidates(job):
        prediction = predict_shape(candidate)
        if budget.holds(prediction):
            return Plan(candidate, prediction)
    return None


def longest(job: JobShape, budget: Budget) -> Plan | None:
    """The longest context that fits under any of :func:`candidates`, to 1% or one step, and its fastest settings.

    None where not even one step of 1024 tokens a rank fits.
    """
    step = 1024 * lcm(job.ulysses * job.ring, 2 * job.ring)
    least = list(candidates(job))[-len(STASHES) :]  # the settings that need least

    def fits(steps: int) -> bool:
        return any(budget.holds(predict_shape(replace(c, length=steps * step))) for c in least)

    low, high = 0, 1
    while fits(high) and high * step < LONGEST:
        low, high = high, 2 * high
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return fastest(replace(job, length=low * step), budget) if low else None


def methods(job: JobShape) -> Iterator[JobShape]:
    """The job under each method, on the same ranks; hybrids if the job is one."""
    degree = job.ulysses * job.ring
    chunk, job = chunk_of("fpdt", degree, SEQUENCE_CHUNKS[0]), replace(job, sequence_chunk=0)
    for method in ("upipe", "ulysses"):
        yield replace(job, method=method, ulysses=degree, ring=1)
        if job.ring > 1 and job.method != "ring":
            yield replace(job, method=method)
    if degree > 1:
        yield replace(job, method="ring", ulysses=1, ring=degree)
    yield replace(job, method="fpdt", ulysses=degree, ring=1, sequence_chunk=chunk)


def settings_of(plan: Plan) -> dict[str, dict[str, Any]]:
    """The fields that give a job file the plan's settings, by section."""
    job = plan.job
    settings: dict[str, Any] = {"tile_size": job.tile_size}
    if job.method == "upipe":
        settings |= {"head_chunk": job.head_chunk, "query_tiles": job.query_tiles}
    if job.method == "fpdt":
        settings |= {"sequence_chunk": job.sequence_chunk}
    if job.method in STASHING:
        settings |= {"stash": job.stash, "stash_budget_gib": job.stash_budget / GIB}
    return {"context_parallel": settings, "activation_checkpoint": {"mode": "full", "offload": job.offload}}


def explain_nothing_fits(job: JobShape, budget: Budget) -> str:
    """One sentence where :func:`fastest` found nothing: what to make smaller."""
    smaller = (batch for batch in _halves(job.batch) if fastest(replace(job, batch=batch), budget))
    batch = next(smaller, None)
    if job.can_move_state and fastest(replace(job, state_on_host=True), budget):
        remedy = "set training.enable_cpu_offload = true"
    elif batch is None:
        remedy = "shorten training.seq_len or use more ranks"
    else:
        remedy = f"set training.local_batch_size = {batch} (training.global_batch_size keeps the whole batch)"
    return (
        f"no settings train local_batch_size = {job.batch} of {job.length} tokens with method = {job.method!r} in "
        f"{budget.device / GIB:.1f} GiB of device and {budget.host / GIB:.0f} GiB of host memory; {remedy}."
    )


def _halves(batch: int) -> Iterator[int]:
    while batch > 1:
        batch //= 2
        yield batch


def fill_head_chunk(config: JobConfig, world_size: int, device_type: str) -> None:
    """Set a UPipe job's ``head_chunk = 0`` to the largest chunk with which it fits into the device's memory.

    The simulated device has no end: there 0 stays, and means all heads.

    Raises:
        ValueError: the smallest chunk does not fit.
    """
    cp = config.context_parallel
    if cp.method != "upipe" or cp.head_chunk != 0 or device_type == SIMULATED:
        return
    job = job_shape(config, world_size)
    device = memory_of_rank(device_type) - RESERVE[device_type]
    chunks = head_chunks(job)
    for chunk in chunks:
        prediction = predict_shape(replace(job, head_chunk=chunk))
        if prediction.device_bytes <= device:
            cp.head_chunk = chunk
            return
    raise ValueError(
        f"head_chunk = 0 asks for the largest chunk that fits, and the smallest, {chunks[-1]}, needs "
        f"{prediction.device_bytes / GIB:.1f} GiB of the {max(device, 0) / GIB:.1f} GiB that a rank has; "
        f"{advice(prediction, replace(job, head_chunk=chunks[-1]))}."
    )


def explain_out_of_memory(config: JobConfig, error: BaseException) -> str:
    """One sentence: what takes the most where the ledger sees the peak, and the next knob to turn."""
    asked = re.search(r"tried to allocate (\d+) bytes", str(error))  # the CPU's allocator begins with its own source
    words = f"no host memory for {int(asked[1]) / GIB:.2f} GiB more" if asked else str(error).split(". ")[0].strip()
    words = words.rstrip(".") or "no memory left"
    if config.context_parallel.method == "torchtitan":
        return f'{words}; use method = "upipe", a shorter sequence or more ranks.'
    job = job_shape(config)
    prediction = predict_shape(job)
    category = max(prediction.by_category, key=lambda name: prediction.by_category[name])
    return (
        f"{words}; the ledger predicts a peak of {prediction.device_bytes / GIB:.2f} GiB in {prediction.moment}, "
        f"most of it {category} ({prediction.by_category[category] / GIB:.2f} GiB); {advice(prediction, job)}."
    )


def advice(prediction: Prediction, job: JobShape) -> str:
    """The next knob to turn for less memory at the peak of ``prediction``."""
    largest = max(prediction.by_category, key=lambda name: prediction.by_category[name])
    activations = {"attention stage", "workspace"}
    if job.tile_size == 0 and largest in {"loss", "tiles", "saved"}:
        return f"set context_parallel.tile_size = {TILE_SIZES[0]}"
    if not job.checkpoint:
        return 'set activation_checkpoint.mode = "full"'
    if largest == "saved" and job.method in STASHING and job.stash == "device":
        return 'set context_parallel.stash = "host"'
    if largest == "block inputs" and not job.offload:
        return "set activation_checkpoint.offload = true"
    if largest in activations and job.method == "fpdt" and job.sequence_chunk > SEQUENCE_CHUNKS[-1]:
        return f"set context_parallel.sequence_chunk = {min(job.sequence_chunk, job.length) // 2}"
    if largest in activations and job.method not in STASHING:
        return 'set context_parallel.method = "upipe"'
    if largest in activations and job.method == "upipe" and job.head_chunk > min(head_chunks(job)):
        return f"set context_parallel.head_chunk = {max(c for c in head_chunks(job) if c < job.head_chunk)}"
    if largest in activations and job.method == "upipe" and job.query_tiles < QUERY_TILES[-1]:
        return f"set context_parallel.query_tiles = {2 * job.query_tiles}"
    if largest in {"tiles", "loss"} and job.tile_size > TILE_SIZES[-1]:
        return f"set context_parallel.tile_size = {job.tile_size // 2}"
    if largest in {"parameters", "gradients", "optimizer"} and job.can_move_state:
        return "set training.enable_cpu_offload = true"
    if job.batch > 1:
        return f"set training.local_batch_size = {job.batch // 2}"
    return "use more ranks or a shorter sequence"
