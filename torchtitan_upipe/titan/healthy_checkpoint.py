"""Checkpoints of finite numbers alone, one of which can be asked for at any time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torchtitan.components.checkpoint import DATALOADER, MODEL, OPTIMIZER, AsyncMode

from torchtitan_upipe.titan.checkpoint import Checkpoints
from torchtitan_upipe.titan.health import first_of_all_ranks, nonfinite


@dataclass(frozen=True)
class Position:
    """Stands in the place of the data loader in a checkpoint of an earlier moment.

    Attributes:
        state_dict: makes the loader's state of that moment.
        load_state_dict: the loader's; asked for by torch, and not called.
    """

    state_dict: Callable[[], dict[str, Any]]
    load_state_dict: Callable[[dict[str, Any]], None]


class HealthyCheckpoints(Checkpoints):
    """The project's checkpoints; neither loaded nor saved with a number that is not finite."""

    _on_disk: int | None = None  # the newest step loaded or saved, or on its way

    @property
    def saves(self) -> bool:
        """Whether this job writes checkpoints."""
        return bool(self.enable and not self.load_only)

    def load(self, step: int = -1) -> bool:
        """TorchTitan's.

        Raises:
            ValueError: what was loaded is not finite.
        """
        resumes = self.enable and Path(self.folder).exists()  # else another job's weights are loaded
        loaded = super().load(step)
        if loaded:
            self._refuse_nonfinite("what this job was to start from is damaged", "name an earlier checkpoint.load_step")
        if loaded and resumes:
            self._on_disk = self.states["train_state"].step
        return loaded

    def save(self, curr_step: int, last_step: bool = False) -> None:
        """TorchTitan's.

        Raises:
            ValueError: a weight is not finite.
        """
        if self._should_save(curr_step, last_step):
            self._refuse_nonfinite(
                f"step {curr_step} is not saved", "resume from the checkpoint before, with a lower optimizer.lr"
            )
            self._on_disk = curr_step
        super().save(curr_step, last_step)

    def save_now(self, step: int, data: Callable[[], dict[str, Any]] | None) -> str:
        """Save ``step``, whatever the interval, and wait until it is on disk.

        Args:
            step: the last one finished.
            data: makes the data loader's state when that had finished; None if the loader still has it.

        Returns:
            Half a sentence: what was saved, where.
        """
        if not self.saves:
            return "nothing was saved, since checkpoint.enable is false or checkpoint.load_only true"
        if step == 0:
            return "nothing was saved, since there is nothing yet to save"
        self.wait()
        if step != self._on_disk:
            self.async_mode, self.save_future, self.interval = AsyncMode.DISABLED, None, 1
            if data is not None:
                self.states[DATALOADER] = Position(data, self.states[DATALOADER].load_state_dict)
            self.save(step)
        return f"it is saved in {self._create_checkpoint_id(step)}, from which the same command goes on"

    def _refuse_nonfinite(self, what: str, remedy: str) -> None:
        name = first_of_all_ranks(nonfinite(self._numbers()))
        if name is not None:
            raise ValueError(f"{name} holds numbers that are not finite: {what}; {remedy}.")

    def _numbers(self) -> Iterator[tuple[str, Tensor]]:
        """Weights, and what the optimizer keeps for them."""
        for part, optimizer in zip(self.states[MODEL].model, self.states[OPTIMIZER], strict=True):
            for name, weight in part.named_parameters():
                yield name, weight
                for kind, value in optimizer.state.get(weight, {}).items():
                    if isinstance(value, Tensor):
                        yield f"{kind} of {name}", value
