"""The project's texts under names that TorchTitan knows, and a data loader that goes on where a checkpoint stood."""

from __future__ import annotations

import os
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

from torchtitan_upipe.data.chat import ChatStream, ChatTemplate, load_chat
from torchtitan_upipe.data.stream import DocumentStream, TokenStream
from torchtitan_upipe.data.text import load_local, load_stdlib, text_of

BEGIN_AGAIN = 'set checkpoint.exclude_from_loading = ["dataloader"] to begin this job\'s data at its start'


def register_datasets() -> None:
    """Add ``"stdlib"``, ``"local"`` and ``"chat"`` to the datasets that TorchTitan knows by name."""
    DATASETS["stdlib"] = DatasetConfig(path="", loader=load_stdlib, sample_processor=text_of)
    DATASETS["local"] = DatasetConfig(path="", loader=load_local, sample_processor=text_of)
    DATASETS["chat"] = DatasetConfig(path="", loader=load_chat, sample_processor=lambda row: row["messages"])


class Dataloader(ParallelAwareDataloader):
    """TorchTitan's loader of a :class:`DocumentStream`; any number of data-parallel ranks can load its state."""

    dataset: DocumentStream
    _saved_ranks: int | None = None

    def expect(self, ranks: int) -> None:
        """Let the next load ask a checkpoint for the states of the ``ranks`` data-parallel ranks that wrote it."""
        self._saved_ranks = ranks

    def state_dict(self) -> dict[str, Any]:
        """TorchTitan's, one entry a rank; between :meth:`expect` and the load an entry for each rank expected."""
        state = super().state_dict()
        if self._saved_ranks is not None:
            state |= {f"dp_rank_{rank}": b"" for rank in range(self._saved_ranks)}
            if self.dp_rank >= self._saved_ranks:
                del state[self._rank_id]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the ranks that wrote ``state_dict`` stood.

        Raises:
            ValueError: they read other data.
        """
        self._saved_ranks = None
        if not state_dict:
            return
        same = state_dict["world_size"] == self.dp_world_size
        names = [self._rank_id] if same else [f"dp_rank_{rank}" for rank in range(state_dict["world_size"])]
        if missing := [name for name in names if name not in state_dict]:
            raise ValueError(
                f"the data's state of {state_dict['world_size']} data-parallel ranks was loaded without {missing[0]}; "
                f"start the job with `torchrun -m torchtitan_upipe.train`, or {BEGIN_AGAIN}."
            )
        states = [pickle.loads(state_dict[name]) for name in names]
        try:
            self.dataset.load_states([_state_of_stream(state) for state in states])
        except ValueError as error:
            raise ValueError(f"{error} To train on other data, {BEGIN_AGAIN}.") from error
        if same and ("_snapshot" in states[0]) == (self.num_workers > 0):
            super().load_state_dict(state_dict)  # what is between the stream and the trainer, too
        else:
            self._begin()

    def restart(self) -> None:
        """Begin at the first document again."""
        self.dataset.restart()
        self._begin()

    def _begin(self) -> None:
        """Let a worker process that took its copy of the stream before go, with what it has read ahead."""
        super(ParallelAwareDataloader, self).load_state_dict({})


def _state_of_stream(loader_state: dict[str, Any]) -> dict[str, Any]:
    """The stream's part of the state of torchdata's loader, with or without a worker process."""
    if "_snapshot" in loader_state:
        (loader_state,) = loader_state["_snapshot"]["_worker_snapshots"].values()
    state: dict[str, Any] = loader_state["dataset_state"]
    return state


def build_dataloader(dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig) -> Dataloader:
    """The ``build_dataloader_fn`` of the plugin's train specs: ``[training] dataset``, again and again.

    Raises:
        ValueError: data that cannot be read.
    """
    return _build("training", job_config, dp_world_size, dp_rank, tokenizer, endless=True)


def build_validation_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig
) -> Dataloader:
    """``[validation] dataset``: again and again, or once if ``steps = -1``."""
    endless = job_config.validation.steps != -1
    return _build("validation", job_config, dp_world_size, dp_rank, tokenizer, endless)


def _build(
    section_name: str, job_config: JobConfig, ranks: int, rank: int, tokenizer: BaseTokenizer, endless: bool
) -> Dataloader:
    """A loader of the section ``[training]`` or ``[validation]``."""
    section = getattr(job_config, section_name)
    name = section.dataset.lower()
    config = DATASETS[name]
    path = section.dataset_path or config.path
    path = os.path.realpath(path) if path and Path(path).exists() else path  # one spelling, whatever the job's
    source = f"dataset {name!r}" + (f" at {path!r}" if path else "")
    try:
        rows = config.loader(path)
    except ValueError:
        raise
    except Exception as error:  # whatever a user's loader, a hub or a network raises
        raise ValueError(
            f"{source} cannot be opened ({type(error).__name__}: {str(error).partition(chr(10))[0]}); "
            f"set {section_name}.dataset, or {section_name}.dataset_path to a copy on this machine."
        ) from error
    stream = _stream(
        name, rows, section.seq_len, tokenizer, job_config, rank=rank, ranks=ranks, endless=endless, source=source
    )
    options = {**asdict(section.dataloader), "batch_size": section.local_batch_size}
    return Dataloader(stream, dp_rank=rank, dp_world_size=ranks, **options)


def _stream(
    name: str, rows: Any, seq_len: int, tokenizer: BaseTokenizer, job_config: JobConfig, **place: Any
) -> DocumentStream:
    """Sequences of the dataset ``name``; ``place`` are the other arguments of a :class:`DocumentStream`."""
    training = job_config.training
    if name == "chat":
        return ChatStream(
            rows,
            ChatTemplate(job_config.model.hf_assets_path),
            seq_len,
            packed=training.document_mask,
            cut=training.longer_conversations == "cut",
            **place,
        )
    return TokenStream(
        rows,
        DATASETS[name].sample_processor,
        lambda text: tokenizer.encode(text, add_bos=True, add_eos=True),
        seq_len,
        document_end=None if training.labels_across_documents else tokenizer.eos_id,
        **place,
    )
