"""What FSDP2 holds: shards of weights, gathered weights, buffers of gathering and reducing."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torchtitan_upipe.job.shape import JobShape, shard_elements
from torchtitan_upipe.memory.account import Account, Block

Shapes = Sequence[tuple[int, ...]]


class ShardsBytes:
    """The account of FSDP2 over the groups of weights of one model; of plain weights where there is none.

    A group's weights are gathered into one buffer, copied out, and used; the buffer stays until the next group has
    been copied out (forward), and the next group's buffer is filled ahead (backward). On a mesh of one nothing is sent:
    each weight is copied from the host, rounded, and copied out.
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
            return self._copy_in(shapes)
        buffer = self._gather(shapes)
        if self._buffer is not None:
            self.account.free(self._buffer)
        self._buffer = buffer
        return [self.account.hold(self._whole(shapes, self.job.element), "communication")]

    def gather_backward(self, shapes: Shapes, following: Shapes | None) -> list[Block]:
        """The weights, before a group's backward; those of the group that ``following`` needs are sent for."""
        if self.job.shards == 1:
            return self._copy_in(shapes)
        ahead = self._ahead or self._gather(shapes)
        weights = [self.account.hold(self._whole(shapes, self.job.element), "communication")]
        self.account.free(ahead)
        self._ahead = None
        self.send_for(following)
        return weights

    def send_for(self, shapes: Shapes | None) -> None:
        """Begin to gather."""
        if shapes is not None and self.job.shards > 1:
            self._ahead = self._gather(shapes)

    def reduce(self, shapes: Shapes, weights: Sequence[Block], gradients: Sequence[Block]) -> None:
        """After a group's backward: gradients to their owners, or to the host."""
        account, job = self.account, self.job
        account.free(*weights)
        if not job.fsdp:
            return  # whole gradients stay
        if self._reducing is not None:
            account.free(self._reducing)
        self._reducing = account.hold(self._whole(shapes, job.reduced), "communication")
        account.free(*gradients)
        shard = account.hold(self.shard(shapes, job.reduced), "gradients")
        if job.shards == 1:  # divided by 1, out of place
            account.brief(self._whole(shapes, job.reduced), category="communication")
        if job.reduced != job.stored:
            stored = account.hold(self.shard(shapes, job.stored), "gradients")
            account.free(shard)
            shard = stored
        if job.state_on_host:
            account.hold(shard.size, "gradients", host=True)
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

    def _gather(self, shapes: Shapes) -> Block:
        """The buffer of a group's weights; what is sent comes from the host first, if it is there."""
        sent = [self._from_host(shape) for shape in shapes] if self.job.state_on_host else []
        buffer = self.account.hold(self._whole(shapes, self.job.element), "communication")
        self.account.free(*sent)
        return buffer

    def _copy_in(self, shapes: Shapes) -> list[Block]:
        """The weights on a mesh of one."""
        if not self.job.fsdp:
            return []
        weights, before = [], self.account.hold(0, "communication")
        for shape in shapes:
            copy = self._from_host(shape)
            self.account.free(before)
            weights.append(self.account.hold(self._whole([shape], self.job.element), "communication"))
            before = copy
        self.account.free(before)
        return weights

    def _from_host(self, shape: tuple[int, ...]) -> Block:
        """This rank's rows of a weight on the device, rounded to the dtype in which it is used."""
        copy = self.account.hold(self.shard([shape], self.job.stored), "communication")
        return self.account.recast(copy, self.shard([shape], self.job.element))

    def _whole(self, shapes: Shapes, element: int) -> int:
        return sum(prod(shape) for shape in shapes) * element
