"""From a batch of whole sequences to one rank's share of it: documents, padding, shards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_upipe.data.documents import pad_documents, positions_in_documents
from torchtitan_upipe.data.sharding import length_divisor, shard_positions
from torchtitan_upipe.kernels.visibility import Documents
from torchtitan_upipe.tiled.loss import IGNORE_INDEX


@dataclass(frozen=True)
class Share:
    """A rank's share of a batch.

    Attributes:
        inputs: token ids ``[B, N]``.
        labels: ``[B, N]``.
        positions: ``[B, N]`` int64, of each token in its sequence, or in its document if there are any.
        documents: of the whole, padded sequences, or None for one document each.
    """

    inputs: Tensor
    labels: Tensor
    positions: Tensor
    documents: Documents | None


def share_of_rank(
    inputs: Tensor,
    labels: Tensor,
    rank: int,
    ulysses_degree: int,
    ring_degree: int,
    documents: Documents | None = None,
    sequence_chunk: int = 0,
) -> Share:
    """One rank's share, after the sequences are padded to what the group needs: ``N = ceil(S / C)`` or a few more.

    Args:
        inputs: token ids ``[B, S]``.
        labels: ``[B, S]``; padding is ignored.
        rank: rank within the context-parallel group of ``C = ulysses_degree * ring_degree``.
        documents: of the sequences before padding; None for one document a sequence.
        sequence_chunk: see :func:`~torchtitan_upipe.data.sharding.shard_positions`.
    """
    batch, length = inputs.shape
    padding = -length % length_divisor(ulysses_degree, ring_degree)
    mine = shard_positions(length + padding, rank, ulysses_degree, ring_degree, sequence_chunk)
    if documents is None:
        positions = torch.where(mine < length, mine, 0).expand(batch, -1)  # padding stands at 0
    else:
        documents = pad_documents(documents, length, length + padding)
        positions = positions_in_documents(documents, length + padding)[:, mine]
    inputs, labels = F.pad(inputs, (0, padding)), F.pad(labels, (0, padding), value=IGNORE_INDEX)
    mine = mine.to(inputs.device)
    return Share(inputs[:, mine], labels[:, mine], positions.to(inputs.device), documents)
