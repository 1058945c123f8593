"""From a batch of whole sequences to this rank's share of it: documents, padding, shards."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.context_parallel import prepare_context_parallel_input

from torchtitan_upipe.data.documents import find_documents, pad_documents, positions_in_documents
from torchtitan_upipe.data.sharding import degrees, length_divisor, shard_positions


def shard_batch(
    inputs: Tensor, labels: Tensor, parallel_dims: ParallelDims, job_config: JobConfig, eos_id: int | None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """This rank's share of a batch, padded to what the group needs: ``N = ceil(S / C)`` tokens or a few more.

    Args:
        inputs: token ids ``[B, S]``.
        labels: ``[B, S]``.
        eos_id: the token that ends a document; read where the job asks for ``training.document_mask``.

    Returns:
        ``inputs [B, N]``, ``labels [B, N]`` (padding is ignored) and keyword arguments of the model: under context
        parallelism or with documents ``positions [B, N]``, with documents ``attention_masks``.

    Raises:
        ValueError: documents are asked for and the tokenizer has no end-of-sequence token.
    """
    mesh = parallel_dims.get_optional_mesh("cp")
    documents = None
    if job_config.training.document_mask:
        if eos_id is None:
            raise ValueError(
                "training.document_mask = true needs a tokenizer with an end-of-sequence token, which ends documents; "
                "choose another model.hf_assets_path or remove the field."
            )
        documents = find_documents(inputs, eos_id)
    if mesh is None and documents is None:
        return inputs, labels, {}

    cp = job_config.context_parallel
    if cp.method == "torchtitan":
        balancer = job_config.parallelism.context_parallel_load_balancer
        return prepare_context_parallel_input(inputs, labels, {}, mesh, inputs.device, balancer)
    rank, degree = (0, 1) if mesh is None else (mesh.get_local_rank(), mesh.size())
    layout = degrees(cp.method, degree, cp.ring_degree)
    batch, length = inputs.shape
    padding = -length % length_divisor(*layout)
    inputs, labels = F.pad(inputs, (0, padding)), F.pad(labels, (0, padding), value=IGNORE_INDEX)

    mine = shard_positions(length + padding, rank, *layout)
    if documents is None:
        positions = torch.where(mine < length, mine, 0).expand(batch, -1)  # padding stands at 0
        kwargs: dict[str, Any] = {}
    else:
        documents = pad_documents(documents, length, length + padding)
        positions = positions_in_documents(documents, length + padding)[:, mine]
        kwargs = {"attention_masks": documents}
    mine = mine.to(inputs.device)
    return inputs[:, mine], labels[:, mine], {"positions": positions.to(inputs.device), **kwargs}
