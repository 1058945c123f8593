"""Which query rows each rank of a stage computes, and where they come from. Pure Python.

Tokens are sharded contiguously over the ranks of an all-to-all: rank ``p`` holds rows ``[p*N, (p+1)*N)`` of all
``C*N``. A query tile is the same stretch of rows of every shard. Where a team of ``t`` ranks shares a query head, the
tile's rows are cut into ``2t`` blocks and member ``i`` takes the ``i``-th block from the front and the ``i``-th from
the back, which balances the causal mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from torchtitan_upipe.kernels.visibility import Interval


def query_tiles(tokens: int, count: int) -> list[Interval]:
    """Cut a shard of ``tokens`` rows into ``count`` stretches, as equal as can be, or fewer: none is empty."""
    edges = [i * tokens // count for i in range(count + 1)]
    return [(start, stop) for start, stop in pairwise(edges) if start < stop]


@dataclass(frozen=True)
class QueryRows:
    """The query rows of each rank in one stage and tile.

    Attributes:
        team: ``t``, ranks that share a query head; ranks ``[j*t, (j+1)*t)`` are team ``j``.
        degree: ``C``.
        tokens: ``N``.
        tile: the rows of every shard that are computed now.
    """

    team: int
    degree: int
    tokens: int
    tile: Interval

    def computed_by(self, rank: int) -> tuple[Interval, ...]:
        """The rows among all ``C*N`` that ``rank`` computes: disjoint, rising intervals."""
        return _computed_by(self, rank)

    def shared(self, rank: int, shard: int) -> Interval:
        """What ``rank`` computes of the tile of rank ``shard``, counted from that tile's first row."""
        rows = self.tile[1] - self.tile[0]
        low, high = shard * rows, (shard + 1) * rows
        parts = [(max(start, low), min(stop, high)) for start, stop in self._blocks(rank)]
        parts = [(start - low, stop - low) for start, stop in parts if start < stop]
        return (parts[0][0], parts[-1][1]) if parts else (0, 0)

    def count(self, rank: int, shard: int) -> int:
        """Number of rows in :meth:`shared`."""
        start, stop = self.shared(rank, shard)
        return stop - start

    def _blocks(self, rank: int) -> Iterator[Interval]:
        """The two blocks of ``rank`` among its team's, in the tile's rows of all shards side by side."""
        length, blocks = self.degree * (self.tile[1] - self.tile[0]), 2 * self.team
        for i in (rank % self.team, blocks - 1 - rank % self.team):
            yield i * length // blocks, (i + 1) * length // blocks


@lru_cache(maxsize=1024)  # the same in every stage and layer
def _computed_by(rows: QueryRows, rank: int) -> tuple[Interval, ...]:
    found: list[Interval] = []
    for shard in range(rows.degree):
        start, stop = (shard * rows.tokens + rows.tile[0] + row for row in rows.shared(rank, shard))
        if found and found[-1][1] == start:
            start = found.pop()[0]
        if start < stop:
            found.append((start, stop))
    return tuple(found)
