"""What a layer with all heads at once holds: read beside ``cp/ulysses.py``. Autograd keeps what its backward needs."""

from __future__ import annotations

from collections.abc import Sequence

from torchtitan_upipe.cp.head_schedule import Stage, build_head_schedule
from torchtitan_upipe.job.shape import JobShape
from torchtitan_upipe.memory.account import Account, Block
from torchtitan_upipe.memory.kernel_bytes import AttentionBytes
from torchtitan_upipe.memory.projection_bytes import attention_weights, transform_in_slices


class UlyssesBytes:
    """The account of one attention layer of one rank: Ulysses, ring (an all-to-all of one rank) and their hybrid."""

    def __init__(self, account: Account, job: JobShape) -> None:
        model = job.model
        self.account = account
        self.job = job
        self.at = job.rank % job.ulysses
        self.stages = build_head_schedule(model.heads, model.kv_heads, job.ulysses, model.heads).stages
        self.queries, self.keys = job.heads(model.heads), job.heads(model.kv_heads)
        self.gathered = job.length // job.ring

    def forward(self, keep: bool = True) -> tuple[Block, list[Block]]:
        """``y``, and what autograd keeps beside the layer's input; nothing unless ``keep``."""
        account, job = self.account, self.job
        kept: list[Block] = []

        # project all heads of this rank's tokens
        q, of_q = self._project(self.queries, transform=True)
        k, of_k = self._project(self.keys, transform=True)
        v, _ = self._project(self.keys, transform=False)
        if keep:
            kept += of_q + of_k
        else:
            account.free(*of_q, *of_k)

        outs = []
        for stage in self.stages:
            # exchange: sequence shards to head shards
            if any(stage.fetch.counts):
                kept += [
                    self._exchange(local, self._kv_size(stage), job.heads(sum(stage.fetch.counts))) for local in (k, v)
                ]
            kept.append(self._exchange(q, job.heads(stage.queries.counts[self.at], self._rows(stage))))

            # attention over the whole sequence
            for call in self._calls(stage):
                kept += call.forward()

            # exchange back
            if job.ulysses > 1:
                size = job.heads(len(stage.queries.distinct))
                received = account.hold(size)
                outs.append(account.hold(size))
                account.free(received)
        if len(outs) > 1:
            joined = account.hold(self.queries)
            account.free(*outs)
            outs = [joined]
        y = account.hold(job.hidden)
        kept += outs
        if job.ulysses > 1:
            account.free(q, k, v)
        else:
            account.free(*(block for block in (q, k, v) if block not in kept))
        if not keep:
            account.free(*kept)
            return y, []
        return y, kept

    def backward(self, kept: Sequence[Block]) -> tuple[Block, list[Block]]:
        """``dx`` and the whole weights' gradients; frees ``kept``."""
        account, job = self.account, self.job
        sizes = attention_weights(job)

        # output projection, exchange
        do = account.hold(self.queries)
        weights = [account.hold(sizes[3], "gradients")]
        if job.ulysses > 1:
            *kept, o = kept
            account.free(o)
        grads: list[Block] = []
        for stage in self.stages:
            do_heads = self._exchange(do, job.heads(stage.queries.counts[self.at], self._rows(stage)))
            if stage is self.stages[-1] and do_heads is not do:
                account.free(do)
            for call in self._calls(stage):
                grads += self._rounded(call)
            account.free(do_heads)
        account.free(*kept)

        # exchange back: each rank's piece is put into a tensor of all heads, and these are summed
        dx: list[Block] = []
        dq, dk, dv = (self._gather(size) for size in (self.queries, self.keys, self.keys))
        account.free(*grads)
        for d, size, transform in ((dv, sizes[2], False), (dk, sizes[1], True), (dq, sizes[0], True)):
            if transform:
                rotated = account.hold(d.size)
                transform_in_slices(account, job, d.size)
                account.free(d)
                d = rotated
            dx.append(account.hold(job.hidden))
            weights.append(account.hold(size, "gradients"))
            account.free(d)
            if len(dx) == 2:
                total = account.hold(job.hidden)
                account.free(*dx)
                dx = [total]
        return dx[0], weights

    def _project(self, size: int, transform: bool) -> tuple[Block, list[Block]]:
        """A projection with norm and RoPE, and what the norm's gradient needs."""
        account, projected = self.account, self.account.hold(size)
        if not transform:
            return projected, []
        normed = [account.hold(size)] if self.job.model.qk_norm else []
        result = account.hold(size)
        transform_in_slices(account, self.job, size)
        account.free(*normed, *([] if normed else [projected]))
        return result, [projected] if normed else []

    def _exchange(self, local: Block, received: int, sent: int | None = None) -> Block:
        if self.job.ulysses == 1:
            return local
        send = self.account.hold(local.size if sent is None else sent)
        result = self.account.hold(received)
        self.account.free(send)
        return result

    def _gather(self, size: int) -> Block:
        if self.job.ulysses == 1:
            return self.account.hold(size)
        received = self.account.hold(size)
        total = self.account.hold(size)
        self.account.brief(size)
        self.account.free(received)
        return total

    def _rounded(self, call: AttentionBytes) -> list[Block]:
        """``dq, dk, dv`` in the dtype of the activations."""
        sizes = ((call.heads, call.row_count), (call.kv_heads, call.keys), (call.kv_heads, call.keys))
        return [
            self.account.recast(grad, self.job.heads(*size)) for grad, size in zip(call.backward(), sizes, strict=True)
        ]

    def _calls(self, stage: Stage) -> list[AttentionBytes]:
        rows = stage.rows(self.job.tokens).computed_by(self.at)
        return [
            AttentionBytes(self.account, self.job, call.queries[1] - call.queries[0], call.keys[1] - call.keys[0], rows)
            for call in stage.calls[self.at]
        ]

    def _rows(self, stage: Stage) -> int:
        return sum(stop - start for start, stop in stage.rows(self.job.tokens).computed_by(self.at))

    def _kv_size(self, stage: Stage) -> int:
        return self.job.heads(stage.fetch.counts[self.at], self.gathered)
