"""What an evaluation found, as its JSON file has it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypedDict

from torchtitan.config import JobConfig


class NeedleResult(TypedDict):
    """Prompts of one length, depth and number of keys.

    ``exact_match`` is the share of them whose every answer token is the likeliest one, given those before it;
    ``log_probability`` that of the whole answer, in nats, mean over the prompts.
    """

    length: int
    depth: float
    keys: int
    trials: int
    exact_match: float
    log_probability: float


PositionLoss = TypedDict("PositionLoss", {"from": int, "to": int, "tokens": int, "loss": float})
"""Mean loss at positions ``from`` to ``to - 1`` of documents: so many tokens stand before the one that predicts."""


class ContextGain(TypedDict):
    """Loss of the same tokens with ``seq_len`` and with ``truncated_context`` tokens, and by how much it is lower."""

    truncated_context: int
    tokens: int
    full: float
    truncated: float
    gain: float


@dataclass(frozen=True)
class Results:
    """One evaluation; losses in nats a token.

    Attributes:
        step: of the weights.
        seq_len: ``training.seq_len``.
        needles: by length, depth and keys, in rising order; none if ``needle_trials = 0``.
        loss_by_position: in rising order; none if ``loss_sequences = 0``.
        loss_at: mean loss by length, ``str(length)``; ``seq_len`` among them.
        context_gain: None where no document reaches over the truncated context.
    """

    step: int
    seq_len: int
    needles: list[NeedleResult]
    loss_by_position: list[PositionLoss]
    loss_at: dict[str, float]
    context_gain: ContextGain | None

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(asdict(self), indent=2) + "\n")
        unfinished.replace(path)


def results_path(config: JobConfig, step: int) -> Path:
    """Where the evaluation of ``step`` is."""
    return Path(config.job.dump_folder) / config.evaluation.folder / f"step-{step}.json"


def read_results(path: Path) -> Results:
    """What ``path`` holds.

    Raises:
        ValueError: it is not there, or no evaluation's file.
    """
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"the evaluation {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"the evaluation {path} is no valid JSON: {error}.") from error
    names = {field.name for field in fields(Results)}
    if not isinstance(values, dict) or set(values) != names:
        raise ValueError(f"the evaluation {path} must hold {', '.join(sorted(names))}; evaluate again.")
    return Results(**values)
