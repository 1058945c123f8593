"""What an FPDT layer holds, chunk by chunk: read beside ``cp/fpdt.py`` and ``cp/chunks.py``.

Within a chunk everything is as in UPipe's stages over a sequence as long as the chunk (``attention_bytes.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torchtitan_upipe.cp.chunks import sequence_chunks
from torchtitan_upipe.cp.head_schedule import build_head_schedule
from torchtitan_upipe.job.shape import JobShape
from torchtitan_upipe.kernels.visibility import Interval
from torchtitan_upipe.memory.account import Account, Block
from torchtitan_upipe.memory.attention_bytes import KVBytes, UPipeBytes
from torchtitan_upipe.memory.projection_bytes import attention_weights


class FPDTBytes:
    """The account of one attention layer of one rank, causal over whole sequences.

    The first two chunks and the last two are walked through, and of those that a chunk meets the first and the last:
    all others are like them.
    """

    def __init__(self, account: Account, job: JobShape) -> None:
        self.account = account
        self.job = job
        self.schedule = build_head_schedule(job.model.heads, job.model.kv_heads, job.ulysses, job.model.heads)
        self.stages = self.schedule.stages
        self.chunks = sequence_chunks(job.tokens, job.ulysses, job.sequence_chunk)
        self.count = len(self.chunks.slices)
        self.walked = {0, 1, self.count - 2, self.count - 1} & set(range(self.count))
        self.newest: list[list[Block]] = []  # q, do, o, lse of a stage, on their way to the host

    def forward(self, stash: str, kept: Sequence[Block] = ()) -> tuple[Block, list[Block]]:
        """The layer's forward pass; see :meth:`~torchtitan_upipe.memory.attention_bytes.UPipeBytes.forward`."""
        account, job = self.account, self.job
        y = account.hold(job.hidden)
        if kept:
            on_host = self.stages[0].queries if not kept[0].device else None
            self._pair(0, 0).product_in_slices(job.model.heads, self._tile(0)[1], on_host)
            return y, list(kept)

        outputs: list[Block] = []
        newest: list[Block] = []  # o, lse on their way to the host
        for index in range(self.count):
            if index not in self.walked:
                if stash != "none":
                    sizes = [size for s in range(len(self.stages)) for size in self._query_sizes(1, s)[2:]]
                    outputs += [account.hold(size, "saved", host=stash == "host") for size in sizes]
                continue
            own, tile = self._pair(index, index), self._tile(index)
            kv = self._keys(own)
            qs = self._queries(own, tile)
            results = self._attend(index, kv)
            account.free(*qs)
            chunk: list[Block] = []
            for stage, (o, lse) in zip(self.stages, results, strict=True):
                o = own.to_sequence(stage, tile, o)
                chunk += [o, lse]
                if stash == "host":
                    account.free(*newest)
                    newest = []
                    outputs += [account.hold(block.size, "saved", host=True) for block in (o, lse)]
            own.product_in_slices(job.model.heads, tile[1], None)
            if stash == "device":
                outputs += chunk
            elif stash == "host":  # of the last stage they stay until the next ones are put
                account.free(*chunk[:-2])
                newest = chunk[-2:]
            else:
                account.free(*chunk)
        account.free(*newest)
        return y, outputs

    def backward(self, kept: Sequence[Block]) -> tuple[Block, list[Block]]:
        """The layer's backward pass; see :meth:`~torchtitan_upipe.memory.attention_bytes.UPipeBytes.backward`."""
        account, job = self.account, self.job
        *of_inputs, of_output = [self._wide(size) for size in attention_weights(job)]
        d_wo = account.hold(of_output, "gradients")
        stashed = [list(kept[i : i + 2]) for i in range(0, len(kept), 2)]
        ahead: list[list[Block]] = []
        kv: dict[int, KVBytes] = {}
        for index in range(self.count):
            if index in self.walked:
                kv, ahead = self._keep_chunk(index, stashed, ahead)
                continue
            account.free(*(block for blocks in ahead for block in blocks))
            ahead = []
            for _ in self.stages if stashed else ():
                account.free(*stashed.pop(0))
        if self.count > 1:
            self._settle()
        weights = [self._rounded(d_wo)]
        dx, sums = account.hold(job.hidden), list[Block]()
        for index in sorted(self.walked):
            kv, dqs = self._attend_backward(index, kv)
            sums = sums or [account.hold(size, "gradients") for size in of_inputs]
            self._project_back(index, kv, dqs)
        return dx, [*weights, *map(self._rounded, sums)]

    def waiting(self, stash: str) -> int:
        """Host bytes of the chunks that wait in backward, beside a stash that is on the host and gives up its place."""
        if self.count == 1:
            return 0
        total = 0
        for index, times in ((0, 1), (1, self.count - 2), (self.count - 1, 1)):
            for s, stage in enumerate(self.stages):
                q, do, o, lse = self._query_sizes(index, s)
                size = q + do + (0 if stash == "host" else o + lse) + 2 * self._pair(index, index).keys_size(stage)
                total += times * (size + (self._wide(q) if index else 0))  # dq, which the first chunk's never becomes
        return total

    # --- phases -------------------------------------------------------------------------------------------------------

    def _attend(self, index: int, kv: dict[int, KVBytes], keep: bool = False) -> list[tuple[Block, Block]]:
        account, own, tile = self.account, self._pair(index, index), self._tile(index)
        earlier = sorted({0, index - 1}) if index else []
        ahead = self._arriving(earlier[0]) if earlier else {}
        found = [own.attend(stage, tile, kv) for stage in self.stages]
        if not keep:
            self._free_keys(kv)
        if not earlier:
            return found
        wide = [(account.hold(self._wide(o.size)), account.hold(lse.size)) for o, lse in found]
        account.free(*(block for pair in found for block in pair))
        for before, following in zip(earlier, [*earlier[1:], None], strict=True):
            keys, ahead = ahead, {} if following is None else self._arriving(following)
            pair = self._pair(index, before)
            for stage, (o, lse) in zip(self.stages, wide, strict=True):
                part = pair.attend(stage, tile, keys)
                account.brief(o.size, *[lse.size] * 3)
                account.free(*part)
            self._free_keys(keys)
        sizes = [self._query_sizes(index, s)[0] for s in range(len(self.stages))]
        return [(account.recast(o, size), lse) for (o, lse), size in zip(wide, sizes, strict=True)]

    def _keep_chunk(
        self, index: int, stashed: list[list[Block]], ahead: list[list[Block]]
    ) -> tuple[dict[int, KVBytes], list[list[Block]]]:
        """``q, do, o, lse`` of a chunk, to the host; its keys stay where there is no other chunk.

        Args:
            stashed: ``o, lse`` of this chunk and those after, by stage.
            ahead: those of this chunk that were asked for.

        Returns:
            The keys, and what was asked for of the next chunk.
        """
        account, own, tile = self.account, self._pair(index, index), self._tile(index)
        alone, stages = self.count == 1, len(self.stages)
        kv = self._keys(own)
        qs = self._queries(own, tile)
        again = [] if stashed else self._attend(index, kv, keep=alone)
        following: list[list[Block]] = []
        for stage, q in zip(self.stages, qs, strict=True):
            if again:
                o, lse = again.pop(0)
                o_tokens = own.to_sequence(stage, tile, o, keep=True)
            else:
                o_tokens, lse = kept = stashed.pop(0)
                if not o_tokens.device:
                    o_tokens, lse = ahead.pop(0) if ahead else [account.hold(block.size) for block in kept]
                    account.free(*kept)
                    if len(stashed) >= stages:  # the same stage of the next chunk
                        following.append([account.hold(block.size) for block in stashed[stages - 1]])
                o = own.to_heads(stage, tile, o_tokens)
            own.add_output(stage)
            if o_tokens is not o:
                account.free(o_tokens)
            do = own.output_gradient(stage, tile)
            if not alone:
                self._free_keys(kv)
                self._settle()
            self.newest.append([q, do, o, lse])
        return kv, following

    def _attend_backward(self, index: int, kv: dict[int, KVBytes]) -> tuple[dict[int, KVBytes], list[Block]]:
        """The chunk's keys with the sums of their gradients, and its own ``dq``; all queries that see them go by."""
        account, stages = self.account, range(len(self.stages))
        kv = kv or self._arriving(index)
        order = [*sorted({index + 1, self.count - 1} - {index, self.count}), index]
        ahead: dict[int, list[Block]] = {}
        newest: list[Block] = []  # a sum on its way to the host
        dqs: list[Block] = []
        for i, following in zip(order, [*order[1:], None], strict=True):
            pair = self._pair(i, index)
            for s in stages:
                if self.newest:  # the only chunk's, still here
                    blocks = self.newest.pop(0)
                else:
                    blocks = ahead[s] if i != order[0] else self._arriving_queries(i, s, index)
                if following is not None:
                    ahead[s] = self._arriving_queries(following, s, index)
                queries, total = blocks[:4], blocks[4:]
                dq = pair.attend_backward(self.stages[s], self._tile(i), kv)
                account.free(*queries)
                if total:
                    account.free(dq)
                    (dq,) = total
                else:
                    dq = account.recast(dq, self._wide(dq.size))
                if i == index:
                    dqs.append(account.recast(dq, self._query_sizes(i, s)[0]))
                else:
                    account.free(*newest)
                    newest = [dq]
        account.free(*newest)
        return kv, dqs

    def _project_back(self, index: int, kv: dict[int, KVBytes], dqs: list[Block]) -> None:
        """Exchange back, undo RoPE and norm; gradients of the projections, and rows of ``dx``."""
        account, own, tile = self.account, self._pair(index, index), self._tile(index)
        heads: list[Block] = []
        for stage in self.stages:
            heads.append(own.to_sequence(stage, tile, dqs.pop(0)))
            own.add_queries(stage)
            own.add_keys(stage, kv, heads.append)
        self._free_keys(kv)
        stacked, part = account.hold(sum(attention_weights(self.job)[:3])), account.hold(own.job.hidden)
        own.product_in_slices(own.all_heads, tile[1], None)
        account.free(stacked, part, *heads)

    # --- what comes and goes ------------------------------------------------------------------------------------------

    def _keys(self, own: UPipeBytes) -> dict[int, KVBytes]:
        return {s: own.fetch_kv(stage) for s, stage in enumerate(self.stages) if any(stage.fetch.counts)}

    def _queries(self, own: UPipeBytes, tile: Interval) -> list[Block]:
        found = []
        for stage in self.stages:
            q, projected = own.queries(stage, tile)
            self.account.free(*projected)
            found.append(q)
        return found

    def _arriving(self, index: int) -> dict[int, KVBytes]:
        """Keys and values of a chunk, from the host."""
        own = self._pair(index, index)
        sizes = {s: own.keys_size(stage) for s, stage in enumerate(self.stages) if any(stage.fetch.counts)}
        heads = {s: self.stages[s].fetch.counts[own.rank] for s in sizes}
        return {s: KVBytes(heads[s], self.account.hold(size), self.account.hold(size)) for s, size in sizes.items()}

    def _arriving_queries(self, index: int, stage: int, keys: int) -> list[Block]:
        """``q, do, o, lse`` of a chunk, from the host, and the sum of its ``dq`` unless ``keys`` are the first."""
        sizes = self._query_sizes(index, stage)
        return [self.account.hold(size) for size in (*sizes, *([self._wide(sizes[0])] if keys else []))]

    def _free_keys(self, kv: dict[int, KVBytes]) -> None:
        for block in kv.values():
            self.account.free(block.k, block.v, *block.sums)
        kv.clear()

    def _settle(self) -> None:
        for blocks in self.newest:
            self.account.free(*blocks)
        self.newest.clear()

    # --- sizes --------------------------------------------------------------------------------------------------------

    def _pair(self, queries: int, keys: int) -> UPipeBytes:
        start, stop = self.chunks.positions(queries)
        job = replace(self.job, length=stop - start, query_tiles=1)
        return UPipeBytes(self.account, job, self.schedule, ((start, stop), self.chunks.positions(keys)))

    def _tile(self, index: int) -> Interval:
        start, stop = self.chunks.slices[index]
        return 0, stop - start

    def _query_sizes(self, index: int, stage: int) -> tuple[int, int, int, int]:
        """Bytes of ``q, do, o`` and ``lse`` of this rank."""
        own = self._pair(index, index)
        rows, count = own.query_rows(self.stages[stage], self._tile(index)), self.stages[stage].queries.counts[own.rank]
        size = own.rows_size(count, rows)
        return size, size, size, self.job.batch * rows * count * self.job.wide

    def _rounded(self, total: Block) -> Block:
        """The gradient of a weight in its dtype."""
        grad = self.account.recast(total, total.size // self.job.wide * self.job.element)
        self.account.retag("gradients", grad)
        return grad

    def _wide(self, size: int) -> int:
        return size // self.job.element * self.job.wide
