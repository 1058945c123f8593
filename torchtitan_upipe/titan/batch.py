"""A batch of TorchTitan's trainer to this rank's share of it."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.context_parallel import prepare_context_parallel_input

from torchtitan_upipe.data.batch import share_of_rank
from torchtitan_upipe.data.documents import documents_at, find_documents
from torchtitan_upipe.data.sharding import chunk_of, degrees


def shard_batch(
    inputs: Tensor,
    labels: Tensor,
    parallel_dims: ParallelDims,
    job_config: JobConfig,
    eos_id: int | None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """This rank's share of a batch, padded to what the group needs: ``N = ceil(S / C)`` tokens or a few more.

    Args:
        inputs: token ids ``[B, S]``.
        labels: ``[B, S]``.
        eos_id: the token that ends a document; read where the job asks for ``training.document_mask``.
        starts: ``[B, S]`` bool, where documents begin, if the data says so; then ``eos_id`` is not read.

    Returns:
        ``inputs [B, N]``, ``labels [B, N]`` (padding is ignored) and keyword arguments of the model: under context
        parallelism or with documents ``positions [B, N]``, with documents ``attention_masks``.

    Raises:
        ValueError: documents are asked for and the tokenizer has no end-of-sequence token.
    """
    cp, document_mask = job_config.context_parallel, job_config.training.document_mask
    if document_mask and starts is None and eos_id is None:
        raise ValueError(
            "training.document_mask = true needs a tokenizer with an end-of-sequence token, which ends documents; "
            "choose another model.hf_assets_path or remove the field."
        )
    mesh = parallel_dims.get_optional_mesh("cp")
    if mesh is None and not document_mask:
        return inputs, labels, {}
    if cp.method == "torchtitan":
        balancer = job_config.parallelism.context_parallel_load_balancer
        return prepare_context_parallel_input(inputs, labels, {}, mesh, inputs.device, balancer)
    rank, degree = (0, 1) if mesh is None else (mesh.get_local_rank(), mesh.size())
    layout = degrees(cp.method, degree, cp.ring_degree)
    documents = None
    if document_mask:
        documents = find_documents(inputs, cast(int, eos_id)) if starts is None else documents_at(starts)
    share = share_of_rank(
        inputs,
        labels,
        rank,
        *layout,
        documents=documents,
        sequence_chunk=chunk_of(cp.method, degree, cp.sequence_chunk),
    )
    kwargs: dict[str, Any] = {"positions": share.positions}
    if share.documents is not None:
        kwargs["attention_masks"] = share.documents
    return share.inputs, share.labels, kwargs
