"""The section ``[evaluation]``: what its defaults stand for, and whether it can be done."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

from torchtitan.config import JobConfig

from torchtitan_upipe.data.needles import NAMES, NUMBERS
from torchtitan_upipe.data.rows import decode

LENGTHS = 4  # of needle prompts by default
SHORTEST = 128  # tokens of the shortest of them: those of a question and some text
TEXTLESS = ("chat", "mixture")


def needle_lengths(config: JobConfig) -> list[int]:
    """Lengths of prompts, rising: those of the job, or ``seq_len`` and its halves."""
    seq_len = config.training.seq_len
    halves = [seq_len >> power for power in range(LENGTHS)]
    return sorted(set(config.evaluation.needle_lengths)) or sorted(n for n in halves if n >= SHORTEST or n == seq_len)


def loss_lengths(config: JobConfig) -> list[int]:
    """Lengths of the sequences whose loss is taken, rising; ``seq_len`` is the last."""
    return sorted({*config.evaluation.loss_lengths, config.training.seq_len})


def truncated_context(config: JobConfig) -> int:
    """Tokens of the truncated context."""
    return config.evaluation.truncated_context or config.training.seq_len // 4


def text_section(config: JobConfig) -> str:
    """The section whose ``dataset`` is the text of evaluation."""
    if config.evaluation.dataset:
        return "evaluation"
    return "validation" if config.validation.enable else "training"


def needle_names(config: JobConfig) -> Sequence[str]:
    """Keys to draw from."""
    path = config.evaluation.needle_names
    return _lines("needle_names", path) if path else NAMES


def needle_values(config: JobConfig) -> Sequence[object]:
    """Values to draw from."""
    path = config.evaluation.needle_values
    return _lines("needle_values", path) if path else NUMBERS


def check_evaluation(config: JobConfig) -> None:
    """Refuse an evaluation that cannot be done as written.

    Raises:
        ValueError: the first thing that is wrong.
    """
    evaluation = config.evaluation
    for name, least in {"freq": 1, "needle_trials": 0, "loss_sequences": 0}.items():
        if (count := getattr(evaluation, name)) < least:
            raise ValueError(f"evaluation.{name} = {count} must be at least {least}.")
    if evaluation.needle_trials == 0 and evaluation.loss_sequences == 0:
        raise ValueError(
            "evaluation.needle_trials = 0 and evaluation.loss_sequences = 0 leave nothing to evaluate; set one of them."
        )
    if not evaluation.folder:
        raise ValueError('evaluation.folder = "" names no folder; leave it out, or name one.')
    if evaluation.dataset_path is not None and not evaluation.dataset:
        raise ValueError(
            f"evaluation.dataset_path = {evaluation.dataset_path!r} belongs to evaluation.dataset, which is not set; "
            'set it, e.g. to "local".'
        )
    section = text_section(config)
    if (dataset := getattr(config, section).dataset.lower()) in TEXTLESS:
        raise ValueError(
            f'{section}.dataset = "{dataset}" is no text that an evaluation can read; name one in evaluation.dataset.'
        )
    if evaluation.needle_trials:
        _check_needles(config)
    if evaluation.loss_sequences:
        _check_losses(config)
    if evaluation.plots and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("evaluation.plots = true needs matplotlib; install it, or set evaluation.plots = false.")


def _check_needles(config: JobConfig) -> None:
    evaluation = config.evaluation
    _check_lengths(config, "needle_lengths")
    for depth in evaluation.needle_depths:
        if not 0 <= depth <= 1:  # nor NaN
            raise ValueError(
                f"evaluation.needle_depths holds {depth:g}, and must be between 0 (the beginning) and 1 (the end)."
            )
    for name in ("needle_depths", "needle_keys"):
        if not getattr(evaluation, name):
            raise ValueError(f"evaluation.{name} = [] leaves no prompt; set evaluation.needle_trials = 0 for none.")
    fields = {"needle": ("{key}", "{value}"), "question": ("{key}",)}
    for name, wanted in fields.items():
        for part in wanted:
            if part not in getattr(evaluation, name):
                raise ValueError(f"evaluation.{name} = {getattr(evaluation, name)!r} must hold {part}.")
    if "{value}" in evaluation.question:
        raise ValueError(
            f"evaluation.question = {evaluation.question!r} must not hold {{value}}, the answer, which follows it."
        )
    most = min(len(needle_names(config)), len(needle_values(config)))
    for keys in evaluation.needle_keys:
        if not 1 <= keys <= most:
            raise ValueError(
                f"evaluation.needle_keys holds {keys}, and must be between 1 and {most}, the names and values to draw "
                "from (evaluation.needle_names, evaluation.needle_values)."
            )


def _check_losses(config: JobConfig) -> None:
    _check_lengths(config, "loss_lengths")
    seq_len, context = config.training.seq_len, truncated_context(config)
    least = max(2, config.parallelism.context_parallel_degree)
    if not least <= context < seq_len:
        raise ValueError(
            f"evaluation.truncated_context = {config.evaluation.truncated_context} must be at least {least} and below "
            f"training.seq_len = {seq_len}."
        )
    _check_length(config, "truncated_context", context)


def _check_lengths(config: JobConfig, name: str) -> None:
    for length in getattr(config.evaluation, name):
        if length > config.training.seq_len:
            raise ValueError(
                f"evaluation.{name} holds {length}, more than training.seq_len = {config.training.seq_len}, for which "
                "the job is laid out; leave it out, or lengthen training.seq_len."
            )
        _check_length(config, name, length)


def _check_length(config: JobConfig, name: str, length: int) -> None:
    """Refuse a length that the layout of the job cannot take."""
    degree, cp = config.parallelism.context_parallel_degree, config.context_parallel
    least = max(2, degree * cp.query_tiles)
    if length < least:
        raise ValueError(
            f"evaluation.{name} holds {length}, and must be at least {least}: a token for each of {degree} "
            f"context-parallel ranks and {cp.query_tiles} query tiles."
        )
    if cp.method == "torchtitan" and length % (2 * degree):
        near = math.ceil(length / (2 * degree)) * 2 * degree
        raise ValueError(
            f"evaluation.{name} holds {length}, which must be a multiple of {2 * degree} (twice "
            f'context_parallel_degree) for method = "torchtitan", which does not pad; nearest: {near}.'
        )


def _lines(name: str, path: str) -> list[str]:
    """The lines of a file, without blank ones."""
    try:
        text = decode(Path(path).read_bytes(), path)
    except OSError as error:
        raise ValueError(f"evaluation.{name} = {path!r} cannot be read ({error.strerror}).") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"evaluation.{name} = {path!r} has no line of text.")
    if len(set(lines)) < len(lines):
        twice = next(line for line in lines if lines.count(line) > 1)
        raise ValueError(f"evaluation.{name} = {path!r} names {twice!r} twice; each line must be another.")
    return lines
