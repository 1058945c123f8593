"""TorchTitan's model with its hidden states in host memory (``cp/host_block.py``, ``cp/host_ends.py``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_upipe.cp.host_block import BlockWeights, HostBlock
from torchtitan_upipe.cp.host_ends import host_cross_entropy, host_embedding
from torchtitan_upipe.cp.upipe import UPipe
from torchtitan_upipe.stash.hidden import HiddenStates
from torchtitan_upipe.stash.stash import Stash
from torchtitan_upipe.tiled.loss import CrossEntropy, tiled_scores
from torchtitan_upipe.titan.attention import ContextParallelAttention
from torchtitan_upipe.titan.tiled import TiledBlock, TiledOutput, Unnormalised, epsilon, tile_model


def hide_states(
    model: nn.Module, hidden: HiddenStates, new_stash: Callable[[], Stash], keeps: Sequence[bool], tile_size: int
) -> None:
    """Put what works on rows in host memory in the place of a model's embedding, blocks, final norm and output.

    Args:
        model: TorchTitan's, with the plugin's attention, before it is sharded.
        hidden: where the rows are.
        new_stash: makes a stash in host memory.
        keeps: for each block, whether it keeps its stash from forward to backward.
        tile_size: rows on the device at once.
    """
    kept, embedding = iter(keeps), cast(Any, model.tok_embeddings)
    tile_model(
        model,
        tile_size,
        lambda block, size: HostBlockOfModel(block, size, hidden, new_stash, next(kept)),
        lambda output, size: HostOutput(output, size, hidden),
    )
    model.tok_embeddings = HostEmbedding(embedding, hidden)


def tiles_of(module: nn.Module, output: Tensor) -> Iterator[Tensor]:
    """What ``module``, an embedding or a block, has put out: ``[B, rows, D]`` on the device, one after another."""
    if not isinstance(module, (HostEmbedding, HostBlockOfModel)):
        return iter([output])
    rows = module.hidden.of(output)
    return rows.read(rows.parts())


class HostEmbedding(nn.Embedding):
    """The model's embedding; its weight is taken over."""

    def __init__(self, embedding: nn.Embedding, hidden: HiddenStates) -> None:
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, device="meta")
        self.weight = embedding.weight
        self.hidden = hidden

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens [B, N]`` to a handle of ``[B, N, D]``."""
        return host_embedding(self.hidden, tokens, self.weight)


class HostBlockOfModel(TiledBlock):
    """Stands in the place of a block as :class:`TiledBlock` does; takes and gives handles.

    Args:
        block: with the plugin's attention.
        tile_size: rows on the device at once.
        hidden: where the rows are.
        new_stash: makes a stash in host memory.
        keeps: whether it is kept from forward to backward.
    """

    def __init__(
        self, block: nn.Module, tile_size: int, hidden: HiddenStates, new_stash: Callable[[], Stash], keeps: bool
    ) -> None:
        super().__init__(block, tile_size)
        attention = self.attention
        assert isinstance(attention, ContextParallelAttention)
        assert isinstance(attention.method, UPipe)
        self.hidden = hidden
        eps = epsilon(self.attention_norm), epsilon(self.ffn_norm)
        self._block = HostBlock(attention.method, hidden, new_stash, keeps, eps)

    def forward(
        self, x: Tensor, rope_table: Tensor, attention_masks: object | None, positions: Tensor | None = None
    ) -> Tensor:
        """A handle of ``[B, N, D]`` to another, with TorchTitan's signature."""
        attention: Any = self.attention
        attention_weights, transform, documents = attention.prepare(x, attention_masks, positions)
        w1, w2, w3 = (linear.weight for linear in self._linears())
        weights = BlockWeights(self.attention_norm.weight, attention_weights, self.ffn_norm.weight, w1, w2, w3)
        return self._block(x, weights, transform, attention.head_dim, documents)


class HostOutput(TiledOutput):
    """:class:`TiledOutput` on a handle."""

    def __init__(self, output: nn.Linear, tile_size: int, hidden: HiddenStates) -> None:
        super().__init__(output, tile_size)
        self._hidden = hidden

    def loss(self, state: Unnormalised, labels: Tensor) -> Tensor:
        """See :class:`TiledOutput`."""
        return host_cross_entropy(
            self._hidden,
            state.h,
            labels,
            state.norm_weight,
            self.weight,
            eps=state.eps,
            tile_size=self.tile_size,
        )

    def scores(self, state: Unnormalised, labels: Tensor) -> Tensor:
        """See :class:`TiledOutput`."""
        rows = self._hidden.of(state.h)
        parts = rows.parts()
        head = CrossEntropy(state.eps, state.norm_weight, self.weight)
        return tiled_scores(head, zip(parts, rows.read(parts), strict=True), labels, self.tile_size)

    def logits(self, state: Unnormalised) -> Tensor:
        """All logits ``[B, N, V]`` on the device."""
        (h,) = self._hidden.of(state.h).read([slice(0, state.h.shape[1])])
        return F.linear(F.rms_norm(h, state.norm_weight.shape, state.norm_weight, state.eps), self.weight)
