"""What the methods share that keep a stash from forward to backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from torchtitan_upipe.cp.attention import SequenceAttention
from torchtitan_upipe.cp.collectives import HeadExchange
from torchtitan_upipe.cp.stage import StageLayer
from torchtitan_upipe.cp.strategy import AttentionWeights, HeadTransform
from torchtitan_upipe.kernels.visibility import Documents
from torchtitan_upipe.stash.stash import Stash
from torchtitan_upipe.tiled.rows import Rows


class StashingMethod:
    """A method whose forward pass keeps attention's output and log-sum-exp for the backward pass.

    Args:
        layer: the method's forward and backward, by autograd's contract; takes what :meth:`__call__` hands it.
        exchange: all-to-alls of the context-parallel group.
        attention: of this rank's heads over the sequence.
        new_stash: makes what keeps them until the backward pass has used them; None to compute them again there.
    """

    def __init__(
        self,
        layer: type[torch.autograd.Function],
        exchange: HeadExchange,
        attention: SequenceAttention,
        new_stash: Callable[[], Stash] | None,
    ) -> None:
        self._layer = layer
        self.exchange = exchange
        self.attention = attention
        self.new_stash = new_stash
        self._block_stash: Stash | None = None
        self._fill_block_stash = False

    def __call__(
        self,
        x: Tensor,
        weights: AttentionWeights,
        transform: HeadTransform,
        head_dim: int,
        documents: Documents | None = None,
    ) -> Tensor:
        """See :class:`~torchtitan_upipe.cp.strategy.ContextParallelMethod`."""
        stash, fill = self.stash_of_call()
        y: Tensor = self._layer.apply(self, stash, fill, transform, head_dim, documents, x, *vars(weights).values())
        return y

    def stage_layer(
        self,
        x: Rows,
        weights: Sequence[Tensor | None],
        transform: HeadTransform,
        head_dim: int,
        documents: Documents | None,
    ) -> StageLayer:
        """The phases of the layer of tokens ``x [B, N, D]``; ``weights`` are the fields of ``AttentionWeights``."""
        attention_weights = AttentionWeights(*weights)  # type: ignore[arg-type]
        return StageLayer(x, attention_weights, transform, head_dim, documents, self.exchange, self.attention)

    @contextmanager
    def using(self, stash: Stash, *, fill: bool) -> Iterator[None]:
        """Let the calls made meanwhile use ``stash``: in backward and, if it is complete, instead of attention.

        Under activation checkpointing a block runs twice. Given the same stash both times, the second run finds there
        what the first has put, and computes neither attention nor exchange.

        Args:
            fill: put there what is computed.
        """
        self._block_stash, self._fill_block_stash = stash, fill
        try:
            yield
        finally:
            self._block_stash = None

    def stash_of_call(self) -> tuple[Stash, bool]:
        """The stash of the call that begins, and whether it puts there what it computes."""
        if self._block_stash is not None:
            return self._block_stash, self._fill_block_stash
        new_stash = self.new_stash if torch.is_grad_enabled() else None
        return (new_stash or Stash)(), new_stash is not None


class StashForBothRuns:
    """``context_fn`` of ``torch.utils.checkpoint``: called once per forward pass of a block.

    Where no stash is kept from the first run on, the second, whose backward follows at once, fills one on the device.
    It empties as the gradients of the queries fill, so that it does not raise the peak.
    """

    def __init__(self, method: StashingMethod) -> None:
        self.method = method

    def __call__(self) -> tuple[Any, Any]:
        """Contexts of the first and of the second run."""
        kept = self.method.new_stash
        stash = Stash() if kept is None else kept()
        return self.method.using(stash, fill=kept is not None), self.method.using(stash, fill=True)
