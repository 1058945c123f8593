"""Sentences for jobs that need more than there is: what takes the memory, and what to change."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from torchtitan_upipe.job.shape import STASHING, JobShape, job_shape
from torchtitan_upipe.memory.axes import QUERY_TILES, SEQUENCE_CHUNKS, TILE_SIZES, head_chunks
from torchtitan_upipe.memory.ledger import predict_shape
from torchtitan_upipe.memory.planner import Plan, Planner
from torchtitan_upipe.memory.prediction import GIB, Prediction

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

FASTER = 1.02  # a smaller batch is named where it gives more tokens a second than this, to the whole batch


def explain_nothing_fits(job: JobShape, planner: Planner) -> str:
    """One sentence where :meth:`Planner.fastest` found nothing: what to make smaller."""
    smaller = (batch for batch in _halves(job.batch) if planner.fastest(replace(job, batch=batch)))
    batch = next(smaller, None)
    if job.can_move_state and planner.fastest(replace(job, state_on_host=True)):
        remedy = "set training.enable_cpu_offload = true"
    elif batch is None:
        remedy = "shorten training.seq_len or use more ranks"
    else:
        remedy = f"set training.local_batch_size = {batch} (training.global_batch_size keeps the whole batch)"
    budget = planner.budget
    host = "" if budget.shared else f" of device and {budget.host / GIB:.0f} GiB of host"
    return (
        f"no settings train local_batch_size = {job.batch} of {job.length} tokens with method = {job.method!r} in "
        f"{budget.device / GIB:.1f} GiB{host} memory; {remedy}."
    )


def faster_batch(plan: Plan, planner: Planner) -> str | None:
    """One sentence where a smaller batch leaves memory for faster settings."""
    for batch in _halves(plan.job.batch):
        found = planner.fastest(replace(plan.job, batch=batch))
        if found is not None and found.tokens_per_second > FASTER * plan.tokens_per_second:
            return (
                f"training.local_batch_size = {batch} leaves memory for faster settings, "
                f"{found.tokens_per_second:,.1f} tokens/s a device (training.global_batch_size keeps the whole batch)."
            )
    return None


def _halves(batch: int) -> Iterator[int]:
    while batch > 1:
        batch //= 2
        yield batch


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
    if largest == "block inputs" and not job.offload and not job.hidden_on_host:
        return "set activation_checkpoint.offload = true"
    if largest == "block inputs" and job.method == "upipe" and not job.hidden_on_host:
        return 'set context_parallel.hidden_states = "host"'
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
