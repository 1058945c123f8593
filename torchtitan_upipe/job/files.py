"""What a job finds on disk, looked at before anything is allocated: tokenizer, data, checkpoints, room to write."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torchtitan.config import JobConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

from torchtitan_upipe.data.mixture import read_mixture

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")


def check_files(config: JobConfig, vocab_size: int) -> None:
    """Refuse a job whose files are not there or cannot be used.

    Args:
        vocab_size: of the model.

    Raises:
        ValueError: the first thing that is wrong.
    """
    _check_tokenizer(Path(config.model.hf_assets_path), vocab_size)
    _check_dataset("training", config.training)
    _check_chat(config)
    if config.validation.enable:
        _check_dataset("validation", config.validation)
    if config.evaluation.enable and config.evaluation.dataset:
        _check_dataset("evaluation", config.evaluation)
    if config.checkpoint.enable:
        _check_checkpoints(config)
    _check_room(config)


def _check_tokenizer(assets: Path, vocab_size: int) -> None:
    if not any((assets / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"model.hf_assets_path = {str(assets)!r} holds no tokenizer (tokenizer.json, vocab.json or vocab.txt); "
            'use "./torchtitan_upipe/assets/tokenizer" for a first run, or a downloaded model folder.'
        )
    path = assets / TOKENIZER_FILES[0]
    if not path.is_file():
        return
    try:
        tokens = Tokenizer.from_file(str(path)).get_vocab_size()
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"the tokenizer {path} cannot be read ({error}); download it again.") from error
    if tokens > vocab_size:
        raise ValueError(
            f"the tokenizer {path} has {tokens} tokens, and the model's vocabulary {vocab_size}; choose the "
            "model.flavor that belongs to model.hf_assets_path."
        )


def _check_dataset(name: str, section: Any) -> None:
    """Refuse what is known not to be there without reading it; the data loader reads on and says the rest."""
    dataset, path = section.dataset.lower(), section.dataset_path
    if dataset == "mixture":
        _check_mixture(name, path)
        return
    if dataset not in DATASETS:
        raise ValueError(
            f"{name}.dataset = {section.dataset!r} is unknown; choose one of {', '.join(sorted(DATASETS))}."
        )
    if dataset in ("local", "chat") and not path:
        raise ValueError(f'{name}.dataset = "{dataset}" needs {name}.dataset_path, a file or a folder.')
    if path and dataset in ("local", "chat", "stdlib") and not Path(path).exists():
        raise ValueError(f"{name}.dataset_path = {path!r} does not exist.")
    default = DATASETS[dataset].path
    if not path and default.startswith("tests/") and not Path(default).exists():
        raise ValueError(
            f"{name}.dataset = {section.dataset!r} reads {default}, which is part of TorchTitan's source tree and not "
            f'here; set {name}.dataset_path, or use dataset = "stdlib".'
        )


def _check_mixture(name: str, path: str | None) -> None:
    if not path:
        raise ValueError(f'{name}.dataset = "mixture" needs {name}.dataset_path, a TOML file of tables [[source]].')
    if name == "validation":
        raise ValueError('validation.dataset = "mixture" has no end and no one number to compare; name one dataset.')
    for number, source in enumerate(read_mixture(path), 1):
        place = f"{path}, source {number}"
        if source.dataset.lower() in ("chat", "mixture"):
            raise ValueError(f"{place}: a mixture is of texts, and dataset = {source.dataset!r} is none.")
        _check_dataset(place, source)


def _check_chat(config: JobConfig) -> None:
    """Refuse options of other data than the job's."""
    training = config.training
    sections = [training, config.validation] if config.validation.enable else [training]
    chat = [section.dataset.lower() == "chat" for section in sections]
    if training.longer_conversations != "drop" and not any(chat):
        raise ValueError(
            f'training.longer_conversations = "{training.longer_conversations}" is about conversations, and no dataset '
            'is "chat"; remove it.'
        )
    if training.packing != "join" and all(chat):
        raise ValueError(
            f'training.packing = "{training.packing}" is about text; conversations share sequences where '
            "training.document_mask = true; remove it."
        )
    if training.labels_across_documents and training.packing != "join":
        raise ValueError(
            f'training.labels_across_documents = true joins documents, and training.packing = "{training.packing}" '
            "keeps them apart; remove one."
        )
    if training.labels_across_documents and all(chat):
        raise ValueError(
            "training.labels_across_documents = true is about text, and a conversation never predicts the next one; "
            "remove it."
        )


def _check_checkpoints(config: JobConfig) -> None:
    checkpoint = config.checkpoint
    if checkpoint.last_save_in_hf and not (checkpoint.last_save_model_only or checkpoint.load_only):
        raise ValueError(
            "checkpoint.last_save_in_hf = true saves a model only, and would fail after the last step; set "
            "checkpoint.last_save_model_only = true."
        )
    folder = Path(config.job.dump_folder) / checkpoint.folder
    step = checkpoint.load_step
    if step != -1 and not (folder / f"step-{step}").is_dir():
        steps = sorted(int(m[1]) for p in folder.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name)))
        raise ValueError(
            f"checkpoint.load_step = {step} is not in {folder}, which holds "
            f"{'steps ' + ', '.join(map(str, steps)) if steps else 'no checkpoint'}; choose one of these, or -1."
        )
    if any(folder.glob("step-*/.metadata")) or any(folder.glob("step-*/model.safetensors*")):
        return  # which TorchTitan then goes on from
    if folder.exists() and (checkpoint.initial_load_path or checkpoint.initial_load_in_hf):
        raise ValueError(
            f"{folder} exists but holds no complete checkpoint; TorchTitan would load nothing from there and not what "
            "checkpoint.initial_load_path or initial_load_in_hf names; remove the folder."
        )
    source = Path(checkpoint.initial_load_path or config.model.hf_assets_path)
    if checkpoint.initial_load_path and not source.is_dir():
        raise ValueError(f"checkpoint.initial_load_path = {str(source)!r} is not a folder.")
    if checkpoint.initial_load_in_hf and not any(source.glob("*.safetensors")):
        raise ValueError(
            f"checkpoint.initial_load_in_hf = true, but {str(source)!r} holds no weights (*.safetensors); set "
            "checkpoint.initial_load_path to the downloaded model's folder."
        )
    if checkpoint.initial_load_in_hf and not checkpoint.initial_load_model_only:
        raise ValueError(
            "checkpoint.initial_load_in_hf = true loads a model only; set checkpoint.initial_load_model_only = true."
        )


def _check_room(config: JobConfig) -> None:
    """Refuse folders that nothing can be written to, which training would find at its first save."""
    dump = Path(config.job.dump_folder)
    folders = {
        "job.dump_folder": (dump, config.metrics.enable_tensorboard or config.profiling.enable_profiling),
        "evaluation.folder": (dump / config.evaluation.folder, config.evaluation.enable),
        "checkpoint.folder": (
            dump / config.checkpoint.folder,
            config.checkpoint.enable and not config.checkpoint.load_only,
        ),
    }
    for name, (folder, written) in folders.items():
        if not written:
            continue
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        try:
            with tempfile.TemporaryDirectory(dir=there):
                pass
        except OSError as error:
            raise ValueError(
                f"{name}: nothing can be written to {folder} ({error.strerror}: {there}); choose another folder."
            ) from error
