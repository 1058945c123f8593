"""What projections hold whatever the method: temporaries of RoPE and norm, and the weights' own sizes."""

from __future__ import annotations

from torchtitan_upipe.job.shape import JobShape
from torchtitan_upipe.memory.account import Account
from torchtitan_upipe.tiled.tiles import slice_size


def transform_in_slices(account: Account, job: JobShape, size: int, norm: bool = False) -> None:
    """RoPE of ``size`` bytes of heads, a slice of the tokens at a time in float32; the gradient of a norm before it."""
    rows = slice_size(job.tokens)
    wide = size * job.wide / job.element * rows / job.tokens
    copies = wide if job.element < job.wide else 0
    angles = (job.batch if job.positions else 1) * rows * job.model.head_dim // 2  # of [B or 1, rows]
    at_angles: float = angles * (2 * 8 + 4)
    at_rotation = angles * 3 * 4 + 2 * wide
    if job.tokens > rows:  # of the slice before: the heads and what they became, its cosines and sines
        at_angles += copies + wide + angles * 2 * 4
        at_rotation += wide
    account.brief(copies, max(at_angles, at_rotation))
    if norm:
        account.brief(copies, copies, wide, wide)  # heads, gradient; normed again, gradient of the heads


def attention_weights(job: JobShape) -> list[int]:
    """Bytes of ``wq, wk, wv, wo`` as they are computed with."""
    width, model = job.model.head_dim * job.model.dim * job.element, job.model
    return [width * heads for heads in (model.heads, model.kv_heads, model.kv_heads, model.heads)]
