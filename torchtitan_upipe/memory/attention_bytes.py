"""What an UPipe layer holds, stage by stage: read beside ``cp/upipe.py``, ``cp/stage.py`` and ``cp/gradients.py``.

Every ``hold`` is a tensor there; what is freed here is what goes out of scope there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torchtitan_upipe.cp.head_schedule import HeadPlacement, HeadSchedule, Stage
from torchtitan_upipe.cp.segments import query_tiles
from torchtitan_upipe.cp.shards import runs
from torchtitan_upipe.job.shape import JobShape
from torchtitan_upipe.kernels.visibility import Interval
from torchtitan_upipe.memory.account import Account, Block
from torchtitan_upipe.memory.kernel_bytes import AttentionBytes
from torchtitan_upipe.memory.projection_bytes import attention_weights, transform_in_slices
from torchtitan_upipe.tiled.tiles import slice_size


@dataclass
class KVBytes:
    """KV heads that arrived together: ``k, v`` and, in backward, the wide sums of their gradients."""

    heads: int
    k: Block
    v: Block
    sums: tuple[Block, ...] = ()


class UPipeBytes:
    """The account of one attention layer of one rank.

    Args:
        account: where everything is held.
        job: sizes and switches.
        schedule: the layer's.
        chunks: positions of the queries, of which ``job`` has as many tokens, and of the keys; by default the same.
    """

    def __init__(
        self, account: Account, job: JobShape, schedule: HeadSchedule, chunks: tuple[Interval, Interval] | None = None
    ) -> None:
        self.account = account
        self.job = job
        self.schedule = schedule
        self.rank = job.rank % job.ulysses
        self.chunks = chunks
        self.keys = job.length // job.ring if chunks is None else chunks[1][1] - chunks[1][0]
        self.tiles = query_tiles(job.tokens, job.query_tiles)
        self.all_heads = job.model.heads + 2 * job.model.kv_heads

    def forward(self, stash: str, kept: Sequence[Block] = ()) -> tuple[Block, list[Block]]:
        """The layer's forward pass.

        Args:
            stash: ``"none"``, ``"device"`` or ``"host"``.
            kept: in the block's second run, what the first has kept.

        Returns:
            ``y``, and what is kept: ``o, lse`` of every stage and tile.
        """
        account = self.account
        outputs = list(kept) or self.attend_stages(stash)
        y = account.hold(self.job.hidden)
        rows = max(stop - start for start, stop in self.tiles)
        self.product_in_slices(self.job.model.heads, rows, self.schedule.stages[0].queries if stash == "host" else None)
        if stash == "none":
            account.free(*outputs)
            outputs = []
        return y, outputs

    def attend_stages(self, stash: str) -> list[Block]:
        """The stages' forward pass: ``o, lse`` of every stage and tile, on the device or on the host."""
        account, outputs = self.account, list[Block]()
        newest: list[Block] = []  # on their way to the host
        kv: dict[int, KVBytes] = {}
        for index, stage in enumerate(self.schedule.stages):
            if any(stage.fetch.counts):
                kv[index] = self.fetch_kv(stage)
            for tile in self.tiles:
                q, projected = self.queries(stage, tile)
                account.free(*projected)
                o, lse = self.attend(stage, tile, kv)
                account.free(q)
                o = self.to_sequence(stage, tile, o)
                account.free(*newest)
                newest = []
                if stash == "host":
                    newest = [o, lse]
                    o, lse = (account.hold(block.size, "saved", host=True) for block in newest)
                outputs += [o, lse]
            for block in stage.leave[self.rank]:
                left = kv.pop(block)
                account.free(left.k, left.v)
        account.free(*newest)
        return outputs

    def backward(self, kept: Sequence[Block]) -> tuple[Block, list[Block]]:
        """The layer's backward pass.

        Args:
            kept: see :meth:`forward`.

        Returns:
            ``dx`` and the whole weights' gradients.
        """
        account, job = self.account, self.job
        wide = [size * job.wide / job.element for size in attention_weights(job)]
        d_wo, heads = self.attend_stages_backward(kept)
        on_host = any(not block.device for block in kept)
        stacked = account.hold(sum(attention_weights(job)[:3]))
        dx = account.hold(job.hidden)
        if on_host:
            account.free(*heads)
            heads = []
        sums = [account.hold(size, "gradients") for size in wide[:3]]
        self.product_in_slices(self.all_heads, job.tokens, self.schedule.stages[0].queries if on_host else None)
        narrow = job.element < job.wide
        weights = [account.hold(size, "gradients") for size in attention_weights(job)] if narrow else [*sums, d_wo]
        account.free(stacked, *heads, *([*sums, d_wo] if narrow else []))
        return dx, weights

    def attend_stages_backward(self, kept: Sequence[Block]) -> tuple[Block, list[Block]]:
        """The stages' backward pass.

        Returns:
            The sum ``dWo``, and the gradients of the heads that are on the device: all, or the last one put away.
        """
        account, job = self.account, self.job
        d_wo = account.hold(attention_weights(job)[3] * job.wide / job.element, "gradients")
        stashed = list(zip(kept[::2], kept[1::2], strict=True))
        fetched: tuple[Block, ...] = ()  # ahead, from the host
        heads: list[Block] = []  # gradients of all stages' heads, for one product at the end, where the stash is
        on_host = any(not block.device for block in kept)

        def settle() -> None:
            if on_host:
                account.free(*heads)
                heads.clear()

        def wait_for_dx(grad: Block) -> None:
            settle()
            heads.append(grad)

        projected: list[Block] = []
        kv: dict[int, KVBytes] = {}
        for index, stage in enumerate(self.schedule.stages):
            # k, v of a new KV set, again
            if any(stage.fetch.counts):
                kv[index] = self.fetch_kv(stage)

            parts: list[Block] = []
            for tile in self.tiles:
                # o and lse: from the stash, or attention again
                if stashed:
                    o_tokens, lse = self._fetched(*stashed.pop(0), fetched)
                    o = self.to_heads(stage, tile, o_tokens)
                    q, projected = None, []
                else:
                    q, projected = self.queries(stage, tile)
                    o, lse = self.attend(stage, tile, kv)
                    o_tokens = self.to_sequence(stage, tile, o, keep=True)

                # output projection
                self.add_output(stage)
                if o_tokens is not o:
                    account.free(o_tokens)
                do = self.output_gradient(stage, tile)

                # attention
                if q is None:
                    q, projected = self.queries(stage, tile)
                settle()
                dq = self.attend_backward(stage, tile, kv)
                account.free(do, q, o, lse)
                fetched = self._fetch_next(stashed)

                # exchange back, undo rope and norm
                parts.append(self.to_sequence(stage, tile, dq))
                self._transform_in_slices(self._tokens(stage.queries, tile), norm=job.model.qk_norm)
                account.free(*projected)

            # gradients of the queries' heads
            if len(parts) > 1:
                joined = account.hold(self._tokens(stage.queries))
                account.free(*parts)
                parts = [joined]
            wait_for_dx(parts[0])

            # of the keys' and values', at the end of a KV set, one at a time
            self.add_keys(stage, kv, wait_for_dx)
        return d_wo, heads

    # --- phases -------------------------------------------------------------------------------------------------------

    def queries(self, stage: Stage, tile: Interval) -> tuple[Block, list[Block]]:
        """``q`` of this rank, and the projection where a norm's gradient needs it."""
        projected = self.project(stage.queries, tile)
        q = self.transform(projected)
        exchanged = self.to_heads(stage, tile, q)
        if exchanged is not q:
            self.account.free(q)
        return exchanged, [] if q is projected else [projected]

    def fetch_kv(self, stage: Stage) -> KVBytes:
        """``k, v`` of the KV set that arrives."""
        projected = self.project(stage.fetch)
        k = self.transform(projected)
        if k is not projected:
            self.account.free(projected)
        k = self._keys_to_heads(stage.fetch, k)
        v = self._keys_to_heads(stage.fetch, self.project(stage.fetch))
        return KVBytes(stage.fetch.counts[self.rank], k, v)

    def attend(self, stage: Stage, tile: Interval, kv: dict[int, KVBytes]) -> tuple[Block, Block]:
        """``o, lse`` of this rank's heads."""
        parts = [bytes_.forward() for bytes_, _ in self._calls(stage, tile, kv)]
        if len(parts) == 1:
            return parts[0]
        o, lse = (self.account.hold(sum(block.size for block in column)) for column in zip(*parts, strict=True))
        for part in parts:
            self.account.free(*part)
        return o, lse

    def attend_backward(self, stage: Stage, tile: Interval, kv: dict[int, KVBytes]) -> Block:
        """``dq``; ``dk`` and ``dv`` are added to the sums of their KV set."""
        parts = []
        for bytes_, block in self._calls(stage, tile, kv):
            if not block.sums:
                size = self.job.heads(block.heads, self.keys, self.job.wide)
                block.sums = self.account.hold(size), self.account.hold(size)
            (dq,) = bytes_.backward(into=True)
            parts.append(self.account.recast(dq, self.job.heads(bytes_.heads, bytes_.row_count)))
        if len(parts) == 1:
            return parts[0]
        joined = self.account.hold(sum(part.size for part in parts))
        self.account.free(*parts)
        return joined

    def to_heads(self, stage: Stage, tile: Interval, tokens: Block) -> Block:
        """Exchange; ``tokens`` stay, or are the result where there is one rank."""
        if self.job.ulysses == 1:
            return tokens
        send = self.account.hold(tokens.size)
        result = self.account.hold(self.rows_size(stage.queries.counts[self.rank], self.query_rows(stage, tile)))
        self.account.free(send)
        return result

    def to_sequence(self, stage: Stage, tile: Interval, heads: Block, keep: bool = False) -> Block:
        """Exchange back; ``heads`` go unless ``keep``, or are the result where there is one rank."""
        if self.job.ulysses == 1:
            return heads
        received = self.account.hold(self._tokens(stage.queries, tile))
        joined = self.account.hold(received.size)
        self.account.free(received, *([] if keep else [heads]))
        return joined

    def project(self, placement: HeadPlacement, tile: Interval | None = None) -> Block:
        """One matrix product for the placement's heads, or one for each tile of hidden states."""
        rows = self.account.hold(self._cut(placement))
        result = self.account.hold(self._tokens(placement, tile))
        if self.job.hidden_on_host:  # this tile, normalised, and its product; the next one
            product = self.job.heads(len(placement.distinct), self.job.tile_rows)
            self.account.brief(*[self.job.tile] * 3, product, category="tiles")
        self.account.free(rows)
        return result

    def transform(self, heads: Block) -> Block:
        """RoPE in place, or norm to a new tensor and RoPE there."""
        result = self.account.hold(heads.size) if self.job.model.qk_norm else heads
        self._transform_in_slices(heads.size, norm=False)
        return result

    def add_output(self, stage: Stage) -> None:
        """Columns of ``dWo``."""
        tiles = [self.job.tile] * 2 if self.job.hidden_on_host else []
        self.account.brief(self._cut(stage.queries, copied=True), *tiles)

    def output_gradient(self, stage: Stage, tile: Interval) -> Block:
        """``do`` of this rank's heads."""
        account = self.account
        columns, d_tokens = account.hold(self._cut(stage.queries)), account.hold(self._tokens(stage.queries, tile))
        if self.job.hidden_on_host:
            product = self.job.heads(len(stage.queries.distinct), self.job.tile_rows)
            account.brief(*[self.job.tile] * 2, product, category="tiles")
        do = self.to_heads(stage, tile, d_tokens)
        account.free(columns, *([] if do is d_tokens else [d_tokens]))
        return do

    def add_queries(self, stage: Stage) -> None:
        """RoPE and norm of ``dq`` undone; the projection is made again for a norm."""
        norm = self.job.model.qk_norm
        projected = [self.project(stage.queries)] if norm else []
        self._transform_in_slices(self._tokens(stage.queries), norm)
        self.account.free(*projected)

    def add_keys(self, stage: Stage, kv: dict[int, KVBytes], wait_for_dx: Callable[[Block], None]) -> None:
        """``dk``, then ``dv`` of the KV set that ends."""
        if not any(stage.release.counts):
            return
        account, norm = self.account, self.job.model.qk_norm
        leaving = [kv.pop(block) for block in stage.leave[self.rank]]
        for block in leaving:
            account.free(block.k, block.v)
        for which in (0, 1):
            grad = self.release(stage, leaving, which)
            projected = [self.project(stage.release)] if which == 0 and norm else []
            if which == 0:
                self._transform_in_slices(self._tokens(stage.release), norm)
            wait_for_dx(grad)
            account.free(*projected)

    def release(self, stage: Stage, leaving: Sequence[KVBytes], which: int) -> Block:
        """``dk`` (0) or ``dv`` (1) of the leaving sets at their tokens' owners; the sums go."""
        account, sent = self.account, []
        for kv in leaving:
            sent.append(self.account.recast(kv.sums[which], self.job.heads(kv.heads, self.keys)))
        if len(sent) > 1:
            sent.append(account.hold(sum(block.size for block in sent)))
        received = account.hold(self._tokens(stage.release, copies=True)) if self.job.ulysses > 1 else None
        copies = len(stage.release.distinct) < sum(stage.release.counts)
        wide = self.job.wide if copies else self.job.element
        result = account.hold(self._tokens(stage.release) * wide / self.job.element)
        account.free(*sent, *([] if received is None else [received]))
        return self.account.recast(result, self._tokens(stage.release))

    # --- the stash on the host ----------------------------------------------------------------------------------------

    def _fetched(self, o: Block, lse: Block, ahead: Sequence[Block]) -> tuple[Block, Block]:
        """``o, lse`` on the device."""
        if o.device:
            return o, lse
        back = ahead or [self.account.hold(block.size) for block in (o, lse)]
        self.account.free(o, lse)
        return back[0], back[1]

    def _fetch_next(self, stashed: Sequence[tuple[Block, Block]]) -> tuple[Block, ...]:
        if not stashed or stashed[0][0].device:
            return ()
        return tuple(self.account.hold(block.size) for block in stashed[0])

    # --- sizes --------------------------------------------------------------------------------------------------------

    def product_in_slices(self, heads: int, rows: int, from_host: HeadPlacement | None) -> None:
        """A product over all heads of ``rows``, a slice at a time."""
        size = slice_size(rows)
        fetched = 0 if from_host is None else self.job.heads(len(from_host.distinct), size)
        product = self.job.batch * size * self.job.model.dim * self.job.element
        ahead = fetched if self.job.tokens > size else 0  # of the next slice, beside the product
        self.account.brief(self.job.heads(heads, size), max(2 * fetched, ahead + product))

    def query_rows(self, stage: Stage, tile: Interval) -> int:
        """Query rows of this rank."""
        return sum(stop - start for start, stop in self._rows(stage, tile))

    def rows_size(self, heads: int, rows: int) -> int:
        """Bytes of ``rows`` rows of ``heads`` heads, which may be none."""
        return self.job.batch * rows * heads * self.job.model.head_dim * self.job.element

    def keys_size(self, stage: Stage) -> int:
        """Bytes of the ``k`` that arrive with ``stage`` on this rank."""
        return self.rows_size(stage.fetch.counts[self.rank], self.keys)

    def _transform_in_slices(self, size: int, norm: bool) -> None:
        """Wide temporaries of RoPE for some rows of ``size`` bytes of heads; of the norm's gradient."""
        transform_in_slices(self.account, self.job, size, norm)

    def _tokens(self, placement: HeadPlacement, tile: Interval | None = None, *, copies: bool = False) -> int:
        heads = sum(placement.counts) if copies else len(placement.distinct)
        return self.job.heads(heads, None if tile is None else tile[1] - tile[0])

    def _cut(self, placement: HeadPlacement, copied: bool = False) -> int:
        """Rows of a weight for the placement's heads: copied where they are not consecutive."""
        copied = copied or len(list(runs(placement.distinct))) > 1
        width = self.job.model.head_dim * self.job.model.dim * self.job.element
        return len(placement.distinct) * width if copied else 0

    def _keys_to_heads(self, placement: HeadPlacement, tokens: Block) -> Block:
        if self.job.ulysses == 1:
            return tokens
        send = self.account.hold(self._tokens(placement, copies=True))
        result = self.account.hold(self.job.heads(placement.counts[self.rank], self.keys))
        self.account.free(send, tokens)
        return result

    def _rows(self, stage: Stage, tile: Interval) -> tuple[Interval, ...]:
        return stage.rows(self.job.tokens, tile).computed_by(self.rank)

    def _calls(self, stage: Stage, tile: Interval, kv: dict[int, KVBytes]) -> list[tuple[AttentionBytes, KVBytes]]:
        rows, found = self._rows(stage, tile), []
        for call in stage.calls[self.rank]:
            heads, kv_heads = (stop - start for start, stop in (call.queries, call.keys))
            bytes_ = AttentionBytes(self.account, self.job, heads, kv_heads, rows, self.chunks)
            found.append((bytes_, kv[call.block]))
        return found
