"""What a tiled block and a tiled head hold: read beside ``titan/tiled.py`` and ``tiled/``."""

from __future__ import annotations

from collections.abc import Sequence

from torchtitan_upipe.job.shape import JobShape
from torchtitan_upipe.memory.account import Account, Block
from torchtitan_upipe.memory.block_bytes import BlockBytes, Kept, Walks


class TiledBlockBytes(BlockBytes):
    """The account of one block whose norms and feed-forward work in tiles of rows."""

    def __init__(self, account: Account, job: JobShape, walks: Walks) -> None:
        super().__init__(account, job, walks)
        rows = min(job.tile_size, job.rows)
        self.tile = rows * job.model.dim * job.element
        self.wide_tile = rows * job.model.dim * job.wide
        self.inner_tile = rows * job.model.inner * job.element

    def first_run(self, index: int) -> tuple[Block, list[Block]]:
        """See :class:`~torchtitan_upipe.memory.block_bytes.BlockBytes`."""
        y, kept = self._run(index, "forward", keep=False)
        self.account.free(*kept.normed, *kept.middle)
        return y, kept.attention

    def forward(self, index: int, run: str = "forward", stash: Sequence[Block] = ()) -> tuple[Block, Kept]:
        """See :class:`~torchtitan_upipe.memory.block_bytes.BlockBytes`."""
        return self._run(index, run, keep=True, stash=stash)

    def _run(self, index: int, run: str, keep: bool, stash: Sequence[Block] = ()) -> tuple[Block, Kept]:
        account, job, kept, name = self.account, self.job, Kept(), f"layers.{index}"
        with account.during(f"{name} {run}", "block inputs"):
            kept.normed.append(account.hold(job.hidden))
            account.brief(self.tile, category="tiles")
        with account.during(f"{name}.attention {run}", "attention stage"):
            y, kept.attention = self.attention_forward(index, keep, stash)
            account.retag("block inputs", y)
            account.retag("saved", *kept.attention)
        with account.during(f"{name} {run}", "block inputs"):
            if not keep:
                account.free(kept.normed.pop())
            kept.middle.append(account.hold(job.hidden))
            account.free(y)
            if run != "forward":  # ends here, with the last tensor to be kept
                return account.hold(0), kept
            out = account.hold(job.hidden)
            account.brief(self.tile, self.inner_tile, self.inner_tile, category="tiles")
        return out, kept

    def backward(self, index: int, dy: Block, kept: Kept) -> tuple[Block, list[Block]]:
        """See :class:`~torchtitan_upipe.memory.block_bytes.BlockBytes`."""
        account, job, name = self.account, self.job, f"layers.{index}"
        weight = job.model.inner * job.model.dim
        with account.during(f"{name} backward", "tiles"):
            dh = account.hold(job.hidden, "block inputs")
            sums = [account.hold(3 * weight * job.wide, "gradients")]
            account.brief(self.tile, *[self.inner_tile] * 5)  # gate, up, activation; gradients of two of them
            account.brief(self.tile, *[self.wide_tile] * 6)  # norm
            weights = sums
            if job.element < 4:
                weights = [account.hold(3 * weight * job.element, "gradients")]
                account.free(*sums)
            account.free(dy, *kept.middle)
        with account.during(f"{name}.attention backward", "attention stage"):
            dn, of_attention = self.attention_backward(kept.attention)
        with account.during(f"{name} backward", "block inputs"):
            dx = account.hold(job.hidden)
            account.brief(*[self.wide_tile] * 6, category="tiles")
            account.free(dn)
            result = account.hold(job.hidden)
            account.free(dx, dh, *kept.normed)
        return result, [*weights, *of_attention]


def tiled_head_forward(account: Account, job: JobShape) -> list[Block]:
    """Final norm, logits, loss and all their gradients, tile by tile: the gradients are kept."""
    with account.during("output forward", "loss"):
        kept = [account.hold(job.hidden), account.hold(job.model.vocab * job.model.dim * job.wide)]
        loss_tile(account, job)
    return kept


def loss_tile(account: Account, job: JobShape) -> None:
    """A tile of norm, logits, loss and their gradients (``CrossEntropy.forward`` in ``tiled/loss.py``)."""
    model, wide = job.model, job.wide
    rows = min(job.rows, job.tile_size, max(1, job.tile_size * model.inner // model.vocab))
    n = account.hold(rows * model.dim * job.element)
    account.brief(*[rows * model.vocab * wide] * 2)  # widened logits, log-softmax
    account.brief(rows * model.vocab * wide, rows * model.vocab * job.element)  # and their gradient, rounded
    d_logits = account.hold(rows * model.vocab * job.element)
    account.brief(*[rows * model.dim * wide] * 6)
    account.free(n, d_logits)


def tiled_head_backward(account: Account, job: JobShape, kept: Sequence[Block]) -> tuple[Block, Block]:
    """The gradient of the last block's output, and that of the output weight: scaled and rounded."""
    dy, d_weight = kept
    with account.during("loss backward", "loss"):
        account.retag("block inputs", dy)
        rounded = account.hold(job.model.vocab * job.model.dim * job.element, "gradients")
        account.free(d_weight)
    return dy, rounded
