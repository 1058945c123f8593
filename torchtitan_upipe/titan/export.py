"""What a run leaves for Transformers: a description of its model, and a checkpoint turned into a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torchtitan.config import JobConfig
from torchtitan.models.llama3 import TransformerModelArgs
from torchtitan.models.qwen3 import Qwen3Model, Qwen3ModelArgs, Qwen3StateDictAdapter
from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter

from torchtitan_upipe.huggingface.folder import ModelFiles
from torchtitan_upipe.huggingface.weights import FILE_BYTES, write_weights
from torchtitan_upipe.job.model import job_rope
from torchtitan_upipe.job.pretrained import CONFIG, Pretrained, PretrainedArgs, read_config
from torchtitan_upipe.job.shape import model_shape
from torchtitan_upipe.titan.adapter import AnyDegreeLlama3Adapter
from torchtitan_upipe.titan.checkpoint import check_weights, read_metadata, refuse_unfinished
from torchtitan_upipe.titan.checkpoint_files import verify
from torchtitan_upipe.titan.pretrained import Llama, PretrainedLlamaArgs, PretrainedQwenArgs


def model_files(config: JobConfig, args: Any) -> ModelFiles | None:
    """What stands beside the weights of the job's model; None for one that Transformers does not have.

    Its context is the longer one of what the model had and what the job trains.
    """
    assets = Path(config.model.hf_assets_path)
    own = read_config(assets / CONFIG) if (assets / CONFIG).is_file() else {}
    model_type = _model_type(args, own.get("model_type"))
    if model_type is None:
        return None
    shape, context = model_shape(config), own.get("max_position_embeddings", 0)
    model = Pretrained(
        model_type=model_type,
        layers=shape.layers,
        dim=shape.dim,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        inner=shape.inner,
        vocab=shape.vocab,
        norm_eps=args.norm_eps,
        tied=shape.tied,
        length=max(config.training.seq_len, context if own.get("model_type") == model_type else 0),
        rope=job_rope(config, args),
    )
    return ModelFiles(model, assets)


def _model_type(args: Any, named: str | None) -> str | None:
    """``model_type`` of TorchTitan's arguments: ``named`` where it can be that."""
    if isinstance(args, TransformerModelArgs):
        return named if named in PretrainedLlamaArgs.model_types else "llama"
    return "qwen3" if isinstance(args, Qwen3ModelArgs) and args.qk_norm else None


def export_checkpoint(
    checkpoint: Path, to: Path, files: ModelFiles, dtype: torch.dtype | None = None, limit: int = FILE_BYTES
) -> None:
    """Write the weights of ``checkpoint``, one of this project's, as a Hugging Face model into the folder ``to``.

    Args:
        files: what stands beside them; its model is the checkpoint's.
        dtype: of the weights written; None = as in the checkpoint.
        limit: bytes of a file.

    Raises:
        ValueError: the checkpoint is not whole, damaged, or of another model.
    """
    refuse_unfinished(str(checkpoint))
    verify(checkpoint)
    saved = read_metadata(str(checkpoint))
    args, model_cls, adapter = _parts(files.model)
    with torch.device("meta"):
        model = model_cls(args)
    own = dict(model.named_parameters(remove_duplicate=False))
    check_weights(own, saved, str(checkpoint))
    names = {theirs: name for name, weight in own.items() for theirs in adapter.to_hf({name: weight.detach()})}
    stored = next(iter(names.values()))
    dtype = dtype or saved[stored].properties.dtype

    def fetch(wanted: Sequence[str]) -> dict[str, Tensor]:
        weights = {names[w]: torch.empty(saved[names[w]].size, dtype=saved[names[w]].properties.dtype) for w in wanted}
        load(weights, storage_reader=FileSystemReader(checkpoint), no_dist=True)
        return {name: weight.to(dtype) for name, weight in adapter.to_hf(weights).items()}

    files.write(to, str(dtype).removeprefix("torch."))
    write_weights(to, {w: own[n].numel() * dtype.itemsize for w, n in names.items()}, fetch, limit=limit)


def _parts(model: Pretrained) -> tuple[PretrainedArgs, Callable[[Any], torch.nn.Module], BaseStateDictAdapter]:
    kinds: list[tuple[Any, Any, Any]] = [
        (PretrainedLlamaArgs, Llama, AnyDegreeLlama3Adapter),
        (PretrainedQwenArgs, Qwen3Model, Qwen3StateDictAdapter),
    ]
    args_cls, model_cls, adapter = next(kind for kind in kinds if model.model_type in kind[0].model_types)
    args = args_cls().of(model, "")
    return args, model_cls, adapter(args, None)
