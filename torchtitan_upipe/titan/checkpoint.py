"""TorchTitan's checkpoints, which say in a sentence what does not fit, and hand over the data's state to any ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torchtitan.components.checkpoint import DATALOADER, TRAIN_STATE, CheckpointManager

from torchtitan_upipe.titan.datasets import BEGIN_AGAIN, Dataloader

DATA_STATE = re.compile(rf"{DATALOADER}\.dp_rank_(\d+)$")


class Checkpoints(CheckpointManager):
    """TorchTitan's manager; what is loaded is compared with what is there, first."""

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """Load ``checkpoint_id`` into ``state_dict``.

        Raises:
            ValueError: it is of another model or of other data, or cannot be read.
        """
        if not from_hf:
            saved = _read_metadata(checkpoint_id)
            _check_weights(state_dict, saved, checkpoint_id)
            _check_whole(state_dict, saved, checkpoint_id)
            self._check_data(state_dict, saved, checkpoint_id)
        try:
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
        except CheckpointException as error:  # a BaseException, of which each rank's own failure is one entry
            rank, (failure, _) = next(iter(error.failures.items()))
            text = str(failure).strip().partition("\n")[0]
            raise ValueError(f"checkpoint {checkpoint_id} cannot be loaded (rank {rank}): {text}") from error

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


def _read_metadata(checkpoint_id: str) -> Mapping[str, Any]:
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


def _check_weights(state_dict: Mapping[str, Any], saved: Mapping[str, Any], checkpoint_id: str) -> None:
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
