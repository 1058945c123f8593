"""UPipe: the attention layer walked through in chunks of heads (Untied Ulysses, arXiv 2602.21196, section 3).

One stage handles ``U`` query heads of the whole group: it projects them, exchanges, attends and exchanges back. Memory
grows with the chunk, not with the heads. Backward walks the same stages. Within a stage the queries may be walked
through in tiles, against the same keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchtitan_upipe.cp.attention import SequenceAttention
from torchtitan_upipe.cp.collectives import HeadExchange
from torchtitan_upipe.cp.gradients import LayerGradients, project_out
from torchtitan_upipe.cp.head_schedule import HeadSchedule
from torchtitan_upipe.cp.segments import query_tiles
from torchtitan_upipe.cp.stage import KVBlock, StageLayer
from torchtitan_upipe.cp.stashing import StashingMethod
from torchtitan_upipe.cp.strategy import HeadTransform
from torchtitan_upipe.kernels.visibility import Documents, Interval
from torchtitan_upipe.stash.stash import Stash
from torchtitan_upipe.tiled.rows import DeviceRows, Rows


class UPipe(StashingMethod):
    """The method ``"upipe"`` of one attention layer.

    Args:
        schedule: which heads in which stage; ``schedule.degree`` must be ``exchange.size``.
        exchange: all-to-alls of the context-parallel group.
        attention: of this rank's heads over the sequence.
        new_stash: makes what keeps every stage's ``o, lse`` until the backward pass has used them; None to compute
            them again there.
        tiles: slices of the queries in each stage.
    """

    def __init__(
        self,
        schedule: HeadSchedule,
        exchange: HeadExchange,
        attention: SequenceAttention,
        new_stash: Callable[[], Stash] | None,
        tiles: int = 1,
    ) -> None:
        super().__init__(_UPipeLayer, exchange, attention, new_stash)
        self.schedule = schedule
        self.tiles = tiles

    def attend(self, layer: StageLayer, outputs: Stash) -> None:
        """The stages' forward pass: every stage's ``o, lse`` to ``outputs``."""
        kv: dict[int, KVBlock] = {}
        for index, stage in enumerate(self.schedule.stages):
            # project and exchange: k, v of a new KV set
            if any(stage.fetch.counts):
                kv[index] = layer.fetch_kv(stage)

            for t, tile in enumerate(self.query_tiles(layer)):
                # project and exchange: q
                q = layer.queries(stage, tile)[0]  # [B, Sq, u, d]

                # attention over the whole sequence
                o, lse = layer.attend(stage, tile, q, kv)
                del q

                # exchange back, stash
                o = layer.to_sequence(stage, tile, o)  # [B, n, U, d]
                outputs.put((index, t), o, lse)
                del o, lse

            for block in stage.leave[self.exchange.rank]:
                del kv[block]
        outputs.settle()
        outputs.complete = True

    def project_out(self, layer: StageLayer, outputs: Stash) -> Iterator[tuple[slice, Tensor]]:
        """All stages' heads to the layer's output: rows, and ``y [B, rows, D]`` for them."""
        return project_out(outputs, self.schedule, self.query_tiles(layer), layer.x, layer.weights.wo)

    def attend_backward(self, layer: StageLayer, stash: Stash, dy: Rows, total: LayerGradients) -> None:
        """The stages' backward pass, from ``dy [B, N, D]``: gradients of all heads to ``total``.

        Args:
            stash: is emptied; what it has not is computed again.
        """
        tiles = self.query_tiles(layer)
        kv: dict[int, KVBlock] = {}

        for index, stage in enumerate(self.schedule.stages):
            heads = stage.queries.distinct

            # k, v of a new KV set, again
            if any(stage.fetch.counts):
                kv[index] = layer.fetch_kv(stage)

            parts = []
            for t, tile in enumerate(tiles):
                rows = slice(*tile)
                # o and lse: from the stash, or attention again
                stashed = stash.take((index, t))
                if stashed is not None:
                    o_tokens, lse = stashed  # [B, n, U, d], [B, u, Sq]
                    o = layer.to_heads(stage, tile, o_tokens)  # [B, Sq, u, d]
                    q, projected = None, None
                else:
                    q, projected = layer.queries(stage, tile)
                    o, lse = layer.attend(stage, tile, q, kv)
                    o_tokens = layer.to_sequence(stage, tile, o)

                # output projection
                total.add_output(heads, o_tokens, dy, rows)
                del stashed, o_tokens
                do = layer.output_gradient(stage, tile, dy)  # [B, Sq, u, d]

                # attention
                if q is None:
                    q, projected = layer.queries(stage, tile)
                total.settle()
                dq_heads = layer.attend_backward(stage, tile, do, q, kv, o, lse)
                del do, q, o, lse
                stash.fetch((index, t + 1) if t + 1 < len(tiles) else (index + 1, 0))

                # exchange back, undo rope and norm
                dq = layer.to_sequence(stage, tile, dq_heads)  # [B, n, U, d]
                del dq_heads
                dq, d_norm = layer.transform.vjp_(dq, projected, layer.weights.q_norm, rows)
                total.add_norm("q_norm", d_norm)
                parts.append(dq)
                del dq, projected

            # gradients of the queries' heads
            dq = parts.pop() if len(parts) == 1 else torch.cat(parts, dim=1)  # [B, N, U, d]
            parts.clear()
            total.add_projection("wq", heads, dq)
            del dq

            # of the keys' and values', at the end of a KV set, one at a time
            total.add_keys(layer, stage, kv)

    def query_tiles(self, layer: StageLayer) -> list[Interval]:
        """The slices of ``layer``'s queries in each stage."""
        return query_tiles(layer.x.shape[1], self.tiles)


class _UPipeLayer(torch.autograd.Function):
    """The layer of tokens on the device. The tensors after ``x`` are the fields of ``AttentionWeights``."""

    @staticmethod
    def forward(
        ctx: Any,
        upipe: UPipe,
        stash: Stash,
        fill: bool,
        transform: HeadTransform,
        head_dim: int,
        documents: Documents | None,
        x: Tensor,
        *weights: Tensor | None,
    ) -> Tensor:
        layer = upipe.stage_layer(DeviceRows(x), weights, transform, head_dim, documents)
        outputs = stash if fill else Stash()
        if not outputs.complete:  # else the block's second run
            upipe.attend(layer, outputs)
        ctx.save_for_backward(x, *weights)
        ctx.upipe, ctx.stash, ctx.transform, ctx.head_dim, ctx.documents = upipe, stash, transform, head_dim, documents
        y = torch.empty_like(x)
        for rows, part in upipe.project_out(layer, outputs):
            y[:, rows] = part
            del part
        return y  # [B, N, D]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        layer = ctx.upipe.stage_layer(DeviceRows(x), weights, ctx.transform, ctx.head_dim, ctx.documents)
        total = LayerGradients(layer.x, layer.weights, ctx.head_dim, ctx.stash.put_away)
        ctx.upipe.attend_backward(layer, ctx.stash, DeviceRows(grads[0]), total)
        dx = total.input()
        return None, None, None, None, None, None, dx, *(total.weight(name) for name in vars(layer.weights))
