"""TorchTitan's checkpoints, which say in a sentence what does not fit, and hand over the data's state to any ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpoint import DATALOADER, TRAIN_STATE, AsyncMode, CheckpointManager

from torchtitan_upipe.huggingface.folder import ModelFiles
from torchtitan_upipe.huggingface.weights import INDEX, SINGLE, write_weights
from torchtitan_upipe.titan.datasets import BEGIN_AGAIN, Dataloader

DATA_STATE = re.compile(rf"{DATALOADER}\.dp_rank_(\d+)$")


class Checkpoints(CheckpointManager):
    """TorchTitan's manager; what is loaded is compared with what is there, first.

    Attributes:
        model_files: what is written beside the weights of every step, for Transformers and the export command; None for
            a model that Transformers does not have.
    """

    model_files: ModelFiles | None = None
    _weights_alone = False

    def load_weights(self, step: int = -1) -> int:
        """Load the weights alone that a job would go on from; return their step, 0 for those from elsewhere.

        A model in Hugging Face's format, as the last one of a job may be, is loaded, too.

        Raises:
            ValueError: there are none.
        """
        there = Path(self.folder).exists()
        if there and step == -1:
            step = self._find_load_step()
        self._weights_alone = True
        if not self.load(step):
            raise ValueError(
                f"{self.folder} holds no checkpoint, and the job names no other weights; set "
                "checkpoint.initial_load_path, or checkpoint.initial_load_in_hf = true for model.hf_assets_path."
            )
        self._weights_alone = False
        return step if there else 0

    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Any:
        """Save ``state_dict``; in Hugging Face's format as Transformers does, without leftovers."""
        folder = Path(checkpoint_id)
        if self.model_files is not None and dist.get_rank() == 0:
            dtype = next(value.dtype for value in state_dict.values() if isinstance(value, Tensor))
            self.model_files.write(folder, str(dtype).removeprefix("torch."))
        if self.model_files is None or not to_hf:
            return super().dcp_save(state_dict, checkpoint_id, async_mode, enable_garbage_collection, to_hf)
        save_weights(folder, self.sd_adapter.to_hf(state_dict))
        return None

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """Load ``checkpoint_id`` into ``state_dict``.

        Raises:
            ValueError: it is of another model or of other data, or cannot be read.
        """
        if self._weights_alone and is_transformers(checkpoint_id):
            from_hf = True
        if not from_hf:
            saved = read_metadata(checkpoint_id)
            check_weights(state_dict, saved, checkpoint_id)
            _check_whole(state_dict, saved, checkpoint_id)
            self._check_data(state_dict, saved, checkpoint_id)
        try:
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
        except CheckpointException as error:  # a BaseException, of which each rank's own failure is one entry
            rank, (failure, _) = next(iter(error.failures.items()))
            text = str(failure).strip().partition("\n")[0]
            raise ValueError(f"checkpoint {checkpoint_id} cannot be loaded (rank {rank}): {text}") from error

    def _find_load_step(self, folder: str = "") -> int:
        """TorchTitan's, which takes no model in a single file of safetensors for a step."""
        finished = [int(file.parent.name.removeprefix("step-")) for file in Path(self.folder).glob(f"step-*/{SINGLE}")]
        return max([super()._find_load_step(folder), *finished])

    def _states_to_load(self, model_only: bool) -> dict[str, Any]:
        return super()._states_to_load(model_only or self._weights_alone)

    def _check_data(self, state_dict: Mapping[str, Any], saved: Mapping[str, Any], checkpoint_id: str) -> None:
        loader = state_dict.get(DATALOADER)
        if loader is None:
            return
        ranks = len([name for name in saved if DATA_STATE.match(name)])
        if ranks == loader.dp_world_size:
            return
        if ranks == 0 or not isinstance(loader, Dataloader):
            raise ValueError(
                f"checkpoint {checkpoint_id} holds the data's state of {ranks} data-parallel ranks, and this job's "
                f"loader, of {loader.dp_world_size}, cannot take it over; {BEGIN_AGAIN}."
            )
        loader.expect(ranks)


def save_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Gather ``weights``, of Hugging Face's names and on all ranks, a file at a time on rank 0, which writes them."""
    writes = dist.get_rank() == 0

    def fetch(names: Sequence[str]) -> dict[str, Tensor]:
        gathered = {}
        for name in names:
            weight = weights[name]
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            if writes:
                gathered[name] = whole.detach().cpu()
        return gathered

    write_weights(folder, {n: w.numel() * w.element_size() for n, w in weights.items()}, fetch, writes=writes)
    dist.barrier()  # no rank leaves before the model is whole


def is_transformers(checkpoint_id: str) -> bool:
    """Whether the folder holds weights in Hugging Face's format."""
    return any((Path(checkpoint_id) / name).is_file() for name in (SINGLE, INDEX))


def read_metadata(checkpoint_id: str) -> Mapping[str, Any]:
    """What ``checkpoint_id`` holds, by name.

    Raises:
        ValueError: it is no whole checkpoint of torch's.
    """
    if is_transformers(checkpoint_id):
        raise ValueError(
            f"checkpoint {checkpoint_id} is a finished model in Hugging Face's format, from which a job cannot go on; "
            "begin another (job.dump_folder) with it in checkpoint.initial_load_path and checkpoint.initial_load_in_hf "
            "= true, or name an earlier checkpoint.load_step."
        )
    if not (Path(checkpoint_id) / ".metadata").is_file():
        raise ValueError(
            f"checkpoint {checkpoint_id} is not complete: it has no .metadata; name another step "
            "(checkpoint.load_step), or set checkpoint.initial_load_in_hf = true for Hugging Face weights."
        )
    try:
        metadata: Mapping[str, Any] = FileSystemReader(checkpoint_id).read_metadata().state_dict_metadata
    except Exception as error:  # whatever unpickling meets in a damaged file
        raise ValueError(f"checkpoint {checkpoint_id}: its .metadata is damaged ({error}).") from error
    return metadata


def check_weights(state_dict: Mapping[str, Any], saved: Mapping[str, Any], checkpoint_id: str) -> None:
    """Refuse a checkpoint that is not of this model.

    Args:
        state_dict: the model's weights, among other things.
        saved: see :func:`read_metadata`.
        checkpoint_id: its folder.

    Raises:
        ValueError: the first weight that does not fit.
    """
    weights = {name: value for name, value in state_dict.items() if isinstance(value, Tensor)}
    for name, weight in weights.items():
        if name not in saved:
            raise ValueError(
                f"checkpoint {checkpoint_id} has no weight {name!r}, which this job's model has; choose the "
                "model.name and model.flavor that it was written with."
            )
        size = getattr(saved[name], "size", weight.shape)
        if tuple(size) != tuple(weight.shape):
            raise ValueError(
                f"checkpoint {checkpoint_id} has {name!r} as {_by(size)}, and this job's model as {_by(weight.shape)}; "
                "choose the model.name and model.flavor that it was written with."
            )
    layers = {layer for layer in (_layer(name) for name in saved) if layer is not None}
    surplus = layers - {_layer(name) for name in weights}
    if weights and surplus:
        raise ValueError(
            f"checkpoint {checkpoint_id} has {len(layers)} layers, and this job's model has "
            f"{len(layers) - len(surplus)}; choose the model.flavor that it was written with."
        )


def _check_whole(state_dict: Mapping[str, Any], saved: Mapping[str, Any], checkpoint_id: str) -> None:
    if TRAIN_STATE in state_dict and not any(name.startswith(f"{TRAIN_STATE}.") for name in saved):
        raise ValueError(
            f"checkpoint {checkpoint_id} holds a model only, as the last one of a job does unless "
            "checkpoint.last_save_model_only = false; go on from an earlier checkpoint.load_step, or begin a new job "
            "(another job.dump_folder) with checkpoint.initial_load_path."
        )


def _layer(name: str) -> str | None:
    match = re.match(r"layers\.(\d+)\.", name)
    return match[1] if match else None


def _by(shape: Any) -> str:
    return " x ".join(map(str, shape))
