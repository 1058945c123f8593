"""The flavor ``"hf"``: TorchTitan's models in the shape that a Hugging Face ``config.json`` names."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torchtitan.config import JobConfig
from torchtitan.models.llama3 import Transformer, TransformerModelArgs
from torchtitan.models.qwen3 import Qwen3ModelArgs
from torchtitan.models.utils import get_dense_model_nparams_and_flops

from torchtitan_upipe.cp.frequencies import RopeParameters
from torchtitan_upipe.job.pretrained import Pretrained, PretrainedArgs

FLAVOR = "hf"


@dataclass
class PretrainedLlamaArgs(TransformerModelArgs, PretrainedArgs):
    """Arguments of a :class:`Llama` like a Llama or Mistral of Hugging Face's."""

    model_types: ClassVar[tuple[str, ...]] = ("llama", "mistral")
    assets: str = ""
    head_dim: int = 0
    enable_weight_tying: bool = False
    rope: RopeParameters = field(default_factory=lambda: RopeParameters(10000.0))

    def of(self, pretrained: Pretrained, assets: str) -> Self:
        """Arguments of that shape."""
        p = pretrained
        # TorchTitan's width of the feed-forward: a number around 2/3 of the inner one, rounded up to a multiple of it
        inner: dict[str, Any] = {"multiple_of": p.inner, "ffn_dim_multiplier": p.inner / (4 * p.dim)}
        return replace(self, **_shared(p, assets), **inner)

    def update_from_config(self, job_config: JobConfig, **kwargs: Any) -> None:
        """Take the shape from the job's ``model.hf_assets_path``, then what TorchTitan takes."""
        self.__dict__.update(vars(self.filled(job_config.model.hf_assets_path)))
        super().update_from_config(job_config, **kwargs)

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """TorchTitan's count, with heads of any width."""
        return get_dense_model_nparams_and_flops(self, model, 2 * self.head_dim, seq_len)


@dataclass
class PretrainedQwenArgs(Qwen3ModelArgs, PretrainedArgs):
    """Arguments of TorchTitan's Qwen3 like a dense Qwen3 of Hugging Face's."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3",)
    assets: str = ""
    rope: RopeParameters = field(default_factory=lambda: RopeParameters(10000.0))

    def of(self, pretrained: Pretrained, assets: str) -> Self:
        """Arguments of that shape."""
        inner: dict[str, Any] = {"hidden_dim": pretrained.inner}
        return replace(self, **_shared(pretrained, assets), **inner)

    def update_from_config(self, job_config: JobConfig, **kwargs: Any) -> None:
        """Take the shape from the job's ``model.hf_assets_path``, then what TorchTitan takes."""
        self.__dict__.update(vars(self.filled(job_config.model.hf_assets_path)))
        super().update_from_config(job_config, **kwargs)


def _shared(p: Pretrained, assets: str) -> dict[str, Any]:
    return {
        "assets": assets,
        "dim": p.dim,
        "n_layers": p.layers,
        "n_heads": p.heads,
        "n_kv_heads": p.kv_heads,
        "head_dim": p.head_dim,
        "vocab_size": p.vocab,
        "norm_eps": p.norm_eps,
        "max_seq_len": p.length,
        "rope_theta": p.rope.theta,
        "rope": p.rope,
        "enable_weight_tying": p.tied,
    }


class Llama(Transformer):
    """TorchTitan's Llama3; of :class:`PretrainedLlamaArgs` also with heads of another width and a shared embedding."""

    def __init__(self, model_args: TransformerModelArgs) -> None:
        super().__init__(model_args)
        self.tied = isinstance(model_args, PretrainedLlamaArgs) and model_args.enable_weight_tying
        if isinstance(model_args, PretrainedLlamaArgs):
            for block in self.layers.values():
                _set_head_dim(block.attention, model_args.dim, model_args.head_dim)
        self._tie()

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """TorchTitan's own initialisation."""
        self._tie()  # which a move from the meta device may undo
        super().init_weights(buffer_device)

    def _tie(self) -> None:
        if self.tied:
            self.output.weight = self.tok_embeddings.weight


def _set_head_dim(attention: Any, dim: int, head_dim: int) -> None:
    """Let TorchTitan's attention, whose heads are ``dim / H`` wide, have heads of ``head_dim``."""
    attention.head_dim = head_dim
    attention.wq = nn.Linear(dim, attention.n_heads * head_dim, bias=False)
    attention.wk = nn.Linear(dim, attention.n_kv_heads * head_dim, bias=False)
    attention.wv = nn.Linear(dim, attention.n_kv_heads * head_dim, bias=False)
    attention.wo = nn.Linear(attention.n_heads * head_dim, dim, bias=False)
