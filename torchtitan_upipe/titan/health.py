"""Numbers that are not finite: seen before the optimizer acts on them, and traced to a rank, a layer and a batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.distributed import utils as dist_utils

from torchtitan_upipe.data.documents import documents_at, find_documents
from torchtitan_upipe.titan.hidden import tiles_of

Batch = tuple[dict[str, Tensor], Tensor]  # of the data loader: {"input": [B, S], ...}, labels [B, S]
Named = Iterable[tuple[str, Tensor]]


class StepSkippedError(Exception):
    """This step's gradients are dropped, on all ranks; says why."""


@dataclass
class StepUnderWay:
    """What a step has been given so far, and what came of it.

    Attributes:
        number: of the step.
        batches: its micro-batches, on the device or not.
        losses: this rank's share of each.
    """

    number: int
    batches: list[Batch] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    def noting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, remembered here."""
        for batch in batches:
            self.batches.append(batch)
            yield batch


@contextmanager
def judged_norm(judge: Callable[[Tensor], None]) -> Iterator[None]:
    """Within, ``judge`` sees the norm of TorchTitan's gradients before they are clipped by it.

    A norm that is no number makes a gradient none, too, wherever it is clipped; then nothing tells which one it was.
    """
    titans = dist_utils.clip_grad_norm_

    @torch.no_grad()
    def clip(parameters: Iterable[Tensor], max_norm: float, **_: object) -> Tensor:
        parameters = list(parameters)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        judge(norm)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
        return norm

    dist_utils.clip_grad_norm_ = clip
    try:
        yield
    finally:
        dist_utils.clip_grad_norm_ = titans


class Health:
    """Judges every step of a job, on all ranks alike.

    Args:
        model: whose gradients are judged.
        replay: the loss of a micro-batch once more, without gradients.
        folder: where the documents of a step go that was not finite.
        tokenizer: turns them into text.
        max_skipped: steps in a row whose gradients may be dropped.
        dumps: whether this rank writes its batches down, where they are to blame.
    """

    def __init__(
        self,
        model: nn.Module,
        replay: Callable[[Batch], Tensor],
        folder: Path,
        tokenizer: BaseTokenizer | None,
        max_skipped: int,
        dumps: bool,
    ) -> None:
        self.model = model
        self.replay = replay
        self.folder = folder
        self.tokenizer: Any = tokenizer
        self.max_skipped = max_skipped
        self.dumps = dumps
        self._skipped = 0  # in a row

    def judge(self, step: StepUnderWay, norm: Tensor) -> None:
        """Look at the step's losses and the norm of its gradients; on every rank, in the same order.

        Args:
            step: with all its losses.
            norm: of all gradients, the same on all ranks.

        Raises:
            StepSkippedError: one of them is not finite, and the step can be done without.
            ValueError: one of them is not finite.
        """
        finite = torch.stack(step.losses).isfinite().all()
        finite = finite & norm.isfinite().to(finite.device)
        bad = (~finite).int()
        dist.all_reduce(bad, dist.ReduceOp.MAX)
        if not bad.bool().item():
            self._skipped = 0
            return
        bad_losses = [not loss.isfinite().item() for loss in step.losses]
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, bad_losses)
        micro_batches = [m for m in range(len(step.batches)) if any(flags[m] for flags in everyones)]
        cause = self._cause(step, norm, micro_batches)
        folder = self.folder / f"step-{step.number}"
        if self.dumps:
            for number in micro_batches or range(len(step.batches)):
                write_documents(folder, number, step.batches[number], self.tokenizer)
        sentence = f"step {step.number}: {cause}; its documents are in {folder}"
        self._skipped += 1
        if self._skipped <= self.max_skipped:
            raise StepSkippedError(f"{sentence}; gradients dropped ({self._skipped} of {self.max_skipped} in a row)")
        raise ValueError(
            f"{sentence}; resume from the last checkpoint with other data or a lower optimizer.lr"
            + (f", after {self.max_skipped} steps that were skipped." if self.max_skipped else ".")
        )

    def _cause(self, step: StepUnderWay, norm: Tensor, micro_batches: list[int]) -> str:
        """What is not finite, and where it begins."""
        weight = first_of_all_ranks(nonfinite(self.model.named_parameters()))
        if weight is not None:
            return f"weight {weight} is not finite"
        if micro_batches:
            number = micro_batches[0]
            return f"the loss of micro-batch {number} is not finite: {self._first_output(step.batches[number])}"
        named = [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
        gradient = first_of_all_ranks(nonfinite(reversed(named)))  # backward begins at the last
        if gradient is None:
            return f"the gradient norm is {norm.item()}, too large for float32"
        return f"the gradient norm is {norm.item()}, with a finite loss: that of {gradient} is the first"

    def _first_output(self, batch: Batch) -> str:
        """The first module whose output is not finite in a second forward pass."""
        model: Any = self.model
        modules = [("tok_embeddings", model.tok_embeddings)]
        modules += [(f"layers.{name}", block) for name, block in model.layers.items()]
        found: list[str] = []

        def look(name: str, module: nn.Module, output: Tensor) -> None:
            if not found and any(not is_finite(tile) for tile in tiles_of(module, output)):
                found.append(name)

        hooks = [m.register_forward_hook(lambda m, _, output, n=name: look(n, m, output)) for name, m in modules]
        try:
            loss = self.replay(batch)
        finally:
            for hook in hooks:
                hook.remove()
        order = [name for name, _ in modules]
        first = first_of_all_ranks(found, order.index)
        if first is not None:
            return f"{first} is the first with such an output"
        if first_of_all_ranks([] if is_finite(loss) else ["loss"]) is not None:
            return "all blocks have finite outputs, the loss itself has not"
        return "a second forward pass is finite, which points to a fault of the hardware"


def is_finite(values: Tensor) -> bool:
    """Whether all of ``values`` are, without a copy of them; of a DTensor its local shard."""
    local = values.to_local() if isinstance(values, DTensor) else values
    if not local.is_floating_point() or local.numel() == 0:
        return True
    return bool(torch.linalg.vector_norm(local.detach(), torch.inf).isfinite().item())


def nonfinite(tensors: Named) -> Iterator[str]:
    """Names of ``tensors`` that hold numbers, on this rank, which are not finite."""
    return (name for name, values in tensors if not is_finite(values))


def first_of_all_ranks(names: Iterable[str], order: Callable[[str], Any] | None = None) -> str | None:
    """The first of ``names`` with the ranks that say the same, e.g. ``"layers.1 (ranks 0, 3)"``; None if all have none.

    Args:
        names: of this rank; all ranks must call.
        order: which of two ranks' names comes first; by default that of the lower rank.
    """
    firsts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(firsts, next(iter(names), None))
    found = [name for name in firsts if name is not None]
    if not found:
        return None
    name = min(found, key=order) if order else found[0]
    ranks = [str(rank) for rank, first in enumerate(firsts) if first == name]
    return f"{name} ({'ranks' if len(ranks) > 1 else 'rank'} {', '.join(ranks)})"


def write_documents(folder: Path, micro_batch: int, batch: Batch, tokenizer: Any) -> None:
    """One line of JSON for each document of ``batch``, with its place, its tokens and its text, in ``folder``."""
    inputs, starts = batch[0]["input"].cpu(), batch[0].get("starts")
    documents = find_documents(inputs, tokenizer.eos_id) if starts is None else documents_at(starts.cpu())
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"rank-{dist.get_rank()}-micro-batch-{micro_batch}.jsonl").open("w") as file:
        for row, begins in enumerate(documents.starts):
            for start, end in zip(begins, [*begins[1:], inputs.shape[1]], strict=True):
                tokens = inputs[row, start:end].tolist()
                line = {"row": row, "start": start, "text": tokenizer.decode(tokens), "tokens": tokens}
                print(json.dumps(line), file=file)
