"""The gate at the end of a recipe's stage: thresholds that its evaluation must reach before the next stage begins."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from statistics import mean
from typing import Any, Literal

from torchtitan.config import JobConfig

from torchtitan_upipe.job.evaluation import loss_lengths
from torchtitan_upipe.job.results import Results


@dataclass(frozen=True)
class Gate:
    """Table ``[stage.gate]``; what is not set is not asked for.

    Attributes:
        needle_exact_match: at least this share of the answers, over depths and keys, at each length of needles.
        needle_log_probability: at least this mean log-probability of an answer in nats, likewise.
        loss_at: by length in tokens, at most this loss in nats a token there.
        loss_increase: by length, at most so much more loss there than after the first stage.
    """

    needle_exact_match: float | None = None
    needle_log_probability: float | None = None
    loss_at: Mapping[int, float] = field(default_factory=dict)
    loss_increase: Mapping[int, float] = field(default_factory=dict)

    def check(self, config: JobConfig, first: JobConfig | None) -> None:
        """Refuse a gate that cannot be passed, whatever is trained.

        Args:
            config: the stage's job.
            first: the first stage's; None for the first stage itself.

        Raises:
            ValueError: the threshold that is out of reach or that nothing measures.
        """
        exact, log_probability = self.needle_exact_match, self.needle_log_probability
        if exact is not None and not 0 < exact <= 1:
            raise ValueError(f"gate.needle_exact_match = {exact:g} must be a share above 0 and of at most 1.")
        if log_probability is not None and not -math.inf < log_probability < 0:
            raise ValueError(f"gate.needle_log_probability = {log_probability:g} must be finite and below 0.")
        needles = exact is not None or log_probability is not None
        if needles and not (config.evaluation.enable and config.evaluation.needle_trials):
            raise ValueError(
                "gate: no evaluation measures needles; set evaluation.enable = true and evaluation.needle_trials above "
                "0, or remove the threshold."
            )
        if self.loss_increase and first is None:
            raise ValueError("gate.loss_increase compares with the first stage, which this one is; use gate.loss_at.")
        for name, thresholds in (("loss_at", self.loss_at), ("loss_increase", self.loss_increase)):
            for length, most in thresholds.items():
                if not 0 <= most < math.inf:
                    raise ValueError(f"gate.{name}.{length} = {most:g} must be finite and at least 0.")
                _check_measured(name, length, config, "this stage")
                if name == "loss_increase" and first is not None:
                    _check_measured(name, length, first, "the first stage")

    def shortfalls(self, results: Results, first: Results | None) -> Iterator[str]:
        """What is below or above its threshold, figure and threshold in words.

        Args:
            first: what was measured after the first stage; None for that stage itself.

        Raises:
            ValueError: the evaluation is one of before, when less was asked for.
        """
        if (least := self.needle_exact_match) is not None:
            for length, found in _needles(results, "exact_match").items():
                if not found >= least:  # NaN is below
                    yield f"needle_exact_match = {found:.4g} at {length} tokens is below {least:g}"
        if (least := self.needle_log_probability) is not None:
            for length, found in _needles(results, "log_probability").items():
                if not found >= least:
                    yield f"needle_log_probability = {found:.4g} at {length} tokens is below {least:g}"
        for length, most in self.loss_at.items():
            if not (loss := _loss_at(results, length)) <= most:
                yield f"loss_at.{length} = {loss:.4f} is above {most:g}"
        if first is not None:
            for length, most in self.loss_increase.items():
                if not (more := _loss_at(results, length) - _loss_at(first, length)) <= most:
                    yield f"loss_increase.{length} = {more:.4f} is above {most:g}"


def _needles(results: Results, name: Literal["exact_match", "log_probability"]) -> dict[int, float]:
    """The mean over depths and keys, by length."""
    lengths = sorted({needle["length"] for needle in results.needles})
    if not lengths:
        raise ValueError(f"the evaluation of step {results.step} has no needles; remove its file to evaluate again.")
    return {n: mean(needle[name] for needle in results.needles if needle["length"] == n) for n in lengths}


def _loss_at(results: Results, length: int) -> float:
    if str(length) not in results.loss_at:
        raise ValueError(
            f"the evaluation of step {results.step} has no loss at {length} tokens; remove its file to evaluate again."
        )
    return results.loss_at[str(length)]


def read_gate(table: object) -> Gate:
    """A gate from its table.

    Raises:
        ValueError: a field that is unknown or of the wrong type.
    """
    if not isinstance(table, dict):
        raise ValueError(f"gate = {table!r} must be a table of thresholds.")
    known = [each.name for each in fields(Gate)]
    for name, value in table.items():
        if name not in known:
            raise ValueError(f"unknown field gate.{name}; known are {', '.join(known)}.")
        lengths = name.startswith("loss_")
        if not (_by_length(value) if lengths else _is_number(value)):
            kind = 'a table of lengths, e.g. { "8192" = 2.5 }' if lengths else "a number"
            raise ValueError(f"gate.{name} = {value!r} must be {kind}.")
    by_length = {name: {int(n): v for n, v in table.get(name, {}).items()} for name in ("loss_at", "loss_increase")}
    return Gate(**{**table, **by_length})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _by_length(value: Any) -> bool:
    return isinstance(value, dict) and all(n.isdecimal() and _is_number(v) for n, v in value.items())


def _check_measured(name: str, length: int, config: JobConfig, who: str) -> None:
    evaluation = config.evaluation
    measured = loss_lengths(config) if evaluation.loss_sequences else []
    if not (evaluation.enable and length in measured):
        raise ValueError(
            f"gate.{name}.{length}: no evaluation of {who} measures the loss at {length} tokens; set evaluation.enable "
            f"= true and put {length} into evaluation.loss_lengths."
        )
