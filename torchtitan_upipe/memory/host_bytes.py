"""What is held where hidden states are in host memory: read beside ``cp/host_block.py`` and ``cp/host_ends.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchtitan_upipe.job.shape import JobShape
from torchtitan_upipe.memory.account import Account, Block
from torchtitan_upipe.memory.block_bytes import Kept, flat, stages_bytes
from torchtitan_upipe.memory.projection_bytes import attention_weights
from torchtitan_upipe.memory.tiled_bytes import TiledBlockBytes, loss_tile
from torchtitan_upipe.stash.hidden import IN_FLIGHT


class HostBlockBytes(TiledBlockBytes):
    """The account of one block; its input, its output and their gradients are the caller's, on the host."""

    def first_run(self, index: int) -> tuple[Block, list[Block]]:
        """The only forward run, and what it leaves: the stash."""
        account, job, name = self.account, self.job, f"layers.{index}"
        with account.during(f"{name} forward", "attention stage"):
            kept = self._walk(("stages",), lambda layer: layer.attend_stages("host"))
            fetched = self._slice()
            y = account.hold(job.hidden, "block inputs", host=True)
            with account.during(f"{name} forward", "tiles"):
                self._project_out()
                half = [self.inner_tile] * 2
                account.brief(fetched, *[job.tile] * (3 + IN_FLIGHT), job.tile, *half)  # x, h, out; leaving; n
        account.retag("saved", *kept)
        if job.stash_of(index) == "none":
            account.free(*kept)
            kept = []
        return y, kept

    def forward(self, index: int, run: str = "forward", stash: Sequence[Block] = ()) -> tuple[Block, Kept]:
        """Without a stash attention runs again; nothing else does."""
        kept = Kept(attention=list(stash))
        if not stash:
            with self.account.during(f"layers.{index} backward", "attention stage"):
                kept.attention = self._walk(("stages",), lambda layer: layer.attend_stages("host"))
        return self.account.hold(0), kept

    def backward(self, index: int, dy: Block, kept: Kept) -> tuple[Block, list[Block]]:
        """From the gradient of the block's output to that of its input, in one place; the whole weights' gradients."""
        account, job, name = self.account, self.job, f"layers.{index}"
        weight = 3 * job.model.inner * job.model.dim
        with account.during(f"{name} backward", "tiles"):
            sums = account.hold(weight * job.wide, "gradients")
            self._project_out()
            held = [account.hold(size) for size in (self._slice(), *[job.tile] * (4 + IN_FLIGHT))]  # x, h, dy, dh
            account.brief(job.tile, *[self.inner_tile] * 5)
            account.brief(job.tile, *[self.wide_tile] * 6)
            account.free(*held)
            weights = [account.recast(sums, weight * job.element)]
        with account.during(f"{name} backward", "attention stage"):
            d_wo, *heads = self._walk(
                ("stages backward",), lambda layer: flat(layer.attend_stages_backward(kept.attention))
            )
            account.free(*heads, *(kept.attention if job.stash_of(index) == "none" else []))  # else buffers stay
        with account.during(f"{name} backward", "tiles"):
            sizes = attention_weights(job)
            stacked = account.hold(sum(sizes[:3]))
            projections = account.hold(sum(sizes[:3]) * job.wide / job.element, "gradients")
            all_heads = job.heads(job.model.heads + 2 * job.model.kv_heads, job.tile_rows)
            account.brief(all_heads, 2 * self._slice(), *[job.tile] * (2 + IN_FLIGHT))
            account.brief(self._slice(), *[job.tile] * (4 + IN_FLIGHT), job.tile, *[self.wide_tile] * 6)
            narrow = job.element < job.wide
            weights += [account.hold(size, "gradients") for size in sizes] if narrow else [projections, d_wo]
            account.free(stacked, *([projections, d_wo] if narrow else []))
        return dy, weights

    def _project_out(self) -> None:
        """All heads of a tile, for one product; a stage's of this one and of the next one from the host."""
        job = self.job
        self.account.brief(job.heads(job.model.heads, job.tile_rows), 2 * self._slice(), *[job.tile] * (2 + IN_FLIGHT))

    def _slice(self) -> int:
        """A stage's heads of a tile."""
        stage = stages_bytes(Account(), self.job).schedule.stages[0]
        return self.job.heads(len(stage.queries.distinct), self.job.tile_rows)

    def _layer(self, account: Account) -> Any:
        return stages_bytes(account, self.job)


def host_embedding(account: Account, job: JobShape) -> Block:
    """The embedding's output, on the host."""
    account.brief(*[job.tile] * (1 + IN_FLIGHT))
    return account.hold(job.hidden, "block inputs", host=True)


def host_embedding_backward(account: Account, job: JobShape) -> Block:
    """The gradient of the embedding's weight."""
    elements = job.model.vocab * job.model.dim
    total = account.hold(elements * job.wide, "gradients")
    account.brief(*[job.tile] * 2, job.tile * job.wide / job.element if job.element < job.wide else 0)
    return account.recast(total, elements * job.element)


def host_head_forward(account: Account, job: JobShape) -> list[Block]:
    """Final norm, logits, loss and all their gradients, tile by tile: the gradients are kept."""
    d_weight = job.model.vocab * job.model.dim * job.wide
    with account.during("output forward", "loss"):
        kept = [account.hold(job.hidden, "block inputs", host=True), account.hold(d_weight)]
        tiles = [account.hold(job.tile) for _ in range(3 + IN_FLIGHT)]  # h, the next one, dh; leaving
        loss_tile(account, job)
        account.free(*tiles)
    return kept


def host_head_backward(account: Account, job: JobShape, kept: Sequence[Block]) -> tuple[Block, Block]:
    """The gradient of the last block's output, on the host, and that of the output weight: scaled and rounded."""
    dy, d_weight = kept
    with account.during("loss backward", "loss"):
        widened = job.tile * job.wide / job.element
        account.brief(*[job.tile] * (2 + IN_FLIGHT), *[widened] * 2)
        rounded = account.hold(job.model.vocab * job.model.dim * job.element, "gradients")
        account.free(d_weight)
    return dy, rounded
