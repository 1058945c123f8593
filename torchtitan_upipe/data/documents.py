"""Where the documents packed into a sequence begin and end."""

from __future__ import annotations

import torch
from torch import Tensor

from torchtitan_upipe.kernels.visibility import Documents


def find_documents(inputs: Tensor, eos_id: int) -> Documents:
    """Documents end with the tokenizer's end-of-sequence token, as TorchTitan's datasets join them.

    Args:
        inputs: token ids ``[B, S]``.
        eos_id: the last token of each document. The last document of a sequence may go on in the next one.
    """
    batch, length = inputs.shape
    ends = (inputs[:, :-1] == eos_id).nonzero().tolist()  # a token at the very end begins nothing
    starts: list[list[int]] = [[0] if length else [] for _ in range(batch)]
    for row, end in ends:
        starts[row].append(end + 1)
    return Documents(tuple(tuple(row) for row in starts))


def documents_at(marks: Tensor) -> Documents:
    """Documents that begin where ``marks [B, S]``, bool, says; the first token of a sequence begins one."""
    return Documents(tuple(tuple(row.nonzero().flatten().tolist()) for row in marks))


def pad_documents(documents: Documents, length: int, padded_length: int) -> Documents:
    """The same documents, and what pads the sequences from ``length`` to ``padded_length`` as one more."""
    if padded_length == length:
        return documents
    return Documents(tuple((*starts, length) for starts in documents.starts))


def positions_in_documents(documents: Documents, length: int) -> Tensor:
    """Position of every token within its document: ``[B, length]`` int64."""
    positions = torch.arange(length)
    rows = []
    for starts in documents.starts:
        first = torch.zeros(length, dtype=torch.int64)
        first[list(starts)] = torch.tensor(starts)
        rows.append(positions - first.cummax(dim=0).values)
    return torch.stack(rows)
