"""The blocks of a model of Transformers: activation checkpointing with the stash, norms and feed-forward in tiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from torchtitan_upipe.cp.stashing import StashForBothRuns, StashingMethod
from torchtitan_upipe.huggingface.attention import ContextParallelAttention, plain_weight
from torchtitan_upipe.tiled.mlp import tiled_feed_forward
from torchtitan_upipe.tiled.norm import tiled_rms_norm
from torchtitan_upipe.tiled.tiles import as_in_products


class StashedLayer(nn.Module):
    """The behaviour of a block that Transformers may run twice: its second run finds the stash of the first."""

    self_attn: ContextParallelAttention

    @property
    def _gradient_checkpointing_func(self) -> Callable[..., Any]:
        """What Transformers calls to run the block, under gradient checkpointing."""
        checkpoint: Callable[..., Any] | None = self.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is None:
            raise AttributeError("gradient checkpointing is not enabled")
        method = self.self_attn.method
        if not isinstance(method, StashingMethod):
            return checkpoint
        return partial(checkpoint, context_fn=StashForBothRuns(method))

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, checkpoint: Callable[..., Any]) -> None:
        self.__dict__["_gradient_checkpointing_func"] = checkpoint


class TiledLayer(StashedLayer):
    """The behaviour of a block whose norms and feed-forward work in tiles of rows with a backward of their own.

    They take the weights of its children, which do not run themselves.

    Attributes:
        tile_size: rows per tile.
    """

    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module
    mlp: Any
    tile_size: int

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """``[B, N, D]`` to ``[B, N, D]``, called as Transformers' models do."""
        norm: Any = self.input_layernorm
        n = tiled_rms_norm(hidden_states, norm.weight, norm.variance_epsilon, self.tile_size)
        h = hidden_states + self.self_attn(hidden_states=n, **kwargs)[0]
        norm = self.post_attention_layernorm
        linears = (self.mlp.gate_proj, self.mlp.down_proj, self.mlp.up_proj)
        return tiled_feed_forward(
            h,
            norm.weight,
            *(as_in_products(plain_weight(linear)) for linear in linears),
            eps=norm.variance_epsilon,
            tile_size=self.tile_size,
        )
