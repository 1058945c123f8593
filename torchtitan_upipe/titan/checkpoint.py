"""TorchTitan's checkpoints, which say in a sentence what does not fit, and hand over the data's state to any ranks."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save, save
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpoint import (
    DATALOADER,
    LR_SCHEDULER,
    OPTIMIZER,
    TRAIN_STATE,
    AsyncMode,
    CheckpointManager,
)
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import GarbageCollection

from torchtitan_upipe.huggingface.folder import ModelFiles
from torchtitan_upipe.huggingface.weights import write_weights
from torchtitan_upipe.job.steps import INDEX, METADATA, SINGLE, clear, finished_steps, is_finished, steps, unfinish
from torchtitan_upipe.titan.checkpoint_files import CheckpointWriter, verify
from torchtitan_upipe.titan.datasets import BEGIN_AGAIN, Dataloader

DATA_STATE = re.compile(rf"{DATALOADER}\.dp_rank_(\d+)$")


class Checkpoints(CheckpointManager):
    """TorchTitan's manager; a checkpoint is whole or none, and what is loaded is compared with what is there, first.

    Attributes:
        model_files: what is written beside the weights of every step, for Transformers and the export command; None for
            a model that Transformers does not have.
    """

    model_files: ModelFiles | None = None
    _weights_alone = False
    save_future: Future[Any] | None
    _newest: int = -1  # the last step that was to be saved

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

    def save(self, curr_step: int, last_step: bool = False) -> None:
        """TorchTitan's.

        Raises:
            OSError: it could not be written; those before it are as they were.
        """
        if self._should_save(curr_step, last_step):
            self._async_wait()
            self._newest = curr_step
        super().save(curr_step, last_step)

    def wait(self) -> None:
        """Until the checkpoint that is being written beside the training is whole.

        Raises:
            OSError: it could not be written.
        """
        if self.enable:
            self._async_wait()

    def _async_wait(self) -> None:
        try:
            super()._async_wait()
        except CheckpointException as error:
            self.save_future = None
            raise self._not_written(Path(self._create_checkpoint_id(self._newest)), error) from error

    @torch.no_grad()
    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Any:
        """Save ``state_dict``; in Hugging Face's format as Transformers does, without leftovers.

        Raises:
            OSError: it could not be written, on all ranks alike.
        """
        folder = Path(checkpoint_id)
        beside = None
        if self.model_files is not None:
            dtype = next(value.dtype for value in state_dict.values() if isinstance(value, Tensor))
            beside = partial(self.model_files.write, folder, str(dtype).removeprefix("torch."))
        if to_hf and beside is None:
            return super().dcp_save(state_dict, checkpoint_id, async_mode, enable_garbage_collection, to_hf)
        if to_hf:
            save_weights(folder, self.sd_adapter.to_hf(state_dict), beside)
            return None
        try:
            future = self._save(state_dict, CheckpointWriter(folder, beside), async_mode)
        except CheckpointException as error:
            raise self._not_written(folder, error) from error
        if enable_garbage_collection:
            GarbageCollection.collect("GC collection invoked by checkpointer.")
        return future

    def _save(self, state_dict: dict[str, Any], writer: CheckpointWriter, mode: AsyncMode) -> Any:
        """As TorchTitan does, by ``writer``."""
        if mode == AsyncMode.DISABLED:
            return save(state_dict, storage_writer=writer)
        if mode == AsyncMode.ASYNC_WITH_PINNED_MEM:
            process = AsyncCheckpointerType.PROCESS
            group, stager = self.pg, self.stager
            return async_save(
                state_dict,
                storage_writer=writer,
                process_group=group,
                async_checkpointer_type=process,
                async_stager=stager,
            )
        stager = DefaultStager(StagingOptions(False, False, False, False))  # torch's, where it is handed no writer
        future = async_save(state_dict, storage_writer=writer, process_group=self.pg, async_stager=stager)
        assert isinstance(future, Future)
        future.add_done_callback(lambda _: stager.close())
        return future

    def _not_written(self, folder: Path, error: CheckpointException) -> OSError:
        """What to say of a save that failed; what it has left on a full disk is removed."""
        if dist.get_rank() == 0:
            unfinish(folder)
            shutil.rmtree(folder, ignore_errors=True)
        rank, text = _first_failure(error)
        finished = [step for step in finished_steps(folder.parent) if folder.name != f"step-{step}"]
        last = f"the last whole one is step-{finished[-1]}" if finished else "there is none before it"
        return OSError(f"checkpoint {folder} could not be written (rank {rank}: {text}); {last}.")

    def _purge_stale_checkpoints(self) -> None:
        """Delete all but the newest ``keep_latest_k`` finished ones of this job's way, and what interrupted saves left.

        TorchTitan counts unfinished ones, too, which may leave none that can be loaded, and later steps of an abandoned
        way, because of which it would delete each new one.
        """
        if not self.keep_latest_k or dist.get_rank() != 0:
            return
        before = {step: path for step, path in steps(Path(self.folder)).items() if step <= self._newest}
        finished = [path for path in before.values() if is_finished(path)]
        interrupted = [path for step, path in before.items() if step < self._newest and path not in finished]
        for path in interrupted + finished[: -self.keep_latest_k]:
            unfinish(path)
            self.purge_queue.put(str(path))

    def load(self, step: int = -1) -> bool:
        """TorchTitan's, and a line where a job goes on from another step than the newest folder's."""
        folder = Path(self.folder) if self.enable else Path()
        if self.enable and steps(folder):
            chosen = self._find_load_step() if step == -1 else step
            for later, path in steps(folder).items():
                if later > chosen and not is_finished(path):
                    logger.info(f"{path} was not finished when its job ended; it is passed over.")
                elif later > chosen and not self.load_only:
                    logger.info(
                        f"{path} is later than step {chosen}, from which this job goes on; it stays the one that a job "
                        "without checkpoint.load_step loads, until this job has passed it."
                    )
        return super().load(step)

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """Load ``checkpoint_id`` into ``state_dict``.

        Raises:
            ValueError: it is damaged, of another model or of other data, or cannot be read.
        """
        if self._weights_alone and is_transformers(checkpoint_id):
            from_hf = True
        if not from_hf:
            refuse_unfinished(checkpoint_id)
        verify(Path(checkpoint_id))
        if not from_hf:
            saved = read_metadata(checkpoint_id)
            check_weights(state_dict, saved, checkpoint_id)
            _check_whole(state_dict, saved, checkpoint_id)
            self._check_data(state_dict, saved, checkpoint_id)
        try:
            with _own_settings(None if LR_SCHEDULER in state_dict else state_dict.get(OPTIMIZER)):
                super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
        except CheckpointException as error:
            rank, text = _first_failure(error)
            raise ValueError(f"checkpoint {checkpoint_id} cannot be loaded (rank {rank}): {text}") from error

    def _find_load_step(self, folder: str = "") -> int:
        """The newest finished step; TorchTitan's takes no single file of safetensors for one, but any name with one."""
        return max(finished_steps(Path(folder or self.folder)), default=-1)

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


@contextmanager
def _own_settings(optimizers: OptimizersContainer | None) -> Iterator[None]:
    """Within, ``optimizers`` load moments alone; learning rate, betas and decay stay the job's."""
    groups = [] if optimizers is None else [[dict(g) for g in one.param_groups] for one in optimizers]
    yield
    for one, own in zip(optimizers or (), groups, strict=True):
        for group, settings in zip(one.param_groups, own, strict=True):
            group.update({name: value for name, value in settings.items() if name != "params"})


def save_weights(folder: Path, weights: Mapping[str, Tensor], beside: Callable[[], None] | None = None) -> None:
    """Gather ``weights``, of Hugging Face's names and on all ranks, a file at a time on rank 0, which writes them.

    Args:
        beside: writes what else stands in ``folder``, on rank 0.

    Raises:
        OSError: they could not be written, on all ranks alike.
    """
    waiting = dict.fromkeys(weights)

    def fetch(names: Sequence[str]) -> dict[str, Tensor]:
        gathered = {}
        for name in names:
            weight = weights[name]
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            del waiting[name]
            if dist.get_rank() == 0:
                gathered[name] = whole.detach().cpu()
        return gathered

    sizes = {name: weight.numel() * weight.element_size() for name, weight in weights.items()}
    failure = [""]
    if dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            clear(folder)
            if beside is not None:
                beside()
            write_weights(folder, sizes, fetch)
        except (OSError, SafetensorError) as error:
            failure = [str(error)]
            for name in list(waiting):
                fetch([name])  # the others are gathering, too
            shutil.rmtree(folder, ignore_errors=True)
    else:
        for name in weights:
            fetch([name])
    dist.broadcast_object_list(failure)  # no rank leaves before the model is whole
    if failure[0]:
        raise OSError(f"model {folder} could not be written ({failure[0]}); checkpoints before it are as they were.")


def refuse_unfinished(checkpoint_id: str) -> None:
    """Refuse a folder that is no whole checkpoint of torch's.

    Raises:
        ValueError: with what it is, and what to do.
    """
    folder = Path(checkpoint_id)
    if is_transformers(checkpoint_id):
        raise ValueError(
            f"checkpoint {checkpoint_id} is a finished model in Hugging Face's format, from which a job cannot go on; "
            "begin another (job.dump_folder) with it in checkpoint.initial_load_path and checkpoint.initial_load_in_hf "
            "= true, or name an earlier checkpoint.load_step."
        )
    if not (folder / METADATA).is_file():
        raise ValueError(
            f"checkpoint {checkpoint_id} is not complete: it has no {METADATA}; name another step "
            "(checkpoint.load_step), or set checkpoint.initial_load_in_hf = true for Hugging Face weights."
        )


def is_transformers(checkpoint_id: str) -> bool:
    """Whether the folder holds weights in Hugging Face's format."""
    return any((Path(checkpoint_id) / name).is_file() for name in (SINGLE, INDEX))


def read_metadata(checkpoint_id: str) -> Mapping[str, Any]:
    """What ``checkpoint_id`` holds, by name.

    Raises:
        ValueError: it is no whole checkpoint of torch's.
    """
    refuse_unfinished(checkpoint_id)
    try:
        metadata: Mapping[str, Any] = FileSystemReader(checkpoint_id).read_metadata().state_dict_metadata
    except Exception as error:  # whatever unpickling meets in a damaged file
        raise ValueError(f"checkpoint {checkpoint_id}: its {METADATA} is damaged ({error}).") from error
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


def _first_failure(error: CheckpointException) -> tuple[int, str]:
    """A rank whose part of a save or load failed, and why; ``error`` is a BaseException with an entry for each."""
    rank, (failure, _) = next(iter(sorted(error.failures.items())))
    text = str(failure).strip().partition("\n")[0]
    return rank, getattr(failure, "strerror", None) or text
