"""The project's texts under names that TorchTitan knows, and a data loader that goes on where a checkpoint stood."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

from torchtitan_upipe.data.chat import ChatStream, ChatTemplate, load_chat
from torchtitan_upipe.data.mixture import Mixture, Part, Source, read_mixture
from torchtitan_upipe.data.packing import PackedTexts
from torchtitan_upipe.data.reader import Reader
from torchtitan_upipe.data.stream import DocumentStream, TokenStream
from torchtitan_upipe.data.text import load_local, load_stdlib, text_of

MIXTURE = "mixture"
BEGIN_AGAIN = 'set checkpoint.exclude_from_loading = ["dataloader"] to begin this job\'s data at its start'


def register_datasets() -> None:
    """Add ``"stdlib"``, ``"local"``, ``"chat"`` and ``"mixture"`` to the datasets that TorchTitan knows by name."""
    DATASETS["stdlib"] = DatasetConfig(path="", loader=load_stdlib, sample_processor=text_of)
    DATASETS["local"] = DatasetConfig(path="", loader=load_local, sample_processor=text_of)
    DATASETS[MIXTURE] = DatasetConfig(path="", loader=read_mixture, sample_processor=text_of)
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

    def position(self) -> Callable[[], dict[str, Any]]:
        """What makes :meth:`state_dict` as of now, later; costs little now, however much waits to be packed."""
        state = super(ParallelAwareDataloader, self).state_dict()
        return lambda: {self._rank_id: pickle.dumps(state), "world_size": self.dp_world_size}

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


def read_documents(section_name: str, config: JobConfig, tokenizer: BaseTokenizer) -> tuple[str, Iterator[list[int]]]:
    """All documents of a section's text, the same on every rank: what the data is called, and their tokens."""
    section = getattr(config, section_name)
    reader = _reader(Source(section.dataset, section.dataset_path or ""), section_name, 0, 1)
    encode = _encoder(section.dataset.lower(), tokenizer)
    return reader.source, (encode(row) for row in reader.read_pass())


def _build(
    section_name: str, job_config: JobConfig, ranks: int, rank: int, tokenizer: BaseTokenizer, endless: bool
) -> Dataloader:
    """A loader of the section ``[training]`` or ``[validation]``."""
    section, training = getattr(job_config, section_name), job_config.training
    name, path = section.dataset.lower(), section.dataset_path

    def reader(source: Source) -> Reader:
        return _reader(source, section_name, rank, ranks)

    stream: DocumentStream
    encode: Callable[[Any], list[int]]
    if name == "chat":
        stream = ChatStream(
            reader(Source(name, path)),
            ChatTemplate(job_config.model.hf_assets_path),
            section.seq_len,
            packed=training.document_mask,
            cut=training.longer_conversations == "cut",
            endless=endless,
        )
    else:
        documents: Reader | Mixture
        if name == MIXTURE:
            parts = [Part(reader(s), _encoder(s.dataset.lower(), tokenizer), s) for s in read_mixture(path)]
            documents, encode = Mixture(parts), list  # of what is encoded already
        else:
            documents, encode = reader(Source(name, path)), _encoder(name, tokenizer)
        if training.packing == "first_fit":
            stream = PackedTexts(documents, encode, section.seq_len, marks=training.document_mask, endless=endless)
        else:
            end = None if training.labels_across_documents else tokenizer.eos_id
            stream = TokenStream(documents, encode, section.seq_len, document_end=end, endless=endless)
    loader = {**asdict(section.dataloader), "batch_size": section.local_batch_size}
    return Dataloader(stream, dp_rank=rank, dp_world_size=ranks, **loader)


@dataclass(frozen=True)
class _Encoder:
    """From a row of a dataset to its tokens, begin and end of the document included; goes to a loader's worker."""

    text_of_row: Callable[[Any], str]
    tokenizer: BaseTokenizer

    def __call__(self, row: Any) -> list[int]:
        return self.tokenizer.encode(self.text_of_row(row), add_bos=True, add_eos=True)


def _encoder(name: str, tokenizer: BaseTokenizer) -> _Encoder:
    return _Encoder(DATASETS[name].sample_processor, tokenizer)


def _reader(source: Source, section_name: str, rank: int, ranks: int) -> Reader:
    """The documents of ``source`` for this data-parallel rank."""
    name = source.dataset.lower()
    config = DATASETS[name]
    path = source.dataset_path or config.path
    path = os.path.realpath(path) if path and Path(path).exists() else path  # one spelling, whatever the job's
    described = f"dataset {name!r}" + (f" at {path!r}" if path else "")
    try:
        rows = config.loader(path)
    except ValueError:
        raise
    except Exception as error:  # whatever a user's loader, a hub or a network raises
        raise ValueError(
            f"{described} cannot be opened ({type(error).__name__}: {str(error).partition(chr(10))[0]}); "
            f"set {section_name}.dataset, or {section_name}.dataset_path to a copy on this machine."
        ) from error
    if source.min_tokens or source.max_tokens:
        described += f" ({source.min_tokens} to {source.max_tokens or 'any number of'} tokens)"
    return Reader(rows, rank=rank, ranks=ranks, source=described)
