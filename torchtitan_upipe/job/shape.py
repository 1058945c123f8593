"""What the ledger's formulas need to know of a job: sizes, dtypes and switches of one rank. Allocates nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import torch
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.protocols.train_spec import get_train_spec

from torchtitan_upipe.data.sharding import chunk_of, degrees, length_divisor
from torchtitan_upipe.job.model import args_of

STASHING = ("upipe", "fpdt")  # the methods to which `stash` applies
HIDDEN_ON_HOST = ("upipe", "ulysses", "ring")  # those that take rows of hidden states wherever they are


@dataclass(frozen=True)
class ModelShape:
    """One flavor; ``block`` are the shapes of the weights of one block, ``(rows, columns)`` or ``(rows,)``."""

    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    tied: bool
    qk_norm: bool
    block: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class JobShape:
    """One rank of a job.

    Attributes:
        model: the flavor.
        batch: ``B``, sequences of a micro-batch.
        length: ``S``, padded.
        ulysses: ranks of the all-to-all.
        ring: ranks of the ring.
        replicas: groups of ranks that each hold all weights.
        shards: ranks over which FSDP2 shards; 1 = no FSDP2, unless the state is on the host.
        element: bytes of an element in which activations are computed.
        stored: bytes of an element in which parameters and their gradients' shards are kept.
        reduced: bytes of an element in which gradients are reduced.
        sequence_chunk: tokens of a chunk of the sequence; 0 where there are none.
        hidden_on_host: hidden states are in host memory, and the device works on tiles of them.
        state_on_host: FSDP2 keeps parameters, gradients and the optimizer's state in host memory.
        stash_budget: host bytes for the stashes of all layers; 0 = no limit.
        kernel: ``context_parallel.attention_kernel``.
        deterministic: ``debug.deterministic``.
        workspace: count what the attention kernel's backward holds beside its results.
    """

    model: ModelShape
    batch: int
    length: int
    rank: int
    ulysses: int
    ring: int
    replicas: int
    shards: int
    element: int
    stored: int
    reduced: int
    state_on_host: bool
    method: str
    head_chunk: int
    sequence_chunk: int
    query_tiles: int
    stash: str
    stash_budget: float
    tile_size: int
    checkpoint: bool
    offload: bool
    hidden_on_host: bool
    positions: bool
    kernel: str
    deterministic: bool
    workspace: bool

    @property
    def fsdp(self) -> bool:
        """Whether weights belong to FSDP2, on a mesh of one, too."""
        return self.shards > 1 or self.state_on_host

    @property
    def can_move_state(self) -> bool:
        """Whether ``training.enable_cpu_offload`` would move anything, and has not."""
        return not self.state_on_host and (self.shards > 1 or self.replicas == 1)

    @property
    def tokens(self) -> int:
        """``N``, tokens of this rank in each sequence."""
        return self.length // (self.ulysses * self.ring)

    @property
    def rows(self) -> int:
        """``B * N``."""
        return self.batch * self.tokens

    @property
    def hidden(self) -> int:
        """Bytes of one hidden tensor ``[B, N, D]``."""
        return self.rows * self.model.dim * self.element

    @property
    def staged(self) -> bool:
        """Whether ``stash`` applies: the method, or hidden states on the host, walk through stages or chunks."""
        return self.method in STASHING or self.hidden_on_host

    @property
    def tile_rows(self) -> int:
        """Tokens of a tile in each sequence, where hidden states are in host memory."""
        return min(max(self.tile_size // self.batch, 1), self.tokens)

    @property
    def tile(self) -> int:
        """Bytes of such a tile."""
        return self.batch * self.tile_rows * self.model.dim * self.element

    @property
    def narrowed(self) -> bool:
        """Whether activations are narrower than stored parameters."""
        return self.element < self.stored

    @property
    def wide(self) -> int:
        """Bytes of an element of a sum."""
        return max(self.element, 4)

    def stash_of(self, layer: int) -> str:
        """What ``layer`` keeps of its stages: with a budget on the host, later layers keep nothing."""
        if self.stash != "host" or self.stash_budget == 0:
            return self.stash
        return "host" if layer < int(self.stash_budget / self.stash_bytes) else "none"

    @property
    def stash_bytes(self) -> int:
        """Bytes of one layer's stash: ``o`` and ``lse``."""
        return self.heads(self.model.heads) + self.rows * self.model.heads * self.wide

    @property
    def weights(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of all weights of the model: embedding, output, norms, blocks."""
        ends = [(self.model.vocab, self.model.dim)] * (1 if self.model.tied else 2)
        return (*ends, (self.model.dim,), *self.model.block * self.model.layers)

    @property
    def own_elements(self) -> int:
        """Elements of the weights that this rank holds."""
        return own_elements(self.weights, self.shards)

    def heads(self, count: int, rows: int | None = None, element: int | None = None) -> int:
        """Bytes of ``[B, rows, count, d]``; ``rows`` are this rank's tokens unless given."""
        return self.batch * (rows or self.tokens) * count * self.model.head_dim * (element or self.element)


def job_shape(config: JobConfig, world_size: int | None = None, rank: int = 0, workspace: bool = True) -> JobShape:
    """The shape of ``config``'s job.

    Args:
        world_size: ranks of the job; by default what started this process says, else what the parallel degrees need.
        rank: the rank that is looked at.
        workspace: see :class:`JobShape`.

    Raises:
        ValueError: the method is TorchTitan's own context parallelism.
    """
    if config.context_parallel.method == "torchtitan":
        raise ValueError(
            'memory is not predicted for method = "torchtitan"; choose "upipe", "ulysses", "ring" or "fpdt".'
        )
    training, parallel, cp = config.training, config.parallelism, config.context_parallel
    degree = parallel.context_parallel_degree
    world_size = world_size or int(os.environ.get("WORLD_SIZE", needed_ranks(config)))
    shards = world_size // parallel.data_parallel_replicate_degree
    ulysses, ring = degrees(cp.method, degree, cp.ring_degree)
    divisor = length_divisor(ulysses, ring)
    fsdp = shards > 1 or training.enable_cpu_offload
    computed = training.mixed_precision_param if fsdp or training.dtype != "bfloat16" else training.dtype
    model = model_shape(config)
    return JobShape(
        model=model,
        batch=training.local_batch_size,
        length=-(-training.seq_len // divisor) * divisor,
        rank=rank % degree,
        ulysses=ulysses,
        ring=ring,
        replicas=parallel.data_parallel_replicate_degree,
        shards=shards,
        element=_bytes(computed),
        stored=_bytes(training.dtype),
        reduced=_bytes(training.mixed_precision_reduce),
        state_on_host=training.enable_cpu_offload,
        method=cp.method,
        head_chunk=cp.head_chunk or model.heads,
        sequence_chunk=chunk_of(cp.method, degree, cp.sequence_chunk),
        query_tiles=cp.query_tiles,
        stash=cp.stash,
        stash_budget=cp.stash_budget_gib * 2**30,
        tile_size=cp.tile_size,
        checkpoint=config.activation_checkpoint.mode == "full",
        offload=config.activation_checkpoint.offload,
        hidden_on_host=cp.hidden_states == "host",
        positions=degree > 1 or training.document_mask,
        kernel=cp.attention_kernel,
        deterministic=config.debug.deterministic,
        workspace=workspace,
    )


def needed_ranks(config: JobConfig) -> int:
    """Ranks that the job's degrees multiply to; a sharding degree left open counts as 1."""
    p = config.parallelism
    return p.context_parallel_degree * p.data_parallel_replicate_degree * max(p.data_parallel_shard_degree, 1)


def model_shape(config: JobConfig) -> ModelShape:
    """Shapes of the job's model, read from one of one layer that holds no data."""
    return shape_of_flavor(config.model.name, config.model.flavor, config.model.hf_assets_path)


@cache
def shape_of_flavor(name: str, flavor: str, assets: str = "") -> ModelShape:
    """The same by names; ``assets`` is the folder of flavor ``"hf"``."""
    args: Any = args_of(name, flavor, assets)
    with torch.device("meta"):
        model: Any = get_train_spec(name).model_cls(replace(args, n_layers=1))
    block = model.layers["0"]
    return ModelShape(
        layers=args.n_layers,
        dim=args.dim,
        heads=args.n_heads,
        kv_heads=args.n_kv_heads or args.n_heads,
        head_dim=block.attention.head_dim,
        inner=block.feed_forward.w1.out_features,
        vocab=args.vocab_size,
        tied=getattr(args, "enable_weight_tying", False),
        qk_norm=getattr(block.attention, "q_norm", None) is not None,
        block=tuple(tuple(p.shape) for p in block.parameters()),
    )


def shard_elements(shape: tuple[int, ...], shards: int) -> int:
    """Elements of a weight that a rank holds: FSDP2 cuts the rows, padded."""
    return -(-shape[0] // shards) * prod(shape[1:])


@cache
def own_elements(job_weights: tuple[tuple[int, ...], ...], shards: int) -> int:
    """Elements that a rank holds of all these weights."""
    return sum(shard_elements(shape, shards) for shape in job_weights)


def _bytes(dtype: str) -> int:
    return TORCH_DTYPE_MAP[dtype].itemsize
