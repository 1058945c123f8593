"""What a block and the model's head hold, as autograd runs TorchTitan's modules: norm, feed-forward, sums, loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from torchtitan_upipe.cp.head_schedule import build_head_schedule
from torchtitan_upipe.job.shape import STASHING, JobShape
from torchtitan_upipe.memory.account import Account, Block
from torchtitan_upipe.memory.attention_bytes import UPipeBytes
from torchtitan_upipe.memory.fpdt_bytes import FPDTBytes
from torchtitan_upipe.memory.ulysses_bytes import UlyssesBytes


@dataclass
class Kept:
    """What the forward pass of one block keeps for its backward pass."""

    attention: list[Block] = field(default_factory=list)
    norms: list[Block] = field(default_factory=list)  # scales; the normalised states stand below
    normed: list[Block] = field(default_factory=list)  # inputs of attention and feed-forward
    feed_forward: list[Block] = field(default_factory=list)
    middle: list[Block] = field(default_factory=list)  # the sum after attention


def _layer_bytes(account: Account, job: JobShape) -> UPipeBytes | FPDTBytes | UlyssesBytes:
    """The account of the job's method."""
    match job.method:
        case "upipe":
            return stages_bytes(account, job)
        case "fpdt":
            return FPDTBytes(account, job)
        case _:
            return UlyssesBytes(account, job)


def stages_bytes(account: Account, job: JobShape) -> UPipeBytes:
    """The account of a stage loop: UPipe's, or of all heads in one stage."""
    chunk = job.head_chunk if job.method == "upipe" else job.model.heads
    schedule = build_head_schedule(job.model.heads, job.model.kv_heads, job.ulysses, chunk)
    return UPipeBytes(account, job, schedule)


@dataclass(frozen=True)
class _Walk:
    """A walk through an attention layer: the most it held above its start, and what it left."""

    peak: int
    at_peak: dict[str, int]
    left: list[Block]


Walks = dict[Any, _Walk]  # by the job, as far as attention depends on it, and by pass


def flat(results: tuple[Block, list[Block]]) -> list[Block]:
    """Both in one list."""
    return [results[0], *results[1]]


class BlockBytes:
    """The account of one Transformer block.

    Args:
        account: where everything is held.
        job: sizes and switches.
        walks: what attention layers held, of other jobs as well.
    """

    def __init__(self, account: Account, job: JobShape, walks: Walks) -> None:
        self.account = account
        self.job = job
        self.inner = job.rows * job.model.inner * job.element
        self._walks = walks
        self._attention = replace(
            job,
            tile_size=job.tile_size if job.hidden_on_host else 0,
            checkpoint=True,
            offload=False,
            stash="",
            stash_budget=0,
            shards=1,
            replicas=1,
            positions=False,
            state_on_host=False,
        )  # what a walk does not depend on

    def first_run(self, index: int) -> tuple[Block, list[Block]]:
        """The forward pass of a block that will run again: its output, and what outlives the run all the same."""
        account, job, name = self.account, self.job, f"layers.{index}"
        with account.during(f"{name}.attention_norm forward", "block inputs"):
            n, scale = account.hold(job.hidden), account.hold(4 * job.rows)
        account.free(scale)
        with account.during(f"{name}.attention forward", "attention stage"):
            y, stays = self.attention_forward(index, keep=False)
            account.retag("block inputs", y)
            account.retag("saved", *stays)
        account.free(n)
        with account.during(f"{name} forward", "block inputs"):
            h = account.hold(job.hidden)
            account.free(y)
        with account.during(f"{name}.ffn_norm forward", "block inputs"):
            n, scale = account.hold(job.hidden), account.hold(4 * job.rows)
        account.free(scale)
        with account.during(f"{name}.feed_forward forward", "tiles"):
            account.brief(self.inner, self.inner, self.inner)  # silu, w3 and their product
            out = account.hold(job.hidden, "block inputs")
        account.free(n)
        with account.during(f"{name} forward", "block inputs"):
            y = account.hold(job.hidden)
        account.free(out, h)
        return y, stays

    def forward(self, index: int, run: str = "forward", stash: Sequence[Block] = ()) -> tuple[Block, Kept]:
        """From the block's input, which the caller holds, to its output, with all that autograd keeps.

        Args:
            index: of the block.
            run: ``"forward"`` or ``"second forward"``, which ends with the last tensor to be kept.
            stash: of the first run.
        """
        account, job, kept, name = self.account, self.job, Kept(), f"layers.{index}"
        again = run != "forward"
        with account.during(f"{name}.attention_norm {run}", "block inputs"):
            kept.normed.append(account.hold(job.hidden))
            kept.norms.append(account.hold(4 * job.rows, "saved"))
        with account.during(f"{name}.attention {run}", "attention stage"):
            y, kept.attention = self.attention_forward(index, stash=stash)
            account.retag("block inputs", y)
            account.retag("saved", *kept.attention)
        with account.during(f"{name} {run}", "block inputs"):
            kept.middle.append(account.hold(job.hidden))
            account.free(y)
        with account.during(f"{name}.ffn_norm {run}", "block inputs"):
            kept.normed.append(account.hold(job.hidden))
            kept.norms.append(account.hold(4 * job.rows, "saved"))
        with account.during(f"{name}.feed_forward {run}", "tiles"):
            kept.feed_forward = [account.hold(self.inner) for _ in range(4)]  # w1, silu, w3, product
            account.retag("saved", *kept.feed_forward)
            out = account.hold(0 if again else job.hidden, "block inputs")
        with account.during(f"{name} {run}", "block inputs"):
            y = account.hold(0 if again else job.hidden)
            account.free(out)
        return y, kept

    def backward(self, index: int, dy: Block, kept: Kept) -> tuple[Block, list[Block]]:
        """From the gradient of the block's output to that of its input, and the whole weights' gradients."""
        account, job, name = self.account, self.job, f"layers.{index}"
        with account.during(f"{name}.feed_forward backward", "tiles"):
            dn, weights = self._feed_forward_backward(kept.feed_forward)
        with account.during(f"{name} backward", "block inputs"):
            dh = account.hold(job.hidden)
            account.free(dn)
            total = account.hold(job.hidden)
            account.free(dh, dy, kept.norms[1], kept.normed[1], *kept.middle)
        with account.during(f"{name}.attention backward", "attention stage"):
            dn, of_attention = self.attention_backward(kept.attention)
        with account.during(f"{name} backward", "block inputs"):
            dx = account.hold(job.hidden)
            account.free(dn)
            result = account.hold(job.hidden)
            account.free(dx, total, kept.norms[0], kept.normed[0])
        return result, [*weights, *of_attention]

    def attention_forward(
        self, index: int, keep: bool = True, stash: Sequence[Block] = ()
    ) -> tuple[Block, list[Block]]:
        """``y``, and what is kept for backward, ``stash`` included."""
        kind = self.job.stash_of(index)
        key = ("forward", kind, keep, bool(stash))
        if self.job.method in STASHING:  # what it keeps hangs on its context
            if stash:
                (y,) = self._walk(key, lambda layer: [layer.forward(kind, stash)[0]])
                return y, list(stash)
            y, *kept = self._walk(key, lambda layer: flat(layer.forward(kind)))
            return y, kept
        y, *kept = self._walk(key, lambda layer: flat(layer.forward(keep)))
        return y, kept

    def attention_backward(self, kept: Sequence[Block]) -> tuple[Block, list[Block]]:
        """The gradient of the layer's input, and the whole weights'; frees ``kept``."""
        copies = [Block(block.category, block.size, block.device) for block in kept]
        key = ("backward", tuple((block.size, block.device) for block in kept))
        freed = [block for block in kept if block.device]  # buffers on the host are used again
        dx, *weights = self._walk(key, lambda layer: flat(layer.backward(copies)), freed)
        return dx, weights

    def _walk(self, key: Any, walk: Callable[[Any], list[Block]], freed: Sequence[Block] = ()) -> list[Block]:
        """Walk through an attention layer on an account of its own, once for all layers, and take over what it left."""
        key = self._attention, *key
        if key not in self._walks:
            account = Account()
            with account.during("attention", "attention stage"):
                left = walk(self._layer(account))
            self._walks[key] = _Walk(account.peak, account.at_peak, left)
        found = self._walks[key]
        self.account.pass_by(found.peak, found.at_peak)
        self.account.free(*freed)
        return [self.account.hold(block.size, block.category, host=not block.device) for block in found.left]

    def _layer(self, account: Account) -> Any:
        return _layer_bytes(account, self.job)

    def _feed_forward_backward(self, kept: Sequence[Block]) -> tuple[Block, list[Block]]:
        account, hidden, inner = self.account, self.job.hidden, self.inner
        gate, activation, up, product = kept
        weight = self.job.model.inner * self.job.model.dim * self.job.element
        weights = [account.hold(weight, "gradients")]
        d_product = account.hold(inner)
        account.free(product)
        d_activation, d_up = account.hold(inner), account.hold(inner)
        account.free(d_product, activation, up)
        dn = account.hold(hidden, "block inputs")
        weights.append(account.hold(weight, "gradients"))
        account.free(d_up)
        d_gate = account.hold(inner)
        account.free(d_activation, gate)
        dn2 = account.hold(hidden, "block inputs")
        weights.append(account.hold(weight, "gradients"))
        account.free(d_gate)
        total = account.hold(hidden, "block inputs")
        account.free(dn, dn2)
        return total, weights


def head_forward(account: Account, job: JobShape) -> list[Block]:
    """Final norm, logits and loss: what is kept."""
    logits = job.rows * job.model.vocab
    with account.during("norm forward", "loss"):
        kept = [account.hold(job.hidden), account.hold(4 * job.rows)]
    with account.during("output forward", "loss"):
        narrow = account.hold(logits * job.element)
    with account.during("loss forward", "loss"):
        wide = account.hold(logits * 4) if job.element < 4 else narrow
        kept.append(account.hold(logits * 4))  # log-softmax
        account.free(wide)
        account.free(*([narrow] if wide is not narrow else []))
    return kept


def head_backward(account: Account, job: JobShape, kept: Sequence[Block]) -> tuple[Block, Block]:
    """The gradient of the last block's output, and that of the output weight."""
    logits, (normed, scale, log_p) = job.rows * job.model.vocab, kept
    with account.during("loss backward", "loss"):
        d_log_p, d_logits = account.hold(logits * 4), account.hold(logits * 4)
        account.free(d_log_p, log_p)
        if job.element < 4:
            narrow = account.hold(logits * job.element)
            account.free(d_logits)
            d_logits = narrow
    with account.during("output backward", "loss"):
        dn = account.hold(job.hidden)
        d_weight = account.hold(prod((job.model.vocab, job.model.dim)) * job.element, "gradients")
        account.free(d_logits, normed)
    with account.during("norm backward", "loss"):
        dy = account.hold(job.hidden, "block inputs")
        account.free(dn, scale)
    return dy, d_weight
