"""Inputs of checkpointed blocks in host memory between forward and backward."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from torchtitan_upipe.stash.host_pool import HostCopy, HostPool


class OffloadedBlock(CheckpointWrapper):
    """A block under full activation checkpointing whose input waits for the backward pass in host memory.

    Like every ``CheckpointWrapper``, invisible in the names of parameters.

    Args:
        block: takes its hidden states ``x [B, N, D]`` first.
        offload: shared by all blocks of the model.
        options: of ``torch.utils.checkpoint.checkpoint``.
    """

    def __init__(self, block: nn.Module, offload: BlockOffload, **options: Any) -> None:
        super().__init__(block, **options)
        self.offload = offload

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The block's own result."""
        with self.offload.keeping(x):
            return super().forward(x, *args, **kwargs)


class BlockOffload:
    """Moves block inputs to the host beside their block's forward, and back beside the backward of the block after.

    So at most two of them are on the device in the backward pass, whatever the number of blocks. The last block's
    input is fetched when it is needed: its backward begins too soon for anything else.
    """

    def __init__(self, pool: HostPool) -> None:
        self.pool = pool
        self._newest: weakref.ref[HostCopy] | None = None

    @contextmanager
    def keeping(self, x: Tensor) -> Iterator[None]:
        """Let what autograd saves of ``x`` itself in here go to the host; everything else stays where it is.

        Non-reentrant checkpointing saves a block's arguments under the hooks of its caller, and everything within the
        block under its own.
        """
        storage = x.untyped_storage()._cdata  # autograd keeps the hooks: they must not hold x

        def pack(saved: Tensor) -> Tensor | _Kept:
            if saved.untyped_storage()._cdata != storage:
                return saved
            kept = _Kept(self.pool.put(saved), self._newest)
            self._newest = weakref.ref(kept.copy)
            return kept

        with saved_tensors_hooks(pack, lambda kept: kept.get() if isinstance(kept, _Kept) else kept):
            yield
        newest = None if self._newest is None else self._newest()
        if newest is not None:
            newest.settle()


@dataclass(frozen=True)
class _Kept:
    """A block's input on the host, and that of the block before, which backward needs next."""

    copy: HostCopy
    before: weakref.ref[HostCopy] | None

    def get(self) -> Tensor:
        x = self.copy.get()
        before = None if self.before is None else self.before()
        if before is not None:
            before.fetch()
        return x
