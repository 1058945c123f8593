"""What the job's model, in the layout it trains with, thinks of given tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools.utils import device_type

from torchtitan_upipe.data.scored import Scored
from torchtitan_upipe.tiled.loss import IGNORE_INDEX, score_logits
from torchtitan_upipe.titan.batch import shard_batch
from torchtitan_upipe.titan.tiled import TiledOutput


def local_scores(model: nn.Module, inputs: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
    """Log-probability of each label of this rank's tokens, and 1 where it is the likeliest token.

    Rows without a label do not meet the output layer.

    Args:
        model: of this rank.
        inputs: token ids ``[B, N]``.
        labels: ``[B, N]`` int64; -100 = none.
        kwargs: the model's, of :func:`~torchtitan_upipe.titan.batch.shard_batch`.

    Returns:
        ``[2, B, N]`` float32, 0 for rows without a label.
    """
    output: Any = model.output
    if isinstance(output, TiledOutput):
        with output.given(labels, scores=True):
            return model(inputs, **kwargs)
    kept = labels != IGNORE_INDEX
    hook = output.register_forward_pre_hook(lambda _, args: (args[0][kept],))
    try:
        logits = model(inputs, **kwargs)  # [n, V]
    finally:
        hook.remove()
    scores = torch.zeros(2, *labels.shape, device=labels.device)
    scores[:, kept] = score_logits(logits, labels[kept]).float()
    return scores


@dataclass(frozen=True)
class Scorer:
    """Scores sequences on all ranks of a job at once.

    Args:
        config: the job.
        parallel_dims: its ranks.
        context: what the trainer runs a forward pass in.
        amp: its autocast.
    """

    config: JobConfig
    parallel_dims: ParallelDims
    context: Callable[[], AbstractContextManager[None]]
    amp: AbstractContextManager[None]

    @property
    def batch_ranks(self) -> int:
        """Data-parallel ranks, each with sequences of its own."""
        return self.parallel_dims.dp_replicate * self.parallel_dims.dp_shard

    def batch_size(self, length: int) -> int:
        """Sequences of ``length`` tokens in a pass over all ranks; a rank has no more tokens than in training."""
        training = self.config.training
        return self.batch_ranks * max(1, training.local_batch_size * training.seq_len // length)

    @torch.no_grad()
    def __call__(self, model: nn.Module, sequences: Sequence[Scored]) -> list[Tensor]:
        """Scores of each of at most :meth:`batch_size` sequences of one length, the same on all ranks.

        Returns:
            For each ``[2, n]`` float32, log-probability and 1 or 0, of its scored tokens in their order.
        """
        counts = [int(sequence.scored.sum()) for sequence in sequences]
        ends = torch.tensor([0, *counts]).cumsum(0)
        mesh = self.parallel_dims.get_optional_mesh("batch")
        rank = 0 if mesh is None else mesh.get_local_rank()
        mine = list(range(rank, len(sequences), self.batch_ranks))
        own = [sequences[i] for i in mine] or [sequences[0].unscored()]
        places = [ends[i] + sequences[i].scored.cumsum(0) - 1 for i in mine] or [torch.zeros_like(own[0].inputs)]
        inputs, labels, starts, place = (
            torch.stack(tensors).to(device_type)
            for tensors in ([s.inputs for s in own], [s.labels for s in own], [s.starts for s in own], places)
        )
        local_inputs, local_labels, kwargs = self._share(inputs, labels, starts)
        local_place, _, _ = self._share(place, labels, starts)
        with self.context(), self.amp:
            scores = local_scores(model, local_inputs, local_labels, **kwargs)
        kept = local_labels != IGNORE_INDEX
        total = torch.zeros(2, int(ends[-1]), device=device_type)
        total[:, local_place[kept]] = scores[:, kept]
        if self.parallel_dims.world_size > 1:
            dist.all_reduce(total, group=self.parallel_dims.get_mesh("loss").get_group())
        return list(total.cpu().split(counts, dim=1))

    def _share(self, values: Tensor, labels: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        marks = starts if self.config.training.document_mask else None
        return shard_batch(values, labels, self.parallel_dims, self.config, None, marks)
