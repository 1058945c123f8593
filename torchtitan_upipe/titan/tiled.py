"""TorchTitan's block and head with everything that works row by row in tiles (``tiled/``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_upipe.tiled.loss import CrossEntropy, tiled_cross_entropy, tiled_scores
from torchtitan_upipe.tiled.mlp import tiled_feed_forward
from torchtitan_upipe.tiled.norm import tiled_rms_norm
from torchtitan_upipe.tiled.tiles import as_in_products


def tile_model(
    model: nn.Module,
    tile_size: int,
    new_block: Callable[[nn.Module, int], nn.Module] | None = None,
    new_output: Callable[[nn.Linear, int], nn.Module] | None = None,
) -> None:
    """Put tiled modules in the place of a Llama3's or Qwen3's blocks, final norm and output, before they are sharded.

    A tile of the loss takes fewer rows where the vocabulary is wider than the feed-forward: as many as make its logits
    as large as one inner tensor of a feed-forward tile.

    Args:
        model: TorchTitan's model.
        tile_size: rows per tile of the norms and the feed-forward.
        new_block: from a block and its tile size, first to last, to what stands in its place; :class:`TiledBlock`.
        new_output: the same of the output; :class:`TiledOutput`.
    """
    blocks: Any = model.layers
    norm: Any = model.norm
    output: Any = model.output
    for name, block in list(blocks.items()):
        blocks[name] = (new_block or TiledBlock)(block, tile_size)
    inner = block.feed_forward.w1.out_features
    model.norm = HandedOnNorm(norm)
    tile_of_loss = min(tile_size, max(1, tile_size * inner // output.out_features))
    model.output = (new_output or TiledOutput)(output, tile_of_loss)


def summed_loss(
    model: nn.Module, loss_function: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, labels: Tensor, **kwargs: Any
) -> Tensor:
    """The loss of ``inputs [B, N]`` summed over tokens: in tiles by a tiled model, else by ``loss_function``."""
    output = model.output
    if not isinstance(output, TiledOutput):
        return loss_function(model(inputs, **kwargs), labels)
    with output.given(labels):
        return model(inputs, **kwargs)


class TiledBlock(nn.Module):
    """Stands in the place of TorchTitan's ``TransformerBlock``: same children, same names, same initial weights.

    Norms and feed-forward work in tiles with a backward of their own. They take the weights of the children, which do
    not run themselves; FSDP2 gathers and reduces per block, so that tiles cost no communication.

    Args:
        block: a dense Llama3 or Qwen3 block; its children are taken over.
        tile_size: rows per tile.
    """

    def __init__(self, block: nn.Module, tile_size: int) -> None:
        super().__init__()
        self.attention: nn.Module = block.attention  # type: ignore[assignment]
        self.feed_forward: Any = block.feed_forward
        self.attention_norm: nn.RMSNorm = block.attention_norm  # type: ignore[assignment]
        self.ffn_norm: nn.RMSNorm = block.ffn_norm  # type: ignore[assignment]
        self.tile_size = tile_size
        self.moe_enabled = False  # TorchTitan asks
        self.weight_init_std = block.weight_init_std
        self._titan_class: Any = type(block)

    def init_weights(self, *args: Any) -> None:
        """TorchTitan's own initialisation of this block."""
        self._titan_class.init_weights(self, *args)

    def forward(
        self, x: Tensor, rope_table: Tensor, attention_masks: object | None, positions: Tensor | None = None
    ) -> Tensor:
        """``[B, N, D]`` to ``[B, N, D]``, with TorchTitan's signature."""
        h = x + self.attention(self._normalised(x), rope_table, attention_masks, positions)
        return tiled_feed_forward(
            h,
            self.ffn_norm.weight,
            *(as_in_products(linear.weight) for linear in self._linears()),
            eps=epsilon(self.ffn_norm),
            tile_size=self.tile_size,
        )

    def _normalised(self, x: Tensor) -> Tensor:
        return tiled_rms_norm(x, self.attention_norm.weight, epsilon(self.attention_norm), self.tile_size)

    def _linears(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.feed_forward.w1, self.feed_forward.w2, self.feed_forward.w3


class Unnormalised(NamedTuple):
    """What the final norm hands on: its input ``[B, N, D]``, its weight ``[D]`` and its epsilon."""

    h: Tensor
    norm_weight: Tensor
    eps: float


class HandedOnNorm(nn.RMSNorm):
    """The model's final norm, left for :class:`TiledOutput` to do; holds the weight under TorchTitan's name.

    FSDP2 gathers norm and output as one group, from the forward of the first to the end of the last.
    """

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__(norm.normalized_shape, norm.eps, device="meta")
        self.weight = norm.weight

    def forward(self, h: Tensor) -> Unnormalised:  # type: ignore[override]
        """Compute nothing."""
        return Unnormalised(h, self.weight, epsilon(self))


class TiledOutput(nn.Linear):
    """The model's output layer: logits, or within :meth:`given` the loss or scores, which it computes in tiles.

    The loss is computed in here since here FSDP2 has the weights at hand.

    Args:
        output: TorchTitan's; its weight is taken over.
        tile_size: rows per tile.
    """

    def __init__(self, output: nn.Linear, tile_size: int) -> None:
        super().__init__(output.in_features, output.out_features, bias=False, device="meta")
        self.weight = output.weight
        self.tile_size = tile_size
        self._labels: Tensor | None = None
        self._scores = False

    @contextmanager
    def given(self, labels: Tensor, scores: bool = False) -> Iterator[None]:
        """Let the model return its loss, summed over ``labels [B, N]``, or their scores, in place of logits."""
        self._labels, self._scores = labels, scores
        try:
            yield
        finally:
            self._labels = None

    def forward(self, hidden: Unnormalised) -> Tensor:  # type: ignore[override]
        """Logits ``[B, N, V]``, or the summed loss, a float32 scalar, or scores ``[2, B, N]``.

        Raises:
            ValueError: training without labels, which would make all logits at once.
        """
        if self._labels is None:
            if self.training and torch.is_grad_enabled():
                raise ValueError(
                    f"context_parallel.tile_size asks for a loss in tiles ({self.tile_size} rows each), but the "
                    "trainer gave the model no labels; start the job with `torchrun -m torchtitan_upipe.train`."
                )
            return self.logits(hidden)
        return (self.scores if self._scores else self.loss)(hidden, self._labels)

    def logits(self, state: Unnormalised) -> Tensor:
        """All logits ``[B, N, V]``."""
        return F.linear(F.rms_norm(state.h, state.norm_weight.shape, state.norm_weight, state.eps), self.weight)

    def loss(self, state: Unnormalised, labels: Tensor) -> Tensor:
        """The loss summed over ``labels [B, N]``, in tiles."""
        return tiled_cross_entropy(
            state.h,
            labels,
            state.norm_weight,
            as_in_products(self.weight),
            eps=state.eps,
            tile_size=self.tile_size,
        )

    def scores(self, state: Unnormalised, labels: Tensor) -> Tensor:
        """See :func:`~torchtitan_upipe.tiled.loss.tiled_scores`."""
        head = CrossEntropy(state.eps, state.norm_weight, as_in_products(self.weight))
        return tiled_scores(head, [(slice(None), state.h)], labels, self.tile_size)


def epsilon(norm: nn.RMSNorm) -> float:
    """The norm's own.

    Raises:
        ValueError: it is left to torch.
    """
    if norm.eps is None:
        raise ValueError("a tiled norm needs its epsilon named; set eps of the model's RMSNorm.")
    return norm.eps
