"""A batch of Transformers' collators to one rank's share of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchtitan_upipe.data.documents import pad_documents, positions_in_documents
from torchtitan_upipe.data.sharding import length_divisor, shard_positions
from torchtitan_upipe.huggingface.layout import WholeSequences, layout_of
from torchtitan_upipe.kernels.visibility import Documents
from torchtitan_upipe.tiled.loss import IGNORE_INDEX

READ = ("input_ids", "labels", "shift_labels", "position_ids", "attention_mask", "seq_idx")
SAID_AGAIN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # by position_ids or seq_idx


def shard_batch(
    batch: Mapping[str, Any],
    mesh: DeviceMesh | None,
    method: str = "upipe",
    ring_degree: int = 1,
    sequence_chunk: int = 0,
) -> dict[str, Any]:
    """This rank's share of a batch, padded to what the group needs: ``N = ceil(S / C)`` tokens or a few more.

    Packed documents begin where ``seq_idx`` changes or, without it, where ``position_ids`` do not rise by one. Padding
    at the end of a row is invisible to what stands before it.

    Args:
        batch: ``input_ids [B, S]`` and any of ``labels [B, S]`` (shifted here, as a model of Transformers does),
            ``shift_labels [B, S]`` (shifted already; they count where both are there), ``position_ids [B or 1, S]``,
            ``seq_idx [B, S]``, ``attention_mask [B, S]`` of rows padded on the right; lengths of documents for
            variable-length kernels, where ``position_ids`` or ``seq_idx`` say the same.
        mesh: of the context-parallel ranks, one-dimensional; None for one rank.
        method: as given to :func:`~torchtitan_upipe.huggingface.model.context_parallel`, as are the following.

    Returns:
        ``input_ids``, ``position_ids`` and, if there are labels, ``shift_labels``, all ``[B, N]``; and
        ``whole_sequences``, which the model's attention reads. All but ``shift_labels`` are arguments of the model;
        :func:`~torchtitan_upipe.huggingface.loss.summed_loss` takes the whole.

    Raises:
        ValueError: another mask, labels on padding, or fields that nothing here knows.
    """
    says_documents = batch.get("position_ids") is not None or batch.get("seq_idx") is not None
    known = READ + SAID_AGAIN if says_documents else READ
    unknown = sorted(name for name, value in batch.items() if name not in known and value is not None)
    if unknown or batch.get("input_ids") is None:
        raise ValueError(
            f"the batch holds {', '.join(unknown) or 'no input_ids'}; shard_batch takes input_ids and any of "
            f"{', '.join(READ[1:])}: let the collator return these alone."
        )
    layout = layout_of(mesh, method, ring_degree, sequence_chunk)
    inputs: Tensor = batch["input_ids"]
    size, length = inputs.shape
    ends = _ends(batch.get("attention_mask"), size, length)
    documents, positions = _documents(batch, ends)

    padding = -length % length_divisor(layout.ulysses_degree, layout.ring_degree)
    rank = 0 if mesh is None else mesh.get_local_rank()
    mine = shard_positions(length + padding, rank, layout.ulysses_degree, layout.ring_degree, layout.sequence_chunk).to(
        inputs.device
    )

    def share(tensor: Tensor, fill: int) -> Tensor:
        return F.pad(tensor, (0, padding), value=fill)[:, mine].contiguous()

    whole = WholeSequences(
        layout,
        None if documents is None else pad_documents(documents, length, length + padding),
        int(positions.max()) + 1,
    )
    result = {"input_ids": share(inputs, 0), "position_ids": share(positions, 0), "whole_sequences": whole}
    labels = shifted_labels(batch)
    if labels is not None:
        _check_labels(labels, ends)
        result["shift_labels"] = share(labels, IGNORE_INDEX)
    return result


def shifted_labels(batch: Mapping[str, Any]) -> Tensor | None:
    """What each token predicts, ``[B, S]``, or None."""
    if batch.get("shift_labels") is not None:
        return batch["shift_labels"]
    labels: Tensor | None = batch.get("labels")
    return None if labels is None else F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]


def _ends(mask: Tensor | None, size: int, length: int) -> list[int]:
    """Where the padding of each row begins.

    Raises:
        ValueError: the mask is not that of rows padded on the right.
    """
    if mask is None:
        return [length] * size
    if mask.shape != (size, length) or bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise ValueError(
            f"an attention_mask of shape {list(mask.shape)} is not that of {size} rows of {length} tokens padded on "
            'the right; set padding_side = "right" of the tokenizer, or pack documents and give their position_ids.'
        )
    return mask.bool().sum(1).tolist()


def _documents(batch: Mapping[str, Any], ends: list[int]) -> tuple[Documents | None, Tensor]:
    """The documents, None for one a row, and the positions ``[B, S]`` for RoPE, 0 in padding."""
    inputs: Tensor = batch["input_ids"]
    positions: Tensor | None = batch.get("position_ids")
    numbers: Tensor | None = batch.get("seq_idx")
    if positions is not None:
        positions = positions.expand(inputs.shape).long()
    if numbers is not None:
        begins = numbers[:, 1:] != numbers[:, :-1]
    elif positions is not None:
        begins = positions[:, 1:] != positions[:, :-1] + 1
    else:
        begins = torch.zeros_like(inputs[:, 1:], dtype=torch.bool)

    starts: list[list[int]] = [[0] for _ in ends]
    for row, before in begins.nonzero().tolist():
        if before + 1 < ends[row]:
            starts[row].append(before + 1)
    packed = any(len(row) > 1 for row in starts)
    for row, end in zip(starts, ends, strict=True):
        if packed and 0 < end < inputs.shape[1]:
            row.append(end)  # its padding, as one more
    documents = Documents(tuple(map(tuple, starts)))

    if positions is None:
        positions = positions_in_documents(documents, inputs.shape[1]).to(inputs.device)
    in_padding = torch.arange(inputs.shape[1]) >= torch.tensor(ends)[:, None]
    positions = positions.masked_fill(in_padding.to(inputs.device), 0)
    return (documents if packed else None), positions


def _check_labels(labels: Tensor, ends: list[int]) -> None:
    """Refuse labels on padding, whose logits depend on how it is padded."""
    if min(ends) == labels.shape[1]:
        return
    in_padding = torch.arange(labels.shape[1]) >= torch.tensor(ends)[:, None]
    if bool((labels.cpu()[in_padding] != IGNORE_INDEX).any()):
        raise ValueError(
            f"tokens that attention_mask calls padding have labels; set these to {IGNORE_INDEX}, as Transformers' own "
            "collators do."
        )
