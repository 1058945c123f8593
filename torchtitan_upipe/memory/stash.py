"""The stash: what a stage keeps for the backward pass."""

from __future__ import annotations

from torch import Tensor


class Stash:
    """Attention output and log-sum-exp of each stage of one layer, in one forward pass.

    ``o [B, N, h, d]`` is kept in token layout (DESIGN: the stash and AC), so that running the block a second time needs
    neither attention nor an exchange. The stash only holds; who fills it and when is its owner's business.
    """

    def __init__(self) -> None:
        self._stages: dict[int, tuple[Tensor, Tensor]] = {}

    def put(self, stage: int, o: Tensor, lse: Tensor) -> None:
        """Keep ``o`` and ``lse [B, h, S]`` of ``stage``."""
        self._stages[stage] = (o, lse)

    def get(self, stage: int) -> tuple[Tensor, Tensor] | None:
        """``(o, lse)`` of ``stage``, which stay here, or None."""
        return self._stages.get(stage)

    def take(self, stage: int) -> tuple[Tensor, Tensor] | None:
        """``(o, lse)`` of ``stage``, which leave the stash, or None."""
        return self._stages.pop(stage, None)
