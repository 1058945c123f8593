"""The sequence in chunks: which tokens each holds, and attention of one chunk's queries over the chunks before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from torchtitan_upipe.cp.attention import LocalAttention
from torchtitan_upipe.cp.head_schedule import HeadSchedule
from torchtitan_upipe.cp.stage import KVBlock, StageLayer
from torchtitan_upipe.kernels.contract import accumulate_dtype
from torchtitan_upipe.kernels.merge import merge_partial
from torchtitan_upipe.kernels.visibility import Documents, Interval
from torchtitan_upipe.stash.stash import Place, PutAway, Stash
from torchtitan_upipe.tiled.rows import DeviceRows


@dataclass(frozen=True)
class SequenceChunks:
    """A sequence of ``C*N`` tokens in chunks, of which every rank holds an equal slice.

    Attributes:
        degree: ``C``.
        slices: of each chunk, the rows among this rank's ``N`` tokens.
    """

    degree: int
    slices: tuple[Interval, ...]

    def positions(self, index: int) -> Interval:
        """Where chunk ``index`` stands in the sequence."""
        start, stop = self.slices[index]
        return start * self.degree, stop * self.degree

    def seen_by(self, index: int, documents: Documents | None) -> range:
        """The chunks of which the queries of chunk ``index`` see a token: itself and those before, up to a document."""
        first = 0 if documents is None else documents.first_seen(self.positions(index)[0])
        longest = self.positions(0)[1]  # all but the last chunk are as long
        return range(first // longest, index + 1)


def sequence_chunks(tokens: int, degree: int, chunk: int) -> SequenceChunks:
    """Cut a sequence of which each of ``degree`` ranks holds ``tokens``.

    Args:
        chunk: tokens of a chunk of the whole sequence, a multiple of ``degree``; the last one may be shorter. 0 = all.
    """
    step = chunk // degree or tokens
    return SequenceChunks(degree, tuple((row, min(row + step, tokens)) for row in range(0, tokens, step)))


class ChunkedLayer:
    """One rank's attention layer, chunk by chunk, with all stages of the schedule (one, where ``C`` divides ``H``).

    Args:
        x: ``[B, N, D]``, all this rank's tokens.
        whole: their layer.
        schedule: of all heads at once.
        chunks: of the sequence.
        put_away: where the chunks' queries, keys and values, and their gradients, wait for one another.
    """

    def __init__(
        self, x: Tensor, whole: StageLayer, schedule: HeadSchedule, chunks: SequenceChunks, put_away: PutAway
    ) -> None:
        self.x = x
        self.whole = whole
        self.stages = schedule.stages
        self.chunks = chunks
        self.arriving = [s for s, stage in enumerate(self.stages) if any(stage.fetch.counts)]
        self._keys = Stash(put_away)  # k, v
        self._queries = Stash(put_away)  # q, do, o, lse
        self._sums = Stash(put_away)  # dq so far

    def rows(self, index: int) -> slice:
        """The rows of chunk ``index`` among this rank's tokens."""
        return slice(*self.chunks.slices[index])

    def tile(self, index: int) -> Interval:
        """All rows of chunk ``index``, counted from its first."""
        start, stop = self.chunks.slices[index]
        return 0, stop - start

    def pair(self, queries: int, keys: int) -> StageLayer:
        """The layer of the tokens of chunk ``queries``, which attend to those of chunk ``keys``."""
        rows = self.rows(queries)
        return replace(
            self.whole,
            x=DeviceRows(self.x[:, rows]),
            transform=self.whole.transform.rows(rows),
            attention=LocalAttention(
                self.whole.attention.kernel, chunks=(self.chunks.positions(queries), self.chunks.positions(keys))
            ),
        )

    def seen_by(self, index: int) -> range:
        """The chunks that chunk ``index`` sees."""
        return self.chunks.seen_by(index, self.whole.documents)

    def is_seen_later(self, index: int) -> bool:
        """Whether a later chunk sees chunk ``index``."""
        return index + 1 < len(self.chunks.slices) and index in self.seen_by(index + 1)

    def queries(self, index: int) -> list[Tensor]:
        """Project and exchange the chunk's queries: ``q [B, Sq, u, d]`` of every stage."""
        layer = self.pair(index, index)
        return [layer.queries(stage, self.tile(index))[0] for stage in self.stages]

    def keys(self, index: int, keep: bool) -> dict[int, KVBlock]:
        """Project and exchange the chunk's keys and values, ``[B, C*n, g, d]`` by stage; ``keep`` a copy for later."""
        layer = self.pair(index, index)
        kv = {s: layer.fetch_kv(self.stages[s]) for s in self.arriving}
        if keep:
            for s, block in kv.items():
                self._keys.put((s, index), block.k, block.v)
        return kv

    def attend(self, index: int, qs: Sequence[Tensor], kv: dict[int, KVBlock]) -> list[tuple[Tensor, Tensor]]:
        """Attention of the chunk's queries: over its own keys, then over those of the chunks before, merged in float32.

        Args:
            qs: of :meth:`queries`.
            kv: of :meth:`keys`; emptied once they have been used.

        Returns:
            ``o [B, Sq, u, d]`` and ``lse [B, u, Sq]`` of every stage.
        """
        own, tile, earlier = self.pair(index, index), self.tile(index), self.seen_by(index)[:-1]
        self._announce_keys(next(iter(earlier), None))  # while its own are used
        found = [own.attend(stage, tile, q, kv) for stage, q in zip(self.stages, qs, strict=True)]
        kv.clear()
        self._keys.settle()
        if not earlier:
            return found
        wide = accumulate_dtype(qs[0].dtype)
        found = [(o.to(wide), lse.clone()) for o, lse in found]
        for before, following in zip(earlier, [*earlier[1:], None], strict=True):
            keys = {s: KVBlock(*self._keys.read((s, before))) for s in self.arriving}
            self._announce_keys(following)
            pair = self.pair(index, before)
            for stage, q, (o, lse) in zip(self.stages, qs, found, strict=True):
                merge_partial(o, lse, *pair.attend(stage, tile, q, keys))
            del keys
        return [(o.to(qs[0].dtype), lse) for o, lse in found]

    def keep_queries(self, index: int, stage: int, q: Tensor, do: Tensor, o: Tensor, lse: Tensor) -> None:
        """Put away what :meth:`attend_backward` needs of the chunk's queries in ``stage``."""
        self._keys.settle()
        self._queries.put((stage, index), q, do, o, lse)

    def attend_backward(self, index: int) -> tuple[dict[int, KVBlock], list[Tensor]]:
        """Attention backward of the chunk's keys and of all queries that see them, its own last.

        Called for one chunk after the other: then a chunk's own queries have met all their keys.

        Returns:
            The keys and values with the sums of their gradients, and the whole ``dq [B, Sq, u, d]`` of every stage.
        """
        kv = {s: KVBlock(*_last(self._keys, (s, index))) for s in self.arriving}
        self._keys.settle()
        self._queries.settle()
        later = [i for i in range(index + 1, len(self.chunks.slices)) if index in self.seen_by(i)]
        dqs: list[Tensor] = []
        order = [*later, index]
        for i, following in zip(order, [*order[1:], None], strict=True):
            pair, own = self.pair(i, index), i == index
            for s, stage in enumerate(self.stages):
                q, do, o, lse = _last(self._queries, (s, i)) if own else self._queries.read((s, i))
                before = self._sums.take((s, i))
                if following is not None:
                    self._queries.fetch((s, following))
                    self._sums.fetch((s, following))
                dq = pair.attend_backward(stage, self.tile(i), do, q, kv, o, lse)
                del q, do, o, lse
                dq = dq.to(accumulate_dtype(dq.dtype)) if before is None else before[0].add_(dq)
                if own:
                    dqs.append(dq.to(self.whole.x.dtype))
                else:
                    self._sums.put((s, i), dq)
                del dq, before
        self._sums.settle()
        return kv, dqs

    def _announce_keys(self, index: int | None) -> None:
        """A hint that the keys of chunk ``index`` are read next, so that two chunks of them are on the device."""
        if index is not None:
            for s in self.arriving:
                self._keys.fetch((s, index))


def _last(stash: Stash, place: Place) -> tuple[Tensor, ...]:
    """What is kept at ``place``, for the last time."""
    return stash.take(place) or ()
