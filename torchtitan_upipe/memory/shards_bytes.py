"""What FSDP2 holds: shards of weights, gathered weights, buffers of gathering and reducing."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torchtitan_upipe.job.shape import JobShape, shard_elements
from torchtitan_upipe.memory.account import Account, Block

Shapes = Sequence[tuple[int, ...]]


class ShardsBytes:
    """The account of FSDP2 over the groups of weights of one model; of plain weights where there is one rank.

    A group's weights are gathered into one buffer, copied out, and used; the buffer stays until the next group has
    been copied out (forward), and the next group's buffer is filled ahead (backward).
    """

    def __init__(self, account: Account, job: JobShape) -> None:
        self.account = account
        self.job = job
        self._buffer: Block | None = None
        self._ahead: Block | None = None
        self._reducing: Block | None = None

    def gather_forward(self, shapes: Shapes) -> list[Block]:
        """The weights, before a group's forward."""
        if self.job.shards == 1:
            return []
        buffer = self.account.hold(self._whole(shapes, self.job.element), "communication")
        if self._buffer is not None:
            self.account.free(self._buffer)
        self._buffer = buffer
        return [self.account.hold(self._whole(shapes, self.job.element), "communication")]

    def gather_backward(self, shapes: Shapes, following: Shapes | None) -> list[Block]:
        """The weights, before a group's backward; those of the group that ``following`` needs are sent for."""
        if self.job.shards == 1:
            return []
        ahead = self._ahead or self.account.hold(self._whole(shapes, self.job.element), "communication")
        weights = [self.account.hold(self._whole(shapes, self.job.element), "communication")]
        self.account.free(ahead)
        self._ahead = None
        self.send_for(following)
        return weights

    def send_for(self, shapes: Shapes | None) -> None:
        """Begin to gather."""
        if shapes is not None and self.job.shards > 1:
            self._ahead = self.account.hold(self._whole(shapes, self.job.element), "communication")

    def reduce(self, shapes: Shapes, weights: Sequence[Block], gradients: Sequence[Block]) -> None:
        """After a group's backward: gradients to their owners."""
        account, job = self.account, self.job
        account.free(*weights)
        if job.shards == 1:
            return  # whole gradients stay
        if self._reducing is not None:
            account.free(self._reducing)
        self._reducing = account.hold(self._whole(shapes, job.reduced), "communication")
        account.free(*gradients)
        shard = account.hold(self.shard(shapes, job.reduced), "gradients")
        if job.reduced != job.stored:
            account.hold(self.shard(shapes, job.stored), "gradients")
            account.free(shard)

    def end_forward(self) -> None:
        """After the last group's forward: its buffer goes."""
        if self._buffer is not None:
            self.account.free(self._buffer)
            self._buffer = None

    def finish(self) -> None:
        """At the end of the backward pass."""
        for block in (self._ahead, self._reducing):
            if block is not None:
                self.account.free(block)
        self._ahead = self._reducing = None

    def shard(self, shapes: Shapes, element: int) -> int:
        """Bytes of this rank's shards."""
        return sum(shard_elements(shape, self.job.shards) for shape in shapes) * element

    def _whole(self, shapes: Shapes, element: int) -> int:
        return sum(prod(shape) for shape in shapes) * element
