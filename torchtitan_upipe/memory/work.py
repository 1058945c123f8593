"""What one rank does in one training step: FLOPs, bytes moved, kernel calls; counted, not timed.

A step is two passes, forward and backward; the second run of a checkpointed block belongs to the backward pass.
``attention_work.py`` counts attention layers, this file the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from torchtitan_upipe.job.shape import JobShape, own_elements

NORM = 20  # bytes read and written per element of a norm: float32 inside, squares, product
RESIDUAL = 6  # of a sum of two
GLU = 10  # of silu(gate) * up
GLU_BACKWARD = 22  # of its gradients
LOSS = 40  # of an element of the logits: float32 copy, log-softmax, gradients of both
OPTIMIZER = 7 * 4  # of a parameter: AdamW reads four and writes three


@dataclass
class Work:
    """One pass of one rank.

    Attributes:
        attention: FLOPs of attention kernels, forward.
        attention_backward: FLOPs of attention kernels, backward: 2.5 times those of the forward pass.
        products: FLOPs of matrix products.
        moved: bytes that other kernels read and write in device memory.
        exchanged: bytes a rank sends in all-to-alls, which wait.
        ringed: bytes a rank sends round its ring while it computes.
        ring_waited: bytes a rank sends round its ring while it waits: none in this project's methods.
        sharded: bytes a rank receives and sends in FSDP2's gathers and reduces while it computes.
        host: bytes to and from host memory while it computes.
        host_waited: bytes from host memory for which it waits.
        calls: kernel calls whose number depends on the settings.
    """

    attention: float = 0.0
    attention_backward: float = 0.0
    products: float = 0.0
    moved: float = 0.0
    exchanged: float = 0.0
    ringed: float = 0.0
    ring_waited: float = 0.0
    sharded: float = 0.0
    host: float = 0.0
    host_waited: float = 0.0
    calls: float = 0.0

    def add(self, other: Work, times: float = 1) -> None:
        """Count ``other`` as well, ``times`` times."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + times * getattr(other, item.name))


@dataclass
class StepWork:
    """Both passes of a step."""

    forward: Work = field(default_factory=Work)
    backward: Work = field(default_factory=Work)

    def add(self, other: StepWork, times: float = 1) -> None:
        """Count ``other`` as well, ``times`` times."""
        self.forward.add(other.forward, times)
        self.backward.add(other.backward, times)


def feed_forward_work(job: JobShape) -> StepWork:
    """Norms, feed-forward and residual sums of one block.

    In tiles, and in the second run of a checkpointed block, gate and up are computed again.
    """
    rows, dim, inner = job.rows, job.model.dim, job.model.inner
    once = 2 * rows * dim * inner
    again = job.checkpoint or job.tile_size > 0
    thin, tiles = rows * dim * (2 * NORM + 2 * RESIDUAL), -(-rows // job.tile_size) if job.tile_size else 1
    forward = Work(products=3 * once, moved=thin + rows * inner * GLU, calls=10 * tiles)
    backward = Work(products=6 * once, moved=2 * thin + rows * inner * GLU_BACKWARD, calls=30 * tiles)
    if again:
        backward.add(Work(products=2 * once, moved=thin + rows * inner * GLU, calls=10 * tiles))
    if job.tile_size:  # the weights' gradients are summed in float32
        backward.moved += tiles * 3 * dim * inner * 3 * job.wide
    return StepWork(forward, backward)


def ends_work(job: JobShape) -> StepWork:
    """Embedding, final norm, logits and loss; the optimizer's step."""
    rows, model = job.rows, job.model
    logits = rows * model.vocab
    tiles = -(-rows // job.tile_size) if job.tile_size else 1
    head = Work(products=2 * logits * model.dim, moved=logits * LOSS / 2 + rows * model.dim * NORM, calls=20 * tiles)
    backward = Work(products=4 * logits * model.dim, moved=logits * LOSS / 2 + 2 * rows * model.dim * NORM)
    if job.tile_size:
        backward.moved += tiles * model.vocab * model.dim * 3 * job.wide
    state = OPTIMIZER * job.own_elements
    if job.state_on_host:  # where AdamW is taken to be as fast as the link
        backward.host_waited += state
    else:
        backward.moved += state
    return StepWork(head, backward)


def sharding_work(job: JobShape) -> StepWork:
    """FSDP2: all weights are gathered for each pass; the backward pass reduces their gradients."""
    if not job.fsdp:
        return StepWork()
    there = own_elements(job.weights, 1) * (job.shards - 1) / job.shards
    own = job.stored * job.own_elements if job.state_on_host else 0
    forward = Work(sharded=there * job.element, host=own)
    return StepWork(forward, Work(sharded=there * (job.element + job.reduced), host=2 * own))  # weights; gradients


def offload_work(job: JobShape) -> StepWork:
    """The block inputs' way to host memory and back."""
    moved = Work(host=job.hidden * job.model.layers) if job.offload else Work()
    return StepWork(moved, moved)
