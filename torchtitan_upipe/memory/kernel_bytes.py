"""What attention over the gathered tokens holds: kernel calls, pieces, ring. Reads like ``kernels/pieces.py`` and
``cp/ring.py``; the pieces are the real ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from torchtitan_upipe.cp.ring import zigzag_tokens
from torchtitan_upipe.job.shape import JobShape
from torchtitan_upipe.kernels.deterministic import PROCESSORS, rows_of_a_call, sums_of_dq
from torchtitan_upipe.kernels.launches import Launch, plan_launches
from torchtitan_upipe.kernels.simulated import FLASH2, PADDING, VARLEN
from torchtitan_upipe.kernels.visibility import Interval, Known, Piece, Tokens, visible_pieces
from torchtitan_upipe.memory.account import Account, Block


@lru_cache(4096)
def _seen(queries: Tokens, keys: Tokens) -> Known[Piece]:
    """What queries see, and with it what launches it takes, found once for all stages of a job and its like."""
    return visible_pieces(queries, keys)


class AttentionBytes:
    """The account of :class:`~torchtitan_upipe.cp.attention.SequenceAttention` for causal sequences.

    Args:
        heads: query heads of the call.
        kv_heads: KV heads of the call.
        rows: query rows among the ``T`` gathered tokens.
        chunks: see :class:`~torchtitan_upipe.cp.attention.LocalAttention`.
    """

    def __init__(
        self,
        account: Account,
        job: JobShape,
        heads: int,
        kv_heads: int,
        rows: Sequence[Interval],
        chunks: tuple[Interval, Interval] | None = None,
    ) -> None:
        self.account = account
        self.job = job
        self.heads = heads
        self.kv_heads = kv_heads
        self.rows = rows
        self.row_count = sum(stop - start for start, stop in rows)
        self.chunks = chunks
        self.keys = job.length // job.ring if chunks is None else chunks[1][1] - chunks[1][0]
        self.wide = job.wide

    def forward(self) -> tuple[Block, Block]:
        """``out``, ``lse``."""
        if self.job.ring > 1:
            return self._ring_forward()
        result: tuple[Block, Block] | None = None
        for out, lse, rows in self._parts(self._pieces(0)):
            if rows == self.row_count:
                return self._rounded(out), lse
            result = result or (self._out(self.row_count), self._lse(self.row_count))
            self.account.free(out, lse)
        return result or (self.account.hold(0), self.account.hold(0))

    def backward(self, into: bool = False) -> list[Block]:
        """``dq, dk, dv``; without the last two where they are added ``into`` sums that the caller holds."""
        if self.job.ring > 1:
            dq, *d_kv = self._ring_backward()
            if into:
                self.account.free(*d_kv)
            return [dq] if into else [dq, *d_kv]
        max_keys = -(-self.keys // self.job.query_tiles) if self.job.query_tiles > 1 else None
        return self._call_backward(self._pieces(0), into, max_keys)

    # --- pieces -------------------------------------------------------------------------------------------------------

    def _pieces(self, step: int) -> Sequence[Piece]:
        job = self.job
        if self.chunks is not None:
            queries, keys = self.chunks
            return _seen(Tokens((queries,)).rows(self.rows), Tokens((keys,)))
        ring_rank = job.rank // job.ulysses
        mine = zigzag_tokens(job.length, ring_rank, job.ring).rows(self.rows)
        arrived: Tokens = zigzag_tokens(job.length, (ring_rank - step) % job.ring, job.ring)
        return _seen(mine, arrived)

    def _parts(self, pieces: Sequence[Piece]) -> Iterator[tuple[Block, Block, int]]:
        """``out``, ``lse`` and the number of rows of what ``partial_attention`` yields; the caller frees the blocks."""
        account = self.account
        merged: dict[Interval, tuple[Block, Block]] = {}
        for launch in plan_launches(pieces, self._elements()):
            out, lse = self._out(launch.rows), self._lse(launch.rows)
            alone = [at.stop - at.start for _, at in launch.alone]
            if not launch.shared and len(alone) == 1:
                yield out, lse, launch.rows
                continue
            for rows in alone:  # views, which the caller need not free
                yield account.hold(0), account.hold(0), rows
            firsts = [interval for interval, _, _ in launch.shared if interval not in merged]
            views = self.wide == self.job.element  # what is merged; else copies
            account.free(lse, *([out] if views else []))
            merged |= {i: (self._wide(i[1] - i[0]), self._lse(i[1] - i[0])) for i in firsts}
            account.free(*([] if views else [out]))
            for interval, _, last in launch.shared:
                rows = interval[1] - interval[0]
                if interval not in firsts:
                    self._merge(rows)
                if last:
                    yield (*merged.pop(interval), rows)

    def _elements(self) -> int | None:
        job = self.job
        return job.batch * self.heads * job.model.head_dim if job.kernel in VARLEN else None

    def _merge(self, rows: int) -> None:
        self.account.brief(self._size(rows, self.heads, self.wide), *[self._lse_size(rows)] * 3)

    def _call_backward(self, pieces: Sequence[Piece], into: bool = False, max_keys: int | None = None) -> list[Block]:
        job = self.job
        deterministic = job.deterministic and job.kernel in FLASH2
        max_rows = rows_of_a_call(job.batch, self.heads, self.row_count, PROCESSORS, deterministic)
        launches = plan_launches(pieces, self._elements(), max_keys, max_rows)
        if len(launches) == 1 and launches[0].covers(self.row_count, self.keys):
            dq, *d_kv = self._kernel_backward(launches[0])
            if into:
                self.account.free(*d_kv)
            return [dq] if into else [dq, *d_kv]
        grads = [(self.row_count, self.heads), (self.keys, self.kv_heads), (self.keys, self.kv_heads)]
        totals = [self.account.hold(self._size(*grad, self.wide)) for grad in grads[: 1 if into else 3]]
        for launch in launches:
            self.account.free(*self._kernel_backward(launch))
        return totals

    def _kernel_backward(self, launch: Launch) -> list[Block]:
        job, rows, keys = self.job, launch.rows, launch.keys
        grads = [(rows, self.heads), (keys, self.kv_heads), (keys, self.kv_heads)]
        blocks = [self.account.hold(self._size(*grad)) for grad in grads]
        if job.workspace:  # see kernels/simulated.py
            stretches = len(launch.row_lengths)
            deterministic = job.deterministic and job.kernel in FLASH2
            sums = sums_of_dq(job.batch * stretches, self.heads, PROCESSORS, deterministic)
            padded = rows if launch.is_one else rows + PADDING * stretches
            kept = [sums * self._size(padded, self.heads, 4), job.batch * self.heads * padded * 4]
            if self.heads != self.kv_heads:
                kept += [self._size(keys, self.heads)] * 2
            self.account.brief(*kept, category="workspace")
        return blocks

    # --- ring ---------------------------------------------------------------------------------------------------------

    def _ring_forward(self) -> tuple[Block, Block]:
        account, kv_size = self.account, 2 * self._size(self.keys, self.kv_heads)
        out, lse = account.hold(self._size(self.row_count, self.heads, self.wide)), self._lse(self.row_count)
        kv: list[Block] = []  # the first ones are the caller's
        for step in range(self.job.ring):
            arriving = [account.hold(kv_size)] if step + 1 < self.job.ring else []
            for out_of_step, lse_of_step, rows in self._parts(self._pieces(step)):
                self._merge(rows)
                account.free(out_of_step, lse_of_step)
            account.free(*kv)
            kv = arriving
        return self._rounded(out), lse

    def _ring_backward(self) -> list[Block]:
        account, job = self.account, self.job
        kv_size, d_kv_size = (2 * self._size(self.keys, self.kv_heads, e) for e in (job.element, self.wide))
        dq = account.hold(self._size(self.row_count, self.heads, self.wide))
        kv: list[Block] = []
        d_kv, returning = account.hold(d_kv_size), None
        parts: list[Block] = []
        for step in range(job.ring):
            arriving = [account.hold(kv_size)] if step + 1 < job.ring else []
            pieces = self._pieces(step)
            found = self._call_backward(pieces) if pieces else []
            account.free(*parts)
            parts = found
            if returning is not None:
                account.free(d_kv)
                d_kv = returning
            returning = account.hold(d_kv_size)
            account.free(*kv)
            kv = arriving
        account.free(d_kv, *parts)
        dk, dv = account.hold(d_kv_size / 2), account.hold(d_kv_size / 2)
        account.free(returning) if returning is not None else None
        return [dq, dk, dv]

    # --- sizes --------------------------------------------------------------------------------------------------------

    def _size(self, rows: int, heads: int, element: int | None = None) -> int:
        return self.job.heads(heads, rows, element)

    def _lse_size(self, rows: int) -> int:
        return self.job.batch * self.heads * rows * self.wide

    def _wide(self, rows: int) -> Block:
        return self.account.hold(self._size(rows, self.heads, self.wide))

    def _out(self, rows: int) -> Block:
        return self.account.hold(self._size(rows, self.heads))

    def _lse(self, rows: int) -> Block:
        return self.account.hold(self._lse_size(rows))

    def _rounded(self, out: Block) -> Block:
        return self.account.recast(out, self._size(self.row_count, self.heads))
