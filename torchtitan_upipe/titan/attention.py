"""A model's attention, handed to a context-parallel method with its weights, norm and RoPE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchtitan_upipe.cp.rope import Rope
from torchtitan_upipe.cp.strategy import AttentionWeights, ContextParallelMethod
from torchtitan_upipe.cp.transform import NormThenRope
from torchtitan_upipe.kernels.visibility import Documents
from torchtitan_upipe.titan.rope import RopeOfModel


class ContextParallelAttention(nn.Module):
    """Stands in the place of TorchTitan's ``Attention``: same children, same names, same initial weights.

    Checkpoints and Hugging Face adapters therefore see no difference, and FSDP2 wraps the block as before.

    Args:
        attention: TorchTitan's Llama3 or Qwen3 attention; its children are taken over.
        method: the context-parallel method.
        rope: how the model rotates.
        frequencies: ``[d/2]`` float64, of its RoPE.
        scale: what rotated heads are multiplied by.
        document_mask: refuse to run without documents.
    """

    def __init__(
        self,
        attention: nn.Module,
        method: ContextParallelMethod,
        rope: RopeOfModel,
        frequencies: Tensor,
        scale: float = 1.0,
        document_mask: bool = False,
    ) -> None:
        super().__init__()
        self.wq: nn.Linear = attention.wq  # type: ignore[assignment]
        self.wk: nn.Linear = attention.wk  # type: ignore[assignment]
        self.wv: nn.Linear = attention.wv  # type: ignore[assignment]
        self.wo: nn.Linear = attention.wo  # type: ignore[assignment]
        self.q_norm: nn.RMSNorm | None = getattr(attention, "q_norm", None)
        self.k_norm: nn.RMSNorm | None = getattr(attention, "k_norm", None)
        self.head_dim: int = attention.head_dim  # type: ignore[assignment]
        self.method = method
        self.document_mask = document_mask
        self._rope, self._scale = rope, scale
        self._frequencies = frequencies  # no buffer: FSDP would cast it to bfloat16
        self._titan_class: Any = type(attention)

    def init_weights(self, init_std: float) -> None:
        """TorchTitan's own initialisation of this layer."""
        self._titan_class.init_weights(self, init_std)

    def forward(
        self, x: Tensor, rope_table: Tensor, attention_masks: object | None, positions: Tensor | None = None
    ) -> Tensor:
        """Causal attention of this rank's tokens, with TorchTitan's signature.

        Args:
            x: ``[B, N, D]``.
            rope_table: TorchTitan's table of all positions, not read: angles are computed for this rank's positions.
            attention_masks: the :class:`Documents` of the whole sequences, or None for one document each.
            positions: ``[B, N]`` positions of the tokens for RoPE; None means ``0 .. N-1``.

        Returns:
            ``y [B, N, D]``.

        Raises:
            ValueError: see :meth:`prepare`.
        """
        weights, transform, documents = self.prepare(x, attention_masks, positions)
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):  # one device or plain data parallel in mixed precision
            dtype = torch.get_autocast_dtype(device_type)
            x, weights = x.to(dtype), weights.to(dtype)
        with torch.autocast(device_type, enabled=False):
            return self.method(x, weights, transform, self.head_dim, documents)

    def prepare(
        self, x: Tensor, attention_masks: object | None, positions: Tensor | None
    ) -> tuple[AttentionWeights, NormThenRope, Documents | None]:
        """What a method needs beside ``x [B, N, D]``, from what the model hands to :meth:`forward`.

        Raises:
            ValueError: another kind of mask was given, or none where the job packs documents.
        """
        documents = attention_masks if isinstance(attention_masks, Documents) else None
        if attention_masks is not None and documents is None:
            raise ValueError(
                f"attention masks of type {type(attention_masks).__name__} are not supported here; choose a model "
                "flavor with causal SDPA attention, and training.document_mask = true for packed documents."
            )
        if documents is None and self.document_mask:
            raise ValueError(
                "training.document_mask = true, but the trainer gave no documents; start the job with "
                "`torchrun -m torchtitan_upipe.train`."
            )
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        weights = AttentionWeights(
            wq=self.wq.weight,
            wk=self.wk.weight,
            wv=self.wv.weight,
            wo=self.wo.weight,
            q_norm=None if self.q_norm is None else self.q_norm.weight,
            k_norm=None if self.k_norm is None else self.k_norm.weight,
        )
        transform = NormThenRope(
            Rope(self._frequencies.to(x.device), positions.long(), self._rope.interleaved, self._scale),
            norm_eps=0.0 if self.q_norm is None else float(self.q_norm.eps or 0.0),
        )
        return weights, transform, documents
