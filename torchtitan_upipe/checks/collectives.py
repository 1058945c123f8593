"""Every collective of the job at its shapes: first that each value is the one its sender wrote, then its bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.tools.utils import device_module, device_type

from torchtitan_upipe.checks.report import Hosts, Verdict
from torchtitan_upipe.checks.short import ShortTrainer
from torchtitan_upipe.cp.collectives import HeadExchange, RingExchange
from torchtitan_upipe.cp.head_schedule import HeadPlacement, Stage, build_head_schedule
from torchtitan_upipe.cp.segments import QueryRows
from torchtitan_upipe.cp.shards import split_keys, split_queries
from torchtitan_upipe.job.shape import JobShape
from torchtitan_upipe.titan.attention import ContextParallelAttention

LARGEST = {"cpu": 2**20, "cuda": 2**27}  # bytes that a rank sends at a time
TINY = 2**14  # bytes; what is as small is timed, and has no bandwidth
TIMES = 5  # of which the fastest counts
CODES = 199  # whole numbers up to this are exact in bfloat16, whose mantissa has 8 bits

Run = Callable[[], list[int]]  # one collective; the ranks of the world whose values came wrong


@dataclass(frozen=True)
class Collective:
    """One kind of collective on this rank.

    Attributes:
        name: what it carries.
        group: the ranks of the world that take part.
        size: bytes that this rank sends to others.
        whole: of the job's size, unless that was too large.
        send: runs it.
        wrong: runs it on coded values; the ranks of the world whose values came wrong.
    """

    name: str
    group: tuple[int, ...]
    size: int
    whole: float
    send: Callable[[], object]
    wrong: Run


@dataclass
class Found:
    """What a rank found of one collective: where values came wrong from, and the fastest time in seconds."""

    name: str
    group: tuple[int, ...]
    size: int
    whole: float
    wrong: list[int] = field(default_factory=list)
    seconds: float = 0.0


def measure_collectives(trainer: ShortTrainer, job: JobShape, mark: Callable[[str], None]) -> list[Found]:
    """All collectives of ``job``, on the groups of ``trainer``."""
    found = []
    for one in collectives(trainer, job):
        mark(one.name)
        result = Found(one.name, one.group, one.size, one.whole, sorted(set(one.wrong())))
        result.seconds = min(_timed(one.send) for _ in range(TIMES))
        found.append(result)
    return found


def judge_collectives(findings: list[list[Found]], hosts: Hosts) -> Verdict:
    """Name every sender of wrong values, with those that received them."""
    failures = []
    said = []
    for number, first in enumerate(findings[0]):
        on_ranks = [found[number] for found in findings]
        senders: dict[int, list[int]] = {}
        for receiver, found in enumerate(on_ranks):
            for sender in found.wrong:
                senders.setdefault(sender, []).append(receiver)
        failures += [
            f"{first.name}: values of {hosts.of([sender])} come wrong to {hosts.of(receivers)}."
            for sender, receivers in sorted(senders.items())
        ]
        slowest = max(found.seconds for found in on_ranks)
        shrunk = f" (the job's are of {first.size / first.whole / 2**20:,.0f})" if first.whole < 1 else ""
        fast = f"{first.size / slowest / 1e9:.2f} GB/s at {first.size / 2**20:,.3g} MiB{shrunk}"
        said.append(f"{first.name} {fast if first.size > TINY else f'{slowest * 1e6:,.0f} us'}")
    exchange = next((found.group for found in findings[0] if "all-to-all" in found.name), None)
    if exchange is not None:
        shares = all(hosts.together(found[0].group) for found in findings)
        said.append(f"the all-to-all's {len(exchange)} ranks {'share' if shares else 'do not share'} a host")
    return Verdict("; ".join(said) or "one rank, which sends nothing", failures)


def collectives(trainer: ShortTrainer, job: JobShape) -> Iterator[Collective]:
    """Those of a step, on this rank."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[job.element]
    blocks = [m for m in trainer.model_parts[0].modules() if isinstance(m, ContextParallelAttention)]
    method: Any = blocks[0].method
    exchange = HeadExchange(method.exchange.group)
    ring = getattr(method.attention, "exchange", None)
    if exchange.size > 1:
        yield from _all_to_alls(exchange, job, dtype)
    if ring is not None and ring.size > 1:
        yield _ring(RingExchange(ring.group), job, dtype)
    dims: Any = trainer.parallel_dims
    if (mesh := dims.get_optional_mesh("fsdp")) is not None and mesh.size() > 1:
        block = sum(map(prod, job.model.block))
        yield _all_gather(mesh.get_group(), -(-block // mesh.size()), dtype)
        reduced = {2: torch.bfloat16, 4: torch.float32}[job.reduced]
        yield _reduce_scatter(mesh.get_group(), -(-block // mesh.size()), reduced)
    if (mesh := dims.get_optional_mesh("dp_replicate")) is not None:
        yield _all_reduce(mesh.get_group(), "all-reduce of gradients", job.own_elements // job.model.layers)
    if (mesh := dims.get_optional_mesh("loss")) is not None:
        yield _all_reduce(mesh.get_group(), "all-reduce of loss and norm", mesh.size())


def _all_to_alls(exchange: HeadExchange, job: JobShape, dtype: torch.dtype) -> Iterator[Collective]:
    """Queries and keys of the first stage, there and back; of a query tile, or of a chunk of the sequence."""
    chunk = job.model.heads if job.method != "upipe" else job.head_chunk
    stage: Stage = build_head_schedule(job.model.heads, job.model.kv_heads, exchange.size, chunk).stages[0]
    tokens = min(job.tokens, job.sequence_chunk // exchange.size) if job.sequence_chunk else job.tokens
    for name, heads, tiles in (
        ("queries", stage.queries, job.query_tiles if job.method == "upipe" else 1),
        ("keys", stage.fetch, 1),
    ):
        of_token = job.batch * len(heads.distinct) * job.model.head_dim
        rows, whole = _shrunk(max(tokens // tiles, 1), of_token * dtype.itemsize)
        yield _all_to_all(exchange, name, heads, stage.rows(rows), (job.batch, rows, job.model.head_dim), whole, dtype)


def _all_to_all(
    exchange: HeadExchange,
    name: str,
    heads: HeadPlacement,
    rows: QueryRows,
    shape: tuple[int, int, int],
    whole: float,
    dtype: torch.dtype,
) -> Collective:
    """Out and back: to heads by the schedule, and the inverse."""
    group, (batch, tokens, width), ranks = _world_ranks(exchange.group), shape, range(exchange.size)
    queries = name == "queries"

    def split(full: Tensor) -> list[Tensor]:
        return split_queries(full, heads, rows, exchange.rank) if queries else split_keys(full, heads)

    counts = [rows.count(exchange.rank, shard) if queries else tokens for shard in ranks]
    back = [rows.count(rank, exchange.rank) if queries else tokens for rank in ranks]
    pieces = split(torch.zeros(batch, tokens, len(heads.distinct), width, dtype=dtype, device=device_type))

    def wrong() -> list[int]:
        coded = [_code(piece, exchange.rank, receiver) for receiver, piece in enumerate(pieces)]
        received = exchange.to_heads(coded, counts)
        from_shards = zip(received.split(counts, dim=1), ranks, strict=True)
        off = [sender for part, sender in from_shards if not torch.equal(part, _code(part, sender, exchange.rank))]
        returned = exchange.to_sequence(received, heads.counts, counts, back)
        off += [rank for rank in ranks if not torch.equal(returned[rank], coded[rank]) and rank not in off]
        return [group[rank] for rank in off]

    size = (sum(piece.numel() for piece in pieces) - pieces[exchange.rank].numel()) * dtype.itemsize
    return Collective(f"all-to-all of {name}", group, size, whole, lambda: exchange.to_heads(pieces, counts), wrong)


def _ring(ring: RingExchange, job: JobShape, dtype: torch.dtype) -> Collective:
    """Keys and values of a stage to the next rank."""
    group = _world_ranks(ring.group)
    kv_heads = max(job.model.kv_heads // job.ulysses, 1)
    of_token = 2 * job.batch * kv_heads * job.model.head_dim
    tokens, whole = _shrunk(job.tokens * job.ulysses, of_token * dtype.itemsize)
    kv = torch.zeros(2, job.batch, tokens, kv_heads, job.model.head_dim, dtype=dtype, device=device_type)

    def send() -> tuple[Tensor, ...]:
        ring.start(tuple(kv))
        return ring.finish()

    def wrong() -> list[int]:
        after, before = (ring.rank + 1) % ring.size, (ring.rank - 1) % ring.size
        ring.start(tuple(_code(part, ring.rank, after) for part in kv))
        received = ring.finish()
        fits = all(torch.equal(part, _code(part, before, ring.rank)) for part in received)
        return [] if fits else [group[before]]

    return Collective("ring of keys and values", group, kv.nbytes, whole, send, wrong)


def _all_gather(process_group: dist.ProcessGroup, elements: int, dtype: torch.dtype) -> Collective:
    """A block's weights."""
    group, (rank, size) = _world_ranks(process_group), _place(process_group)
    elements, whole = _shrunk(elements, dtype.itemsize)
    own = torch.zeros(elements, dtype=dtype, device=device_type)
    gathered = own.new_zeros(size * elements)

    def wrong() -> list[int]:
        dist.all_gather_into_tensor(gathered, _code(own, rank, 0), group=process_group)
        parts = enumerate(gathered.split(elements))
        return [group[sender] for sender, part in parts if not torch.equal(part, _code(part, sender, 0))]

    def send() -> object:
        return dist.all_gather_into_tensor(gathered, own, group=process_group)

    return Collective("all-gather of a block's weights", group, own.nbytes * (size - 1), whole, send, wrong)


def _reduce_scatter(process_group: dist.ProcessGroup, elements: int, dtype: torch.dtype) -> Collective:
    """A block's gradients."""
    group, (rank, size) = _world_ranks(process_group), _place(process_group)
    elements, whole = _shrunk(max(elements, size), dtype.itemsize)
    full = torch.zeros(size * elements, dtype=dtype, device=device_type)
    own = full.new_zeros(elements)

    def wrong() -> list[int]:
        dist.reduce_scatter_tensor(own, _share(full, rank, size), group=process_group)
        return [group[sender] for sender in _off(own, _code(full, 0, 0).split(elements)[rank], rank * elements, size)]

    def send() -> object:
        return dist.reduce_scatter_tensor(own, full, group=process_group)

    return Collective("reduce-scatter of its gradients", group, own.nbytes * (size - 1), whole, send, wrong)


def _all_reduce(process_group: dist.ProcessGroup, name: str, elements: int) -> Collective:
    group, (rank, size) = _world_ranks(process_group), _place(process_group)
    elements, whole = _shrunk(max(elements, size), 4)
    values = torch.zeros(elements, device=device_type)

    def wrong() -> list[int]:
        summed = _share(values, rank, size)
        dist.all_reduce(summed, group=process_group)
        return [group[sender] for sender in _off(summed, _code(values, 0, 0), 0, size)]

    def send() -> object:
        return dist.all_reduce(values, group=process_group)

    return Collective(name, group, values.nbytes, whole, send, wrong)


def _code(like: Tensor, sender: int, receiver: int) -> Tensor:
    """What ``sender`` writes for ``receiver``: each element by both and by its place."""
    place = torch.arange(like.numel(), device=like.device).view(like.shape)
    return ((place + 31 * sender + 7 * receiver) % CODES + 1).to(like.dtype)


def _share(like: Tensor, rank: int, size: int) -> Tensor:
    """A rank's summand: of every ``size`` elements, one rank's is not 0, so that a wrong sum names its rank."""
    place = torch.arange(like.numel(), device=like.device)
    return torch.where(place % size == rank, _code(like, 0, 0), 0)


def _off(got: Tensor, expected: Tensor, first: int, size: int) -> list[int]:
    """The ranks whose elements of a sum, of which ``first`` stand before these, are wrong."""
    places = (got != expected).nonzero().flatten() + first
    return (places % size).unique().tolist()


def _shrunk(count: int, size: int) -> tuple[int, float]:
    """As many of ``count`` things of ``size`` bytes as may be sent at a time, and which share of all that is."""
    most = max(LARGEST[device_type] // size, 1)
    return min(count, most), min(1.0, most / count)


def _place(group: dist.ProcessGroup) -> tuple[int, int]:
    return dist.get_rank(group), dist.get_world_size(group)


def _world_ranks(group: dist.ProcessGroup | None) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def _timed(send: Callable[[], object]) -> float:
    """Seconds, from a moment when all ranks are ready."""
    dist.barrier()
    device_module.synchronize()
    began = time.perf_counter()
    send()
    device_module.synchronize()
    return time.perf_counter() - began
