"""Attention of this rank's heads over the sequence: on one rank, where all keys are at hand.

``ring.py`` is the other implementation of the contract, where the keys are spread over a ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchtitan_upipe.kernels.contract import AttentionKernel
from torchtitan_upipe.kernels.launches import LARGEST
from torchtitan_upipe.kernels.pieces import attend, attend_backward
from torchtitan_upipe.kernels.visibility import Documents, Interval, Known, Piece, Tokens, visible_pieces


class SequenceAttention(Protocol):
    """Causal attention of some query rows over all tokens of the sequence, within documents if there are any.

    ``q [B, Sq, h, d]`` are the rows ``rows`` (disjoint, rising) of the ``T`` tokens that this rank's group has
    gathered; ``k, v [B, T, g, d]`` are all of them. ``out``, ``lse`` and the gradients are those of
    :class:`~torchtitan_upipe.kernels.contract.AttentionKernel`.
    """

    kernel: AttentionKernel

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, rows: Sequence[Interval], documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        """``out [B, Sq, h, d]`` in the dtype of ``q``, ``lse [B, h, Sq]``."""

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        scale: float,
        rows: Sequence[Interval],
        documents: Documents | None,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``dq [B, Sq, h, d]``, ``dk [B, T, g, d]``, ``dv [B, T, g, d]``; float32 where they are sums.

        ``dk`` and ``dv`` are added to the float32 tensors ``into``, if there are any.
        """


class LocalAttention:
    """:class:`SequenceAttention` where the group's ``T`` tokens are the whole sequence, or of two chunks of it.

    Args:
        kernel: the kernel.
        key_tiles: backward calls it for at most this share of the keys before the diagonal.
        chunks: positions of the queries' chunk, whose rows are counted from its start, and of the keys'; by default
            both are the whole sequence. A query that sees none of the keys has ``out`` zero and ``lse`` minus infinity.
    """

    def __init__(
        self, kernel: AttentionKernel, key_tiles: int = 1, chunks: tuple[Interval, Interval] | None = None
    ) -> None:
        self.kernel = kernel
        self.key_tiles = key_tiles
        self.chunks = chunks

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, rows: Sequence[Interval], documents: Documents | None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`SequenceAttention`."""
        queries, keys = self._tokens(rows, k.shape[1])
        parts = [
            attend(self.kernel, q[b], k[b], v[b], pieces, scale=scale)
            for b, pieces in by_sequence(queries, keys, documents, q)
        ]
        return _join(parts)  # type: ignore[return-value]

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        scale: float,
        rows: Sequence[Interval],
        documents: Documents | None,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`SequenceAttention`."""
        queries, keys = self._tokens(rows, k.shape[1])
        parts = [
            attend_backward(
                self.kernel,
                dout[b],
                q[b],
                k[b],
                v[b],
                out[b],
                lse[b],
                pieces,
                scale=scale,
                into=None if into is None else (into[0][b], into[1][b]),
                max_keys=None if self.key_tiles == 1 else -(-k.shape[1] // self.key_tiles),
            )
            for b, pieces in by_sequence(queries, keys, documents, q)
        ]
        if into is None:
            return _join(parts)  # type: ignore[return-value]
        return _join([part[:1] for part in parts])[0], *into

    def _tokens(self, rows: Sequence[Interval], length: int) -> tuple[Tokens, Tokens]:
        """Positions of the query rows and of the ``length`` keys."""
        queries, keys = self.chunks or ((0, length), (0, length))
        return Tokens((queries,)).rows(rows), Tokens((keys,))


def by_sequence(
    queries: Tokens, keys: Tokens, documents: Documents | None, q: Tensor
) -> list[tuple[slice, Known[Piece]]]:
    """What queries see of keys, for all sequences of the batch at once or for each of them.

    For each with documents, and where ``q [B, Sq, h, d]`` is too large for one launch: in a batch FlashAttention-2's
    backward counts elements in 32 bits (torch 2.11, flash-attn 2.8.3; mended in torch 2.13), in one sequence it does
    not.
    """
    if documents is not None:
        return [(slice(b, b + 1), documents.visible(b, queries, keys)) for b in range(len(documents.starts))]
    pieces = visible_pieces(queries, keys)
    if len(keys) * q.shape[0] * q.shape[2] * q.shape[3] <= LARGEST:
        return [(slice(None), pieces)]
    return [(slice(b, b + 1), pieces) for b in range(q.shape[0])]


def _join(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return parts[0] if len(parts) == 1 else tuple(torch.cat(column) for column in zip(*parts, strict=True))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, attention: SequenceAttention, options: dict[str, Any], q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        out, lse = attention.forward(q, k, v, **options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.attention, ctx.options = attention, options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        d_qkv = ctx.attention.backward(grads[0], *inputs, **ctx.options)
        return None, None, *(d.to(t.dtype) for d, t in zip(d_qkv, inputs, strict=False))


def differentiable_attention(attention: SequenceAttention, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """``attention.forward(q, k, v, **options)`` as an ordinary autograd operation; returns ``out [B, Sq, h, d]``."""
    return _Attention.apply(attention, options, q, k, v)
