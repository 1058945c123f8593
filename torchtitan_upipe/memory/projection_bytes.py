"""What projections hold whatever the method: temporaries of RoPE and norm, and the weights' own sizes."""

from __future__ import annotations

from torchtitan_upipe.cp import rope
from torchtitan_upipe.job.shape import JobShape
from torchtitan_upipe.memory.account import Account


def transform_in_slices(account: Account, job: JobShape, size: int, norm: bool = False) -> None:
    """RoPE of ``size`` bytes of heads, ``rope.ROWS`` tokens at a time in float32; the gradient of a norm before it."""
    rows = min(rope.ROWS, job.tokens)
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


def attention_weights(job: JobShape, wide_output: bool = False) -> list[int]:
    """Bytes of ``wq, wk, wv, wo`` as they are computed with; the gradient of ``wo`` is summed in float32."""
    width, model = job.model.head_dim * job.model.dim, job.model
    elements = (job.element, job.element, job.element, job.wide if wide_output else job.element)
    return [
        width * n * e for n, e in zip((model.heads, model.kv_heads, model.kv_heads, model.heads), elements, strict=True)
    ]
