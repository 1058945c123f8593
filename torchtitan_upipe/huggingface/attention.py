"""The attention of a model of Transformers, handed to a context-parallel method with its weights, norm and RoPE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchtitan_upipe.cp.strategy import AttentionWeights, ContextParallelMethod
from torchtitan_upipe.cp.transform import NormThenRope
from torchtitan_upipe.huggingface.layout import Layout, WholeSequences
from torchtitan_upipe.huggingface.rope import RopeOfConfig
from torchtitan_upipe.tiled.tiles import as_in_products


class ContextParallelAttention(nn.Module):
    """The behaviour of ``LlamaAttention``, ``MistralAttention``, ``Qwen2Attention`` and ``Qwen3Attention``.

    Attributes:
        method: the context-parallel method.
        rope: of the model.
        layout: of the shares that it is given.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    head_dim: int
    attention_dropout: float
    method: ContextParallelMethod
    rope: RopeOfConfig
    layout: Layout

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_ids: Tensor | None = None,
        whole_sequences: WholeSequences | None = None,
        past_key_values: object = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Causal attention of this rank's tokens, called as Transformers' blocks do.

        Args:
            hidden_states: ``[B, N, D]``.
            position_ids: ``[B, N]``.
            whole_sequences: of :func:`~torchtitan_upipe.huggingface.batch.shard_batch`.

        Returns:
            ``y [B, N, D]``, and no attention weights.

        Raises:
            ValueError: the batch is not one of ``shard_batch``, or was sharded for another method; a cache; projections
                that are more than their weights; dropout.
        """
        if whole_sequences is None or position_ids is None:
            raise ValueError(
                "the model works on a share of each sequence and was given no whole_sequences; call it with what "
                "torchtitan_upipe.huggingface.shard_batch returns."
            )
        if whole_sequences.layout != self.layout:
            raise ValueError(
                f"the batch was sharded as {whole_sequences.layout} and the model expects {self.layout}; give "
                "shard_batch the mesh, method, ring_degree and sequence_chunk of context_parallel."
            )
        if past_key_values is not None:
            raise ValueError(
                "a cache of keys and values has no place in a model whose sequence is spread over ranks; call it with "
                "use_cache = False, and generate with a model loaded anew."
            )
        if self.training and self.attention_dropout:
            raise ValueError(
                f"attention_dropout = {self.attention_dropout} is not supported; set it to 0 in the model's config."
            )
        weights = self._weights()
        transform = NormThenRope(self.rope.rope(position_ids.long(), whole_sequences.longest), self._norm_eps())
        x = as_in_products(hidden_states)
        _check_precision(self.method.attention.kernel.name, x)
        with torch.autocast(x.device.type, enabled=False):
            y = self.method(x, weights, transform, self.head_dim, whole_sequences.documents)
        bias = self.o_proj.bias
        return (y if bias is None else y + bias.to(y.dtype)), None

    def _weights(self) -> AttentionWeights:
        norms: list[Any] = [getattr(self, name, None) for name in ("q_norm", "k_norm")]
        projections = (self.q_proj, self.k_proj, self.v_proj)
        wq, wk, wv, wo = (as_in_products(plain_weight(linear)) for linear in (*projections, self.o_proj))
        q_norm, k_norm = (None if norm is None else as_in_products(norm.weight) for norm in norms)
        bq, bk, bv = (None if linear.bias is None else as_in_products(linear.bias) for linear in projections)
        return AttentionWeights(wq, wk, wv, wo, q_norm, k_norm, bq, bk, bv)

    def _norm_eps(self) -> float:
        norm: Any = getattr(self, "q_norm", None)
        return 0.0 if norm is None else float(norm.variance_epsilon)


def check_linear(linear: nn.Module) -> None:
    """Refuse a projection that is more than a product with its weight.

    Raises:
        ValueError: an adapter or a quantised weight, which such a product would pass by.
    """
    if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
        raise ValueError(
            f"a projection of type {type(linear).__name__} is not supported, since its weight is read, not its forward "
            "called: merge the adapter, leave q_proj, k_proj, v_proj, o_proj (with tile_size: all others, too) out of "
            "its target_modules, or load the model unquantised."
        )


def plain_weight(linear: Any) -> Tensor:
    """The weight of ``linear``.

    Raises:
        ValueError: see :func:`check_linear`; or FSDP2 has not gathered it here.
    """
    check_linear(linear)
    weight: Tensor = linear.weight
    if type(weight) not in (Tensor, nn.Parameter):
        raise ValueError(
            f"a weight of type {type(weight).__name__} is not gathered where it is used; let fully_shard take whole "
            "blocks (and the final norm with the output layer), not single projections."
        )
    return weight


def _check_precision(kernel: str, x: Tensor) -> None:
    if x.device.type == "cuda" and kernel != "reference" and x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"attention_kernel = {kernel!r} computes in bfloat16 on CUDA and the hidden states are {x.dtype}; train "
            'with bf16 = True, or choose attention_kernel = "reference" for a small test.'
        )
