"""The ledger: one rank's memory over one training step, by formulas. Allocates nothing and takes milliseconds.

The formulas are written as what is held and freed, in the order of the real code; ``dry_run/`` is the other leg.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchtitan_upipe.job.shape import JobShape, job_shape
from torchtitan_upipe.memory.account import Account, Block
from torchtitan_upipe.memory.block_bytes import BlockBytes, Kept, Walks, head_backward, head_forward
from torchtitan_upipe.memory.fpdt_bytes import FPDTBytes
from torchtitan_upipe.memory.host_bytes import (
    HostBlockBytes,
    host_embedding,
    host_embedding_backward,
    host_head_backward,
    host_head_forward,
)
from torchtitan_upipe.memory.prediction import Prediction
from torchtitan_upipe.memory.shards_bytes import ShardsBytes
from torchtitan_upipe.memory.tiled_bytes import TiledBlockBytes, tiled_head_backward, tiled_head_forward

if TYPE_CHECKING:
    from torchtitan.config import JobConfig


def predict(config: JobConfig, world_size: int | None = None, rank: int = 0, workspace: bool = True) -> Prediction:
    """Predict one rank's peak memory over a training step of ``config``.

    Args:
        world_size: ranks of the job; by default what started this process says, else what the parallel degrees need.
        rank: the rank that is looked at.
        workspace: count what the attention kernel's backward holds beside its results (``kernels/simulated.py``).
    """
    return predict_shape(job_shape(config, world_size, rank, workspace))


def predict_shape(job: JobShape, walks: Walks | None = None) -> Prediction:
    """Predict the peak of a job given by its shape.

    Args:
        walks: remembers what attention layers held, for further jobs whose attention is the same.
    """
    account = Account()
    _Step(account, job, {} if walks is None else walks).run()
    return Prediction(
        account.peak,
        account.host_peak,
        account.at_peak,
        account.host_at_peak,
        account.peak_moment,
        account.moments,
    )


class _Step:
    """One training step of one rank, steady state."""

    def __init__(self, account: Account, job: JobShape, walks: Walks) -> None:
        model = job.model
        self.account = account
        self.job = job
        kind = HostBlockBytes if job.hidden_on_host else TiledBlockBytes if job.tile_size else BlockBytes
        self.block = kind(account, job, walks)
        self.shards = ShardsBytes(account, job)
        embedding, norm = (model.vocab, model.dim), (model.dim,)
        self.embedding = [] if model.tied else [embedding]
        self.head = [norm, embedding]
        self.names = [f"layers.{i}" for i in range(model.layers)]

    def run(self) -> None:
        """Hold and free what a step does."""
        account, job, shards = self.account, self.job, self.shards
        weights = [*self.embedding, *list(job.model.block) * job.model.layers, *self.head]
        account.hold(shards.shard(weights, job.stored), "parameters", host=job.state_on_host)
        account.hold(2 * shards.shard(weights, job.stored), "optimizer", host=job.state_on_host)
        batch = [account.hold(8 * job.batch * job.length, "other", host=True) for _ in range(2)]
        positions = account.hold(8 * job.length / job.ring, "other", host=True)
        account.free(batch[0], positions)
        account.hold(2 * 8 * job.batch * job.length, "other")
        if job.positions:
            account.hold(3 * 8 * job.rows, "other")
        gradient = self._backward(*self._forward())
        account.free(gradient)
        with account.during("optimizer step", "optimizer"):
            account.hold(0)

    def _forward(self) -> tuple[list[Block], list[Kept], list[Block], list[Block]]:
        account, shards, job = self.account, self.shards, self.job
        with account.during("tok_embeddings forward", "block inputs"):
            weights = shards.gather_forward(self.embedding)
            hidden = [host_embedding(account, job) if job.hidden_on_host else account.hold(job.hidden)]
            account.free(*weights)
        kept = []
        for index, name in enumerate(self.names):
            with account.during(f"{name}.attention_norm forward", "block inputs"):
                weights = shards.gather_forward(job.model.block)
            if job.offload:
                account.hold(job.hidden, "block inputs", host=True)
            if job.checkpoint:
                y, stays = self.block.first_run(index)
                kept.append(Kept(attention=stays))
            else:
                y, of_block = self.block.forward(index)
                kept.append(of_block)
            if job.offload:
                account.free(hidden.pop())
            hidden.append(y)
            account.free(*weights)
        with account.during("norm forward", "loss"):
            weights = shards.gather_forward(self.head)  # not resharded: backward begins with them
        if job.tile_size:
            of_head = (host_head_forward if job.hidden_on_host else tiled_head_forward)(account, job)
            self._free(hidden.pop())
            shards.end_forward()
        else:
            shards.end_forward()
            of_head = head_forward(account, job)
        return hidden, kept, of_head, weights

    def _free(self, hidden: Block) -> None:
        """Free a hidden state; buffers on the host stay."""
        if hidden.device:
            self.account.free(hidden)

    def _fetch_inputs(self, name: str, index: int, hidden: list[Block]) -> None:
        """The input of block ``index`` back on the device, and that of the block before on its way; buffers stay."""
        if not self.job.offload:
            return
        with self.account.during(f"{name} second forward", "block inputs"):
            if not hidden:
                hidden.append(self.account.hold(self.job.hidden))
            if index:
                hidden.insert(0, self.account.hold(self.job.hidden))

    def _backward(self, hidden: list[Block], kept: list[Kept], of_head: list[Block], weights: list[Block]) -> Block:
        account, shards, job = self.account, self.shards, self.job
        blocks = [job.model.block] * job.model.layers
        if job.tile_size:
            shards.send_for(job.model.block)
            dy, d_output = (host_head_backward if job.hidden_on_host else tiled_head_backward)(account, job, of_head)
        else:
            dy, d_output = head_backward(account, job, of_head)
            shards.send_for(job.model.block)
            account.free(hidden.pop())
        with account.during("norm backward", "loss"):
            shards.reduce(self.head, weights, [d_output])
        if job.hidden_on_host or (job.method == "upipe" and job.stash == "host"):
            # gradients of heads, in the place of outputs of equal size
            extra = 2 * job.model.kv_heads + (job.model.heads if job.query_tiles > 1 else 0)
            account.hold(job.heads(extra), "saved", host=True)
        if job.method == "fpdt":  # chunks that wait for one another
            account.hold(FPDTBytes(Account(), job).waiting(job.stash_of(job.model.layers - 1)), "saved", host=True)
        for index in reversed(range(job.model.layers)):
            name = self.names[index]
            with account.during(f"{name}.feed_forward backward", "block inputs"):
                following = blocks[index - 1] if index else self.embedding
                weights = shards.gather_backward(job.model.block, following)
            of_block = kept.pop()
            self._fetch_inputs(name, index, hidden)
            if job.checkpoint:
                y, of_block = self.block.forward(index, "second forward", of_block.attention)
                account.free(y)
            dy, gradients = self.block.backward(index, dy, of_block)
            self._free(hidden.pop())
            with account.during(f"{name} backward", "block inputs"):
                shards.reduce(job.model.block, weights, gradients)
        with account.during("tok_embeddings backward", "block inputs"):
            size = job.model.vocab * job.model.dim * job.element
            d_embedding = (
                host_embedding_backward(account, job) if job.hidden_on_host else account.hold(size, "gradients")
            )
            shards.reduce(self.embedding, [], [d_embedding])
        shards.finish()
        return dy
