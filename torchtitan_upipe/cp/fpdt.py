"""FPDT: the attention layer walked through in chunks of the sequence, all heads at once (arXiv 2408.16978, section 4).

Each rank holds a slice of every chunk, so that an exchanged chunk is a contiguous stretch of the sequence. What later
chunks need of a chunk waits in host memory; on the device are two chunks of keys and one of queries, and the one that
is on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchtitan_upipe.cp.attention import SequenceAttention
from torchtitan_upipe.cp.chunks import ChunkedLayer, sequence_chunks
from torchtitan_upipe.cp.collectives import HeadExchange
from torchtitan_upipe.cp.gradients import LayerGradients, project_out
from torchtitan_upipe.cp.head_schedule import build_head_schedule
from torchtitan_upipe.cp.stashing import StashingMethod
from torchtitan_upipe.cp.strategy import HeadTransform
from torchtitan_upipe.kernels.visibility import Documents
from torchtitan_upipe.stash.stash import KeptOnDevice, PutAway, Stash
from torchtitan_upipe.tiled.rows import DeviceRows, Rows


class FPDT(StashingMethod):
    """The method ``"fpdt"`` of one attention layer.

    Args:
        num_heads: ``H``.
        num_kv_heads: ``G``.
        exchange: all-to-alls of the context-parallel group.
        attention: names the kernel.
        new_stash: makes what keeps every chunk's ``o, lse`` until the backward pass has used them; None to compute
            them again there.
        put_away: where chunks of q, k, v and of their gradients wait for one another within a pass.
        sequence_chunk: tokens of a chunk of the whole sequence, a multiple of the ranks; 0 = all.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        exchange: HeadExchange,
        attention: SequenceAttention,
        new_stash: Callable[[], Stash] | None,
        put_away: PutAway,
        sequence_chunk: int,
    ) -> None:
        super().__init__(_FPDTLayer, exchange, attention, new_stash)
        self.schedule = build_head_schedule(num_heads, num_kv_heads, exchange.size, num_heads)
        self.put_away = put_away
        self.sequence_chunk = sequence_chunk

    def layer(
        self,
        x: Tensor,
        weights: Sequence[Tensor | None],
        transform: HeadTransform,
        head_dim: int,
        documents: Documents | None,
    ) -> ChunkedLayer:
        """This layer's chunks for tokens ``x [B, N, D]``; ``weights`` are the fields of ``AttentionWeights``."""
        whole = self.stage_layer(DeviceRows(x), weights, transform, head_dim, documents)
        chunks = sequence_chunks(x.shape[1], self.exchange.size, self.sequence_chunk)
        return ChunkedLayer(x, whole, self.schedule, chunks, self.put_away_of(len(chunks.slices)))

    def put_away_of(self, chunks: int) -> PutAway:
        """Where chunks wait for one another: a single one waits for none and stays."""
        return self.put_away if chunks > 1 else KeptOnDevice


class _FPDTLayer(torch.autograd.Function):
    """Forward and backward of the chunk loop. The tensors after ``x`` are the fields of ``AttentionWeights``."""

    @staticmethod
    def forward(
        ctx: Any,
        fpdt: FPDT,
        stash: Stash,
        fill: bool,
        transform: HeadTransform,
        head_dim: int,
        documents: Documents | None,
        x: Tensor,
        *weights: Tensor | None,
    ) -> Tensor:
        layer = fpdt.layer(x, weights, transform, head_dim, documents)
        slices, wo, y = layer.chunks.slices, layer.whole.weights.wo, torch.empty_like(x)
        ctx.save_for_backward(x, *weights)
        ctx.fpdt, ctx.stash, ctx.transform, ctx.head_dim, ctx.documents = fpdt, stash, transform, head_dim, documents
        if stash.complete:  # the block's second run
            for rows, part in project_out(stash, fpdt.schedule, slices, layer.whole.x, wo):
                y[:, rows] = part
                del part
            return y

        for i in range(len(slices)):
            # project and exchange: k, v, of which later chunks may need a copy, and q
            kv = layer.keys(i, keep=layer.is_seen_later(i))
            qs = layer.queries(i)

            # attention over this chunk and those before
            results = layer.attend(i, qs, kv)
            del qs

            # exchange back, stash
            chunk, outputs = layer.pair(i, i), Stash()
            for s, stage in enumerate(layer.stages):
                o, lse = results.pop(0)
                o = chunk.to_sequence(stage, layer.tile(i), o)  # [B, n, U, d]
                outputs.put((s, 0), o)
                if fill:
                    stash.put((s, i), o, lse)
                del o, lse

            # project out
            for rows, part in project_out(outputs, fpdt.schedule, [layer.tile(i)], chunk.x, wo):
                y[:, layer.rows(i)][:, rows] = part
                del part
            del outputs
        stash.settle()
        stash.complete = fill
        return y  # [B, N, D]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        x, *weights = ctx.saved_tensors
        fpdt: FPDT = ctx.fpdt
        layer = fpdt.layer(x, weights, ctx.transform, ctx.head_dim, ctx.documents)
        whole = layer.whole
        of_output, of_inputs = (LayerGradients(whole.x, whole.weights, ctx.head_dim, KeptOnDevice) for _ in range(2))

        # what attention's backward needs of each chunk, to where chunks wait
        for i in range(len(layer.chunks.slices)):
            _keep_chunk(layer, i, ctx.stash, DeviceRows(dy[:, layer.rows(i)]), of_output)
        d_weights = {"wo": of_output.weight("wo")}

        dx = torch.empty_like(x)
        for j in range(len(layer.chunks.slices)):
            # attention, of all queries that see chunk j
            kv, dqs = layer.attend_backward(j)

            # exchange back, undo rope and norm; projections
            chunk = layer.pair(j, j)
            total = of_inputs.of_rows(chunk.x)
            for stage in layer.stages:
                dq = chunk.to_sequence(stage, layer.tile(j), dqs.pop(0))  # [B, n, U, d]
                total.add_queries(chunk, stage, dq)
                del dq
                total.add_keys(chunk, stage, kv)
            dx[:, layer.rows(j)] = total.input()
            del total, kv

        d_weights |= {name: of_inputs.weight(name) for name in vars(whole.weights) if name != "wo"}
        return None, None, None, None, None, None, dx, *(d_weights[name] for name in vars(whole.weights))


def _keep_chunk(layer: ChunkedLayer, index: int, stash: Stash, dy: Rows, total: LayerGradients) -> None:
    """Make, and put away, q, k, v, o, lse and do of a chunk; add its share of ``dWo``.

    Args:
        stash: has o and lse; where it has not, attention is computed again.
        dy: ``[B, n, D]``, of the chunk's tokens.
        total: collects.
    """
    chunk, tile = layer.pair(index, index), layer.tile(index)
    kv = layer.keys(index, keep=True)
    qs = layer.queries(index)
    stashed = [stash.take((s, index)) for s in range(len(layer.stages))]
    again = layer.attend(index, qs, kv) if None in stashed else []
    kv.clear()
    for s, stage in enumerate(layer.stages):
        kept = stashed.pop(0)
        stash.fetch((s, index + 1))
        if kept is None:
            o, lse = again.pop(0)
            o_tokens = chunk.to_sequence(stage, tile, o)  # [B, n, U, d]
        else:
            o_tokens, lse = kept
            o = chunk.to_heads(stage, tile, o_tokens)  # [B, Sq, u, d]
        total.add_output(stage.queries.distinct, o_tokens, dy, slice(*tile))
        del kept, o_tokens
        layer.keep_queries(index, s, qs.pop(0), chunk.output_gradient(stage, tile, dy), o, lse)
