"""Which part of a training step is running, and what the storages that it makes are for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from torchtitan_upipe.dry_run.live_bytes import LiveBytes

# Code that is known by its name, whatever part of the model calls it: prefix of module.function -> category, moment.
CALLERS: dict[str, tuple[str, str | None] | None] = {
    "torch.utils.checkpoint.": None,  # a second run, whoever has asked for it
    "torch.optim.": ("optimizer", "optimizer step"),
    "torch.distributed.fsdp.": ("communication", None),
    "torchtitan.components.loss": ("loss", "loss forward"),
    "torch.nn.utils.clip_grad": ("other", "gradient clipping"),
    "torchtitan_upipe.kernels.simulated.workspace": ("workspace", None),
    "torchtitan_upipe.tiled.loss": ("loss", None),
    "torchtitan_upipe.tiled.": ("tiles", None),
}

PREFIXES = tuple(CALLERS)
PARTS = {"attention": "attention stage", "feed_forward": "tiles", "attention_norm": "tiles", "ffn_norm": "tiles"}
HEAD = ("norm", "output")  # the model's own children after the last block


class Moments:
    """The observer of a model's training step (see :class:`~torchtitan_upipe.dry_run.live_bytes.Observer`).

    Hooks on the blocks and their parts tell where forward, and through gradients backward, stands.
    """

    def __init__(self) -> None:
        self.phase = "batch"
        self._forward: list[str] = []
        self._backward: list[str] = []
        self._weight_shapes: set[tuple[int, ...]] = set()

    @contextmanager
    def watching(self, model: nn.Module, meter: LiveBytes) -> Iterator[None]:
        """Follow ``model``, whose parameters and buffers exist by now, until the end of the ``with`` block."""
        meter.retag("parameters", *model.parameters())
        meter.retag("other", *model.buffers())
        self._weight_shapes = {tuple(p.shape) for p in model.parameters() if p.dim() > 1}
        handles = []
        for name, module in _parts(model):
            part = _Part(self, meter, name)
            handles.append(module.register_forward_pre_hook(part.enter))
            handles.append(module.register_forward_hook(part.leave, always_call=True))
        for parameter in model.parameters():
            handles.append(parameter.register_post_accumulate_grad_hook(lambda p: meter.retag("gradients", p.grad)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def category(self, func: Any, result: Tensor) -> str:
        """See :class:`~torchtitan_upipe.dry_run.live_bytes.Observer`."""
        in_backward = _in_backward()
        if in_backward and tuple(result.shape) in self._weight_shapes:
            return "gradients"
        caller = _caller()
        if caller is not None:
            return caller[0]
        place = self._place()
        if place is None:
            return "loss" if in_backward else "other"
        last = place.rpartition(".")[2]
        return PARTS.get(last) or ("loss" if place in HEAD else "block inputs")

    def moment(self) -> str:
        """See :class:`~torchtitan_upipe.dry_run.live_bytes.Observer`; e.g. ``"layers.7.attention backward"``."""
        caller = _caller()
        if caller is not None and caller[1] is not None:
            return caller[1]
        if self._forward:
            return f"{self._forward[-1]} {'second forward' if _in_backward() else 'forward'}"
        if _in_backward():
            return f"{self._backward[-1]} backward" if self._backward else "loss backward"
        return self.phase

    def _place(self) -> str | None:
        for stack in (self._forward, self._backward if _in_backward() else []):
            if stack:
                return stack[-1]
        return None


class _Part:
    """Hooks of one part of the model."""

    def __init__(self, moments: Moments, meter: LiveBytes, name: str) -> None:
        self.moments = moments
        self.meter = meter
        self.name = name
        self.category = PARTS.get(name.rpartition(".")[2])
        self.before: set[int] = set()

    def enter(self, module: nn.Module, args: Any) -> None:
        self.moments._forward.append(self.name)
        if not _in_backward():
            self.moments._backward.clear()  # what was last in the step before has no input to end it
        self.before = self.meter.keys() if self.category else set()
        for tensor in tree_iter(args):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                self.meter.retag("block inputs", tensor)
                tensor.register_hook(self.leave_backward)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.name in self.moments._forward:
            self.moments._forward.remove(self.name)
        if not _in_backward():
            self.moments.phase = "loss forward" if self.name in HEAD else "forward"
        if self.category:
            self.meter.retag_since(self.before, self.category, "saved")
        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                if self.name not in HEAD:
                    self.meter.retag("block inputs", tensor)
                tensor.register_hook(self.enter_backward)

    def enter_backward(self, grad: Tensor) -> None:
        if self.name not in self.moments._backward:
            self.moments._backward.append(self.name)

    def leave_backward(self, grad: Tensor) -> None:
        self.meter.retag("block inputs", grad)
        stack = self.moments._backward
        if self.name in stack:
            del stack[stack.index(self.name) :]


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_children():
        if name != "layers":
            yield name, module
            continue
        for index, block in module.named_children():
            yield f"layers.{index}", block
            inner: Any = getattr(block, "_checkpoint_wrapped_module", block)
            for part in PARTS:
                yield f"layers.{index}.{part}", getattr(inner, part)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _caller() -> tuple[str, str | None] | None:
    frame = sys._getframe(2)
    while frame is not None:
        name = f"{frame.f_globals.get('__name__', '')}.{frame.f_code.co_name}"
        if name.startswith(PREFIXES):
            return next(known for prefix, known in CALLERS.items() if name.startswith(prefix))
        frame = frame.f_back  # type: ignore[assignment]
    return None
