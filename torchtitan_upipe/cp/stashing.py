"""What the methods share that keep a stash from forward to backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from torchtitan_upipe.stash.stash import Stash


class StashingMethod:
    """A method whose forward pass keeps attention's output and log-sum-exp for the backward pass.

    Args:
        new_stash: makes what keeps them until the backward pass has used them; None to compute them again there.
    """

    def __init__(self, new_stash: Callable[[], Stash] | None) -> None:
        self.new_stash = new_stash
        self._block_stash: Stash | None = None
        self._fill_block_stash = False

    @contextmanager
    def using(self, stash: Stash, *, fill: bool) -> Iterator[None]:
        """Let the calls made meanwhile use ``stash``: in backward and, if it is complete, instead of attention.

        Under activation checkpointing a block runs twice. Given the same stash both times, the second run finds there
        what the first has put, and computes neither attention nor exchange.

        Args:
            fill: put there what is computed.
        """
        self._block_stash, self._fill_block_stash = stash, fill
        try:
            yield
        finally:
            self._block_stash = None

    def stash_of_call(self) -> tuple[Stash, bool]:
        """The stash of the call that begins, and whether it puts there what it computes."""
        if self._block_stash is not None:
            return self._block_stash, self._fill_block_stash
        new_stash = self.new_stash if torch.is_grad_enabled() else None
        return (new_stash or Stash)(), new_stash is not None
