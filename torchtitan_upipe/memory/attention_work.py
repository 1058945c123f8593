"""What one rank does in one attention layer: read beside the methods in ``cp/``.

Causal attention over ``S`` tokens is ``2 * S^2 * d`` FLOPs a query head, backward 2.5 times that (arXiv 2307.08691,
section 4.1). What is computed again counts again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from torchtitan_upipe.cp.head_schedule import build_head_schedule
from torchtitan_upipe.cp.ring import zigzag_tokens
from torchtitan_upipe.cp.segments import query_tiles
from torchtitan_upipe.job.shape import JobShape
from torchtitan_upipe.kernels.launches import rectangles
from torchtitan_upipe.kernels.visibility import visible_pieces
from torchtitan_upipe.memory.work import NORM, StepWork, Work

BACKWARD = 2.5  # FLOPs of attention's backward over those of its forward
ROPE = 30  # bytes read and written per element: float32 copy, rotation, rounding
PACK = 4  # of an element's own size: read and written before an exchange and after it
MERGE = 26  # per element that is merged in float32: two scalings and a sum
ADD = 2  # of a sum's element: read and written, beside the summand


@dataclass(frozen=True)
class Calls:
    """Kernel calls of one stage of one layer, for each head of a call.

    Attributes:
        forward: number of calls.
        backward: number of calls, whose keys may be cut.
        rows: query rows of all calls, of each sequence.
        merged: rows that are merged with what other calls found.
        keys: keys of all backward calls.
    """

    forward: int
    backward: int
    rows: int
    merged: int
    keys: int


@cache
def calls_of(length: int, ulysses: int, ring: int, team: int, tiles: int, rank: int) -> Calls:
    """The calls of ``rank`` where ``team`` ranks share a head and walk through ``tiles`` query tiles."""
    schedule = build_head_schedule(ulysses // team, 1, ulysses, ulysses // team)
    tokens, (ring_rank, own) = length // (ulysses * ring), divmod(rank, ulysses)
    max_keys = -(-length // ring // tiles) if ring == 1 and tiles > 1 else None
    forward = backward = rows = merged = keys = 0
    for tile in query_tiles(tokens, tiles):
        wanted = schedule.stages[0].rows(tokens, tile).computed_by(own)
        mine = zigzag_tokens(length, ring_rank, ring).rows(wanted)
        for step in range(ring):
            for piece in visible_pieces(mine, zigzag_tokens(length, (ring_rank - step) % ring, ring)):
                whole, cut = rectangles(piece), rectangles(piece, max_keys)
                count = piece.rows[1] - piece.rows[0]
                forward += len(whole)
                backward += len(cut)
                rows += count * len(cut)
                merged += count * (len(whole) if ring > 1 else len(whole) - 1)
                keys += sum(stop - start for _, (start, stop), _ in cut)
    return Calls(forward, backward, rows, merged, keys)


class AttentionWork:
    """The parts of an attention layer of ``job``."""

    def __init__(self, job: JobShape) -> None:
        model = job.model
        self.job = job
        self.stages = build_head_schedule(
            model.heads, model.kv_heads, job.ulysses, job.head_chunk if job.method == "upipe" else model.heads
        ).stages
        self.fetched = sum(len(stage.fetch.distinct) for stage in self.stages)  # KV heads that are projected
        self.sent = sum(sum(stage.fetch.counts) for stage in self.stages)  # and sent, copies included

    def project(self) -> Work:
        """q, k and v, transformed and exchanged."""
        job, model = self.job, self.job.model
        heads = model.heads + 2 * self.fetched
        transformed = self._elements(model.heads + self.fetched)
        work = self._exchange(model.heads + 2 * self.sent, 3 * len(self.stages))
        work.products += 2 * job.rows * model.dim * heads * model.head_dim
        work.moved += transformed * (ROPE + (NORM if model.qk_norm else 0))
        work.calls += 10 * len(self.stages)
        return work

    def attend(self) -> Work:
        """Attention, and sending keys round the ring."""
        work, job = Work(), self.job
        for heads, kv_heads, team in self._per_stage():
            calls = self._calls(team)
            work.attention += self._flops(heads / team)
            work.moved += MERGE * job.batch * calls.merged * heads * job.model.head_dim
            work.calls += calls.forward
            work.ringed += (job.ring - 1) * 2 * job.heads(kv_heads, job.length // job.ring)
        return work

    def attend_backward(self) -> Work:
        """Attention's backward, sums of dq, dk and dv, and sending them round the ring with their keys."""
        work, job = Work(), self.job
        width = job.batch * job.model.head_dim
        for heads, kv_heads, team in self._per_stage():
            calls, summed = self._calls(team), job.element + ADD * job.wide
            work.attention_backward += BACKWARD * self._flops(heads / team)
            work.moved += 2 * calls.keys * kv_heads * width * summed
            if calls.backward > 1:
                work.moved += calls.rows * heads * width * summed * (2 if job.ring > 1 else 1)
            work.calls += 2 * calls.backward
            travelling = 2 * job.heads(kv_heads, job.length // job.ring)
            work.ringed += (job.ring - 1) * travelling
            if job.ring > 1:
                work.ringed += job.ring * travelling / job.element * job.wide
        return work

    def give_back(self) -> Work:
        """The outputs' exchange back to the tokens."""
        return self._exchange(self.job.model.heads, len(self.stages))

    def output(self) -> Work:
        """The output projection."""
        job, model = self.job, self.job.model
        return Work(products=2 * job.rows * model.heads * model.head_dim * model.dim, calls=2)

    def gradients(self) -> Work:
        """Both gradients of all projections; the exchanges of do, dq, dk and dv."""
        job, model = self.job, self.job.model
        heads = 2 * model.heads + 2 * self.fetched
        work = self._exchange(2 * model.heads + 2 * self.sent, 4 * len(self.stages))
        work.products += 4 * job.rows * model.dim * heads * model.head_dim
        work.moved += self._elements(model.heads + self.fetched) * (ROPE + (3 * NORM if model.qk_norm else 0))
        work.calls += 20 * len(self.stages)
        return work

    def _exchange(self, heads: float, count: int) -> Work:
        """``count`` all-to-alls that send ``heads`` heads of this rank's tokens in all."""
        if self.job.ulysses == 1:
            return Work()
        size = self._elements(heads) * self.job.element
        others = (self.job.ulysses - 1) / self.job.ulysses
        return Work(exchanged=size * others, moved=PACK * size, calls=3 * count)

    def _elements(self, heads: float) -> float:
        return self.job.rows * heads * self.job.model.head_dim

    def _flops(self, heads: float) -> float:
        job = self.job
        return 2 * job.batch * float(job.length) ** 2 * heads * job.model.head_dim / job.ring

    def _calls(self, team: int) -> Calls:
        job = self.job
        tiles = job.query_tiles if job.method == "upipe" else 1
        return calls_of(job.length, job.ulysses, job.ring, team, tiles, job.rank)

    def _per_stage(self) -> list[tuple[int, int, int]]:
        """Query heads and KV heads of the busiest rank of each stage, and the ranks that share each."""
        return [
            (max(s.queries.counts), max(sum(k.keys[1] - k.keys[0] for k in calls) for calls in s.calls), s.team)
            for s in self.stages
        ]


def layer_work(job: JobShape, stash: str) -> StepWork:
    """Both passes of one attention layer, which keeps ``stash`` (``"none"``, ``"device"``, ``"host"``)."""
    if job.method == "fpdt":
        return ChunkedWork(job).layer(stash)
    return _whole_layer(AttentionWork(job), stash)


def _whole_layer(layer: AttentionWork, stash: str) -> StepWork:
    job, step = layer.job, StepWork()
    forward, backward = step.forward, step.backward
    stashes = job.staged and stash != "none"
    for part in (layer.project(), layer.attend(), layer.give_back(), layer.output()):
        forward.add(part)
    if job.checkpoint and not stashes:
        backward.add(forward)
    elif job.checkpoint:
        backward.add(layer.output())
    if job.staged:  # projected again, o exchanged again
        backward.add(layer.project())
        backward.add(layer.give_back())
        if stash == "none" and not job.checkpoint:
            backward.add(layer.attend())
    backward.add(layer.attend_backward())
    backward.add(layer.gradients())
    if stashes and stash == "host":
        heads = job.heads(job.model.heads)
        forward.host += job.stash_bytes
        backward.host += job.stash_bytes
        backward.host_waited += heads if job.checkpoint else 0  # the second run's output projection
        if job.method != "fpdt":  # stages project out, and make dx, from all stages' heads on the host
            d_heads = job.heads(job.model.heads + 2 * layer.fetched)
            forward.host_waited += heads
            backward.host += d_heads
            backward.host_waited += d_heads
    return step


def hidden_work(job: JobShape) -> StepWork:
    """Rows of hidden states, and of their gradients, of one block on their way to host memory and back.

    Each stage and each KV set reads the input again; a stage's backward reads the gradient for ``dWo`` and for ``do``.
    """
    if not job.hidden_on_host:
        return StepWork()
    stages = AttentionWork(job).stages
    walks = len(stages) + 2 * sum(any(stage.fetch.counts) for stage in stages)  # q; k and v
    forward, backward = walks + 2, walks + 2 * len(stages) + 6
    return StepWork(Work(host=forward * job.hidden), Work(host=backward * job.hidden))


class ChunkedWork(AttentionWork):
    """The parts of an FPDT layer, whose chunks of the sequence wait for one another in host memory."""

    def __init__(self, job: JobShape) -> None:
        super().__init__(job)
        self.chunks = -(-job.length // job.sequence_chunk) if job.sequence_chunk else 1
        self.pairs = self.chunks * (self.chunks - 1) / 2  # of different chunks

    def layer(self, stash: str) -> StepWork:
        """See :func:`layer_work`."""
        step = _whole_layer(self, stash)
        keys, queries = self._keys_bytes(), self._query_bytes()
        read = (self.chunks - 1) / 2  # times a chunk is read by another one, on average
        runs = 1 if stash != "none" else 2
        if self.chunks > 1:
            step.forward.host += keys * (1 + read)
            wide = queries / 3 / self.job.element * self.job.wide  # dq so far, there and back
            step.backward.host += (runs - 1) * keys * (1 + read) + keys + 2 * queries + read * (queries + 2 * wide)
        return step

    def attend(self) -> Work:
        """See :class:`AttentionWork`."""
        work = super().attend()
        for heads, _, team in self._per_stage():
            work.moved += MERGE * self._gathered(heads) / team * (self.chunks - 1) / 2
            work.calls += self.pairs * 8
        return work

    def attend_backward(self) -> Work:
        """See :class:`AttentionWork`."""
        work, job = super().attend_backward(), self.job
        for heads, kv_heads, team in self._per_stage():
            summed = job.element + ADD * job.wide
            work.moved += (self.chunks - 1) / 2 * summed * (self._gathered(heads) / team + 2 * self._gathered(kv_heads))
            work.calls += self.pairs * 10
        return work

    def _gathered(self, heads: float) -> float:
        return self.job.batch * self.job.length * heads * self.job.model.head_dim

    def _keys_bytes(self) -> float:
        return 2 * sum(self._gathered(kv_heads) for _, kv_heads, _ in self._per_stage()) * self.job.element

    def _query_bytes(self) -> float:
        """Of q, do and o."""
        return 3 * sum(self._gathered(heads) / team for heads, _, team in self._per_stage()) * self.job.element
