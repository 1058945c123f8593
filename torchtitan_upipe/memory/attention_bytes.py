"""What an UPipe layer holds, stage by stage: read beside ``cp/upipe.py`` and ``cp/stage.py``, whose order this follows.

Every ``hold`` is a tensor there; what is freed here is what goes out of scope there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchtitan_upipe.cp.head_schedule import HeadPlacement, HeadSchedule, Stage
from torchtitan_upipe.cp.shards import runs
from torchtitan_upipe.memory.account import Account, Block
from torchtitan_upipe.memory.kernel_bytes import AttentionBytes
from torchtitan_upipe.memory.shape import JobShape


@dataclass
class KVBytes:
    """KV heads that arrived together: ``k, v`` and, in backward, the sums of their gradients."""

    heads: int
    k: Block
    v: Block
    grads: list[Block]


class UPipeBytes:
    """The account of one attention layer of one rank.

    Args:
        account: where everything is held.
        job: sizes and switches.
        schedule: the layer's.
    """

    def __init__(self, account: Account, job: JobShape, schedule: HeadSchedule) -> None:
        self.account = account
        self.job = job
        self.schedule = schedule
        self.at = job.rank % job.ulysses
        self.wide = max(job.element, 4)
        self.keys = job.length // job.ring

    def forward(self, stash: Sequence[Block] = ()) -> tuple[Block, list[Block]]:
        """The layer's forward pass.

        Args:
            stash: of the block's first run; empty where this is the first run.

        Returns:
            ``y``, and what stays for backward beside the layer's input.
        """
        account, kept = self.account, list(stash)
        angles = rope_angles(account, self.job)
        y = account.hold(self.job.rows * self.job.model.dim * self.wide)
        kv: dict[int, KVBytes] = {}
        for index, stage in enumerate(self.schedule.stages):
            if stash:
                o = None
            else:
                # project and exchange: k, v of a new KV set, then q
                if any(stage.fetch.counts):
                    kv[index] = self.fetch_kv(stage)
                q, projected = self.queries(stage)
                account.free(*projected)

                # attention over the whole sequence
                o, lse = self.attend(stage, kv)
                account.free(q)
                for block in stage.leave[self.at]:
                    left = kv.pop(block)
                    account.free(left.k, left.v)

                # exchange back, stash
                o = self.to_sequence(stage, o)
                if self.job.stash == "none":
                    account.free(lse)
                else:
                    kept += [o, lse]

            # project out: the stage's share of y
            account.brief(self._cut(stage.queries), self.job.hidden)
            if o is not None and self.job.stash == "none":
                account.free(o)
        return self._rounded(y, self.job.hidden), [angles, *kept]

    def backward(self, kept: Sequence[Block]) -> tuple[Block, list[Block]]:
        """The layer's backward pass.

        Args:
            kept: see :meth:`forward`.

        Returns:
            ``dx`` and the whole weights' gradients.
        """
        account, job = self.account, self.job
        angles, *stash = kept
        dx = account.hold(job.rows * job.model.dim * self.wide)
        weights = [account.hold(size, "gradients") for size in attention_weights(job)]
        kv: dict[int, KVBytes] = {}
        for index, stage in enumerate(self.schedule.stages):
            # k, v of a new KV set, again
            if any(stage.fetch.counts):
                kv[index] = self.fetch_kv(stage)

            # o and lse: from the stash, or attention again
            if stash:
                o_tokens, lse, *stash = stash
                o = self.to_heads(stage, o_tokens)
                q, projected = None, []
            else:
                q, projected = self.queries(stage)
                o, lse = self.attend(stage, kv)
                o_tokens = self.to_sequence(stage, o, keep=True)

            # output projection
            account.brief(self._cut(stage.queries, copied=True))  # columns of dWo
            if o_tokens is not o:
                account.free(o_tokens)
            sent = account.hold(self._tokens(stage.queries))
            do = self.to_heads(stage, sent)
            if do is not sent:
                account.free(sent)

            # attention
            if q is None:
                q, projected = self.queries(stage)
            dq = self.attend_backward(stage, kv)
            account.free(do, q, o, lse)

            # query projection
            dq = self.to_sequence(stage, dq)
            dq = self.undo_transform(dq)
            account.free(*projected)
            self.add_projection(stage.queries)
            account.free(dq)

            # key and value projections, at the end of a KV set, one at a time
            if any(stage.release.counts):
                leaving = [kv.pop(block) for block in stage.leave[self.at]]
                for which in (0, 1):
                    d = self.release(stage, leaving, which)
                    if which == 0:
                        projected = [account.hold(self._tokens(stage.release))] if job.model.qk_norm else []
                        d = self.undo_transform(d)
                        account.free(*projected)
                    self.add_projection(stage.release)
                    account.free(d)
                for block in leaving:
                    account.free(block.k, block.v, *block.grads)
        account.free(angles)
        return self._rounded(dx, job.hidden), weights

    # --- phases -------------------------------------------------------------------------------------------------------

    def queries(self, stage: Stage) -> tuple[Block, list[Block]]:
        """``q`` of this rank, and the projection where a norm's gradient needs it."""
        projected = self.project(stage.queries)
        q = self.transform(projected, keep=self.job.model.qk_norm)
        exchanged = self.to_heads(stage, q)
        if exchanged is not q:
            self.account.free(q)
        if self.job.model.qk_norm:
            return exchanged, [projected]
        return exchanged, []

    def fetch_kv(self, stage: Stage) -> KVBytes:
        """``k, v`` of the KV set that arrives."""
        k = self.transform(self.project(stage.fetch), keep=False)
        k = self._keys_to_heads(stage.fetch, k)
        v = self._keys_to_heads(stage.fetch, self.project(stage.fetch))
        return KVBytes(stage.fetch.counts[self.at], k, v, [])

    def attend(self, stage: Stage, kv: dict[int, KVBytes]) -> tuple[Block, Block]:
        """``o, lse`` of this rank's heads."""
        parts = [bytes_.forward() for bytes_, _ in self._calls(stage, kv)]
        if len(parts) == 1:
            return parts[0]
        joined = tuple(self.account.hold(sum(block.size for block in column)) for column in zip(*parts, strict=True))
        for part in parts:
            self.account.free(*part)
        return joined  # type: ignore[return-value]

    def attend_backward(self, stage: Stage, kv: dict[int, KVBytes]) -> Block:
        """``dq``; ``dk`` and ``dv`` join those of their KV set."""
        parts = []
        for bytes_, block in self._calls(stage, kv):
            dq, *d_kv = bytes_.backward()
            self._add_gradients(block, bytes_, d_kv)
            parts.append(self._rounded(dq, self.job.heads(bytes_.heads, bytes_.row_count)))
        if len(parts) == 1:
            return parts[0]
        joined = self.account.hold(sum(part.size for part in parts))
        self.account.free(*parts)
        return joined

    def to_heads(self, stage: Stage, tokens: Block) -> Block:
        """Exchange; ``tokens`` stay, or are the result where there is one rank."""
        if self.job.ulysses == 1:
            return tokens
        received = self.job.heads(stage.queries.counts[self.at], self._row_count(stage))
        send = self.account.hold(tokens.size)
        result = self.account.hold(received)
        self.account.free(send)
        return result

    def to_sequence(self, stage: Stage, heads: Block, keep: bool = False) -> Block:
        """Exchange back; ``heads`` go unless ``keep``, or are the result where there is one rank."""
        if self.job.ulysses == 1:
            return heads
        received = self.account.hold(self._tokens(stage.queries))
        joined = self.account.hold(self._tokens(stage.queries))
        self.account.free(received)
        if not keep:
            self.account.free(heads)
        return joined

    def project(self, placement: HeadPlacement) -> Block:
        """One matrix product for the placement's heads."""
        rows = self.account.hold(self._cut(placement))
        result = self.account.hold(self._tokens(placement))
        self.account.free(rows)
        return result

    def transform(self, heads: Block, keep: bool) -> Block:
        """Norm, if any, and RoPE; ``heads`` go unless ``keep``."""
        normed = [self.account.hold(heads.size)] if self.job.model.qk_norm else []
        result = rotated(self.account, self.job, heads.size)
        self.account.free(*normed, *([] if keep else [heads]))
        return result

    def undo_transform(self, grad: Block) -> Block:
        """Gradient before RoPE and norm, in place of ``grad``."""
        account, wide = self.account, grad.size * self.wide // self.job.element
        result = rotated(account, self.job, grad.size)
        if self.job.model.qk_norm:
            copies = [account.hold(wide) for _ in range(2)] if self.wide != self.job.element else []  # heads, gradient
            normed, d_heads = account.hold(wide), account.hold(wide)
            account.free(*copies[1:])
            d_heads = self._rounded(d_heads, grad.size)
            account.free(result, normed, *copies[:1])
            result = d_heads
        account.free(grad)
        return result

    def add_projection(self, placement: HeadPlacement) -> None:
        """Rows of a weight's gradient, then the share of ``dx``."""
        rows = self.account.hold(self._cut(placement))
        d_rows = self.account.hold(self._cut(placement, copied=True))
        self.account.brief(self.job.hidden)
        self.account.free(rows, d_rows)

    def release(self, stage: Stage, leaving: Sequence[KVBytes], which: int) -> Block:
        """``dk`` (0) or ``dv`` (1) of the leaving sets at their tokens' owners; what the sets hold stays."""
        account, narrow = self.account, [self.job.heads(kv.heads, self.keys) for kv in leaving]
        wide = [size for kv, size in zip(leaving, narrow, strict=True) if kv.grads[which].size > size]
        sent = [account.hold(size) for size in wide]
        if len(leaving) > 1:
            sent.append(account.hold(sum(narrow)))
        if self.job.ulysses > 1:
            sent.append(account.hold(self._tokens(stage.release, copies=True)))  # received
        result = account.hold(self._tokens(stage.release) * self.wide / self.job.element)  # copies summed
        account.free(*sent)
        return self._rounded(result, self._tokens(stage.release))

    # --- sizes --------------------------------------------------------------------------------------------------------

    def _tokens(self, placement: HeadPlacement, copies: bool = False) -> int:
        return self.job.heads(sum(placement.counts) if copies else len(placement.distinct))

    def _row_count(self, stage: Stage) -> int:
        return sum(stop - start for start, stop in stage.rows(self.job.tokens).computed_by(self.at))

    def _cut(self, placement: HeadPlacement, copied: bool = False) -> int:
        """Rows of a weight for the placement's heads: copied where they are not consecutive."""
        copied = copied or len(list(runs(placement.distinct))) > 1
        width = self.job.model.head_dim * self.job.model.dim * self.job.element
        return len(placement.distinct) * width if copied else 0

    def _rounded(self, block: Block, size: int) -> Block:
        """``block`` in the dtype of the activations, of ``size`` bytes."""
        if block.size == size:
            return block
        rounded = self.account.hold(size)
        self.account.free(block)
        return rounded

    def _keys_to_heads(self, placement: HeadPlacement, tokens: Block) -> Block:
        if self.job.ulysses == 1:
            return tokens
        send = self.account.hold(self._tokens(placement, copies=True))
        result = self.account.hold(self.job.heads(placement.counts[self.at], self.keys))
        self.account.free(send, tokens)
        return result

    def _calls(self, stage: Stage, kv: dict[int, KVBytes]) -> list[tuple[AttentionBytes, KVBytes]]:
        rows = stage.rows(self.job.tokens).computed_by(self.at)
        return [
            (
                AttentionBytes(
                    self.account, self.job, call.queries[1] - call.queries[0], call.keys[1] - call.keys[0], rows
                ),
                kv[call.block],
            )
            for call in stage.calls[self.at]
        ]

    def _add_gradients(self, block: KVBytes, bytes_: AttentionBytes, d_kv: list[Block]) -> None:
        account, keys = self.account, self.keys
        if not block.grads:
            if bytes_.kv_heads == block.heads:
                block.grads = d_kv
                return
            block.grads = [account.hold(self.job.heads(block.heads, keys, self.wide)) for _ in range(2)]
        narrow = self.job.heads(block.heads, keys)
        if block.grads[0].size == narrow and self.wide != self.job.element:
            wide = [account.hold(self.job.heads(block.heads, keys, self.wide)) for _ in range(2)]
            account.free(*block.grads)
            block.grads = wide
        account.free(*d_kv)


def rotated(account: Account, job: JobShape, size: int) -> Block:
    """RoPE of ``size`` bytes of heads, which stay: a wide copy, two halves, their interleaving; then rounded."""
    wide = size * max(job.element, 4) // job.element
    account.brief(*([wide] if job.element < 4 else []), wide, wide / 2)  # copy, halves, a product
    steps = [account.hold(s) for s in ([wide] if job.element < 4 else []) + [wide, wide]]
    if job.element < 4:
        result = account.hold(size)
        account.free(*steps)
        return result
    account.free(steps[0])
    return steps[1]


def rope_angles(account: Account, job: JobShape) -> Block:
    """Rows of the position table for this rank's tokens."""
    return account.hold((job.rows if job.positions else job.tokens) * job.model.rope_bytes_per_token)


def attention_weights(job: JobShape) -> list[int]:
    """Bytes of ``wq, wk, wv, wo`` as they are computed with."""
    width = job.model.head_dim * job.model.dim * job.element
    return [width * count for count in (job.model.heads, job.model.kv_heads, job.model.kv_heads, job.model.heads)]
