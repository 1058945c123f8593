"""Which query rows each rank of a stage computes, and where they come from. Pure Python.

Tokens are sharded contiguously over the ranks of an all-to-all: rank ``p`` holds rows ``[p*N, (p+1)*N)`` of the group's
``T = C*N``. Where a team of ``t`` ranks shares a query head, the rows are cut into ``2t`` blocks and member ``i`` takes
the ``i``-th block from the front and the ``i``-th from the back, which balances the causal mask.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchtitan_upipe.kernels.visibility import Interval


@dataclass(frozen=True)
class QueryRows:
    """The query rows of each rank in one stage.

    Attributes:
        team: ``t``, ranks that share a query head; ranks ``[j*t, (j+1)*t)`` are team ``j``.
        degree: ``C``.
        tokens: ``N``.
    """

    team: int
    degree: int
    tokens: int

    def computed_by(self, rank: int) -> tuple[Interval, ...]:
        """The rows among all ``T`` that ``rank`` computes: one interval, or two, rising."""
        length, blocks = self.degree * self.tokens, 2 * self.team
        front, back = rank % self.team, blocks - 1 - rank % self.team
        first, second = ((i * length // blocks, (i + 1) * length // blocks) for i in (front, back))
        return ((first[0], second[1]),) if first[1] == second[0] else (first, second)

    def shared(self, rank: int, shard: int) -> tuple[Interval, ...]:
        """What ``rank`` computes of the rows of rank ``shard``, counted from that shard's first row."""
        low, high = shard * self.tokens, (shard + 1) * self.tokens
        cut = ((max(start, low), min(stop, high)) for start, stop in self.computed_by(rank))
        return tuple((start - low, stop - low) for start, stop in cut if start < stop)

    def count(self, rank: int, shard: int) -> int:
        """Number of rows in :meth:`shared`."""
        return sum(stop - start for start, stop in self.shared(rank, shard))
