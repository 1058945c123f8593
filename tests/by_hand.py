"""Backward passes on fake CUDA tensors: autograd's own engine asks the device for a context, which is not there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node


def grad(output: Tensor, inputs: Sequence[Tensor], grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad`` with respect to leaves, node by node; None for a leaf that ``output`` does not use."""
    start = output.grad_fn
    assert start is not None
    waiting: dict[Node, list[Tensor | None]] = {start: [None] * len(start._input_metadata)}  # type: ignore[attr-defined]
    waiting[start][output.output_nr] = grad_output
    found: dict[Tensor, Tensor] = {}
    with torch.no_grad():
        for node in from_the_end(start):
            grads = waiting.pop(node)
            if type(node).__name__ == "AccumulateGrad":
                assert grads[0] is not None
                found[node.variable] = grads[0]  # type: ignore[attr-defined]
                continue
            for below, index, result in run(node, grads):
                sums = waiting.setdefault(below, [None] * len(below._input_metadata))  # type: ignore[attr-defined]
                before = sums[index]
                sums[index] = result if before is None else before + result
    return tuple(found.get(tensor) for tensor in inputs)


def run(node: Node, grads: Sequence[Tensor | None]) -> list[tuple[Node, int, Tensor]]:
    """Where the gradients of a node's inputs go, and these."""
    if isinstance(
        node, BackwardCFunction
    ):  # a function in Python, which answers for arguments that are no tensors, too
        answers = zip(node.apply(*grads), node.needs_input_grad, strict=True)  # type: ignore[attr-defined]
        results = tuple(result for result, needed in answers if needed)
    else:
        results = node(*grads)
        results = results if isinstance(results, tuple) else (results,)
        results = tuple(r for r, (below, _) in zip(results, node.next_functions, strict=True) if below is not None)
    targets = [(below, index) for below, index in node.next_functions if below is not None]
    return [(*to, result) for to, result in zip(targets, results, strict=True) if result is not None]


def from_the_end(start: Node) -> list[Node]:
    """``start`` and all nodes below it, each after those that use it."""
    finished: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node not in finished:
            for below, _ in node.next_functions:
                if below is not None:
                    visit(below)
            finished[node] = None

    visit(start)
    return list(reversed(finished))
