"""The loss of a rank's share: final norm, logits and cross entropy, in tiles where the model has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchtitan_upipe.huggingface.attention import plain_weight
from torchtitan_upipe.tiled.loss import IGNORE_INDEX, tiled_cross_entropy
from torchtitan_upipe.tiled.tiles import as_in_products


def summed_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Cross entropy summed over this rank's tokens: a scalar, float32 (float64 for float64).

    Its sum over all ranks, divided by the number of labels of the whole batch, is the model's loss.

    Args:
        model: after :func:`~torchtitan_upipe.huggingface.model.context_parallel`, wrapped or not.
        batch: of :func:`~torchtitan_upipe.huggingface.batch.shard_batch`.

    Raises:
        ValueError: the batch has no labels, or FSDP2 rounds what the model returns.
    """
    labels = batch.get("shift_labels")
    if labels is None:
        raise ValueError("the batch has no labels; give shard_batch labels or shift_labels.")
    inputs = {name: value for name, value in batch.items() if name != "shift_labels"}
    output = next((module for module in model.modules() if isinstance(module, TiledOutput)), None)
    if output is not None:
        with output.task.given(labels):
            loss: Tensor = model(**inputs).logits
        if loss.element_size() < 4:
            raise ValueError(
                f"the model's output, here its summed loss, was rounded to {loss.dtype}; set output_dtype = None in "
                "the MixedPrecisionPolicy of fully_shard."
            )
        return loss
    logits = model(**inputs).logits.flatten(0, 1)  # [B*N, V]
    wide = logits if logits.element_size() > 4 else logits.float()
    return F.cross_entropy(wide, labels.flatten(), reduction="sum", ignore_index=IGNORE_INDEX)


@dataclass
class LossTask:
    """What final norm and output layer are asked for: logits or, given labels, the loss."""

    labels: Tensor | None = None

    @contextmanager
    def given(self, labels: Tensor) -> Iterator[None]:
        """Let the model return its loss, summed over ``labels [B, N]``, in place of logits."""
        self.labels = labels
        try:
            yield
        finally:
            self.labels = None


class FinalNorm(nn.Module):
    """The behaviour of the model's final norm, which it leaves to :class:`TiledOutput` where that makes the loss."""

    task: LossTask

    def forward(self, h: Tensor) -> Tensor:
        """``[B, N, D]``, normalised or as it is."""
        return h if self.task.labels is not None else super().forward(h)


class TiledOutput(nn.Module):
    """The behaviour of the output layer: logits or, within ``task.given``, the loss, which it computes in tiles.

    The loss is computed in here since here FSDP2 has the weights at hand.

    Attributes:
        task: shared with the final norm.
        norm: the final norm, in a list, since it is no child of this module.
        tile_size: rows per tile.
    """

    task: LossTask
    norm: list[Any]
    tile_size: int

    def forward(self, h: Tensor) -> Tensor:
        """Logits of ``h [B, N, D]``, or the summed loss, a float32 scalar.

        Raises:
            ValueError: FSDP2 has not gathered the final norm together with this layer.
        """
        labels = self.task.labels
        if labels is None:
            return super().forward(h)
        norm = self.norm[0]
        if isinstance(norm.weight, DTensor):
            raise ValueError(
                "the final norm is not gathered where the output layer makes the loss; let fully_shard take both as "
                "one group, or only the root."
            )
        weight = as_in_products(plain_weight(self))
        return tiled_cross_entropy(h, labels, norm.weight, weight, eps=norm.variance_epsilon, tile_size=self.tile_size)
