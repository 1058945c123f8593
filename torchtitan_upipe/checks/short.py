"""The job made short: two layers and few tokens, with its method, groups, settings and, where they fit, widths."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.utils import device_type

from torchtitan_upipe.data.sharding import chunk_of, length_divisor
from torchtitan_upipe.device import memory_of_rank
from torchtitan_upipe.job.model import model_args
from torchtitan_upipe.job.pretrained import PretrainedArgs
from torchtitan_upipe.job.shape import JobShape, job_shape, own_elements
from torchtitan_upipe.titan.trainer import Trainer

PACKAGE = Path(__file__).parent.parent
LAYERS, STEPS = 2, 2
VOCABULARY = 2048
FEWEST, OF_A_RANK = {"cpu": 256, "cuda": 1024}, 16  # tokens of a short sequence
LONGER = {"cpu": 512, "cuda": 8192}  # of a rank, where memory and time are measured
CHUNKS = 6  # of such a sequence, at most
MOST_WEIGHTS = 8_000_000  # on CPU, for the sake of time
BYTES_OF_WEIGHT, SHARE = 32, 0.4  # of a device's memory, for one rank's model beside the job's
NARROW = 16  # width of a head where real widths do not fit


@dataclass(frozen=True)
class Short:
    """A short job.

    Attributes:
        config: for the project's trainer.
        longer: tokens of a sequence for measuring memory and time; ``training.seq_len`` of ``config`` are fewer.
        said: what is not the job's own, in words.
    """

    config: JobConfig
    longer: int
    said: str


def shorten(config: JobConfig, world_size: int) -> Short:
    """The job ``config``, whose settings are chosen, made short. Registers its model as one more flavor."""
    job, short = job_shape(config, world_size), copy.deepcopy(config)
    divisor = length_divisor(job.ulysses, job.ring)
    tokens = max(FEWEST[device_type], OF_A_RANK * job.ulysses * job.ring)
    length = _multiple(min(tokens, config.training.seq_len), divisor)
    length -= int(config.training.seq_len % divisor > 0)  # padded, as the job's are
    longer = _multiple(min(LONGER[device_type] * job.ulysses * job.ring, config.training.seq_len), divisor)
    _shorten_settings(short, job, length)
    if job.method == "fpdt":  # whose chunks are shorter now, and their pairs many
        longer = min(longer, _multiple(CHUNKS * short.context_parallel.sequence_chunk, divisor))
    widths = _shorten_model(short, config, world_size)
    said = f"{LAYERS} of {job.model.layers} layers, {length:,} of {config.training.seq_len:,} tokens, {widths}"
    return Short(short, longer, said)


def _multiple(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor


def _shorten_settings(short: JobConfig, job: JobShape, length: int) -> None:
    training, cp, own = short.training, short.context_parallel, length // (job.ulysses * job.ring)
    batches = job.replicas * job.shards // (job.ulysses * job.ring)
    accumulates = training.global_batch_size > training.local_batch_size * batches
    training.local_batch_size = min(training.local_batch_size, 2)
    training.global_batch_size = training.local_batch_size * batches * (2 if accumulates else 1)
    training.seq_len, training.steps = length, STEPS + 2
    training.max_norm = math.inf  # gradients are compared unclipped
    training.dataset, training.dataset_path = "stdlib", str(PACKAGE / "memory")
    cp.tile_size = min(cp.tile_size, (own // 2 + 1) * training.local_batch_size)
    if cp.method == "fpdt":
        degree = job.ulysses * job.ring
        cp.sequence_chunk = min(cp.sequence_chunk, max(chunk_of("fpdt", degree, length // 3), degree))
    cp.query_tiles = min(cp.query_tiles, max(own, 1))
    short.model.hf_assets_path = str(PACKAGE / "assets/tokenizer")
    short.checkpoint.enable = short.validation.enable = False
    short.profiling.enable_profiling = short.profiling.enable_memory_snapshot = False
    short.metrics.enable_tensorboard = short.metrics.enable_wandb = False
    short.metrics.log_freq = 1
    short.debug.seed = short.debug.seed or 0  # a seed drawn by rank 0 would be sent before anything is checked


def _shorten_model(short: JobConfig, config: JobConfig, world_size: int) -> str:
    """Give ``short`` a model of two layers; say which of its widths are the job's."""
    args: Any = model_args(config)
    small: dict[str, Any] = {"n_layers": LAYERS, "vocab_size": min(args.vocab_size, VOCABULARY)}
    if isinstance(args, PretrainedArgs):  # what it reads its shape from again, if it differs
        small["assets"] = short.model.hf_assets_path
    elements = _register(short, config, replace(args, **small), "")
    on_device = SHARE * memory_of_rank(device_type) / BYTES_OF_WEIGHT
    if elements <= (min(MOST_WEIGHTS, on_device) if device_type == "cpu" else on_device):
        return f"real widths, {small['vocab_size']:,} of {args.vocab_size:,} entries of the vocabulary"
    heads = args.n_heads
    narrow: dict[str, Any] = {"dim": heads * NARROW, "head_dim": NARROW, "hidden_dim": 2 * heads * NARROW}
    narrow |= {"multiple_of": NARROW, "ffn_dim_multiplier": None}
    known = {field.name for field in fields(args)}
    _register(short, config, replace(args, **small, **{k: v for k, v in narrow.items() if k in known}), "narrow ")
    return f"heads of {NARROW} and a model of {heads * NARROW} ({elements:,} weights of real widths are too many here)"


def _register(short: JobConfig, config: JobConfig, args: Any, kind: str) -> int:
    """Register ``args`` as the flavor of ``short``; return the number of its weights."""
    short.model.flavor = f"{kind}check of {config.model.flavor} {config.model.hf_assets_path}"  # shapes are cached
    flavors: Any = get_train_spec(config.model.name).model_args
    flavors[short.model.flavor] = args
    return own_elements(job_shape(short, 1).weights, 1)


@dataclass(frozen=True)
class Batch:
    """One step's sequences of all data-parallel ranks and micro-batches, on CPU.

    Attributes:
        tokens: ``[R, L]`` int64.
        labels: ``[R, L]``, some of them ignored.
        starts: ``[R, L]`` bool, where documents begin; all True at 0 alone without ``training.document_mask``.
    """

    tokens: Tensor
    labels: Tensor
    starts: Tensor

    def rows(self, start: int, stop: int) -> Batch:
        """Some of the sequences."""
        return Batch(self.tokens[start:stop], self.labels[start:stop], self.starts[start:stop])

    def changed(self, token: int, vocabulary: int) -> Batch:
        """The same, with another token at position ``token`` of every sequence."""
        tokens = self.tokens.clone()
        tokens[:, token] = (tokens[:, token] + 1) % vocabulary
        return Batch(tokens, self.labels, self.starts)


def draw_batch(sequences: int, length: int, vocabulary: int, documents: bool, seed: int) -> Batch:
    """Any tokens, the same on all ranks; three documents of other lengths in each sequence, or one."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(vocabulary, (sequences, length + 1), generator=generator)
    starts = torch.zeros(sequences, length, dtype=torch.bool)
    starts[:, 0] = True
    labels = drawn[:, 1:].clone()
    for row in range(sequences if documents else 0):
        ends = length // 3 - row % 5, 2 * length // 3 + row % 7
        starts[row, list(ends)] = True
        labels[row, [end - 1 for end in ends]] = IGNORE_INDEX
    return Batch(drawn[:, :-1], labels, starts)


class ShortTrainer(Trainer):
    """The project's trainer on batches that it is given.

    Attributes:
        logged: loss and gradient norm of every step, as TorchTitan logs them.
    """

    def __init__(self, short: Short) -> None:
        super().__init__(short.config)
        self.short, self.rank = short, dist.get_rank()
        self.logged: list[tuple[float, float]] = []
        self.metrics_processor.log = self._keep

    @property
    def documents(self) -> bool:
        """Whether sequences hold several documents."""
        return bool(self.job_config.training.document_mask)

    @property
    def vocabulary(self) -> int:
        """Tokens that the short model knows."""
        args: Any = self.model_args
        return int(args.vocab_size)

    def draw(self, seed: int, length: int = 0) -> Batch:
        """A batch of the whole job, of sequences of ``length`` tokens."""
        training = self.job_config.training
        sequences = training.global_batch_size
        return draw_batch(sequences, length or training.seq_len, self.vocabulary, self.documents, seed)

    def own(self, batch: Batch) -> Batch:
        """This data-parallel rank's sequences."""
        mesh = self.parallel_dims.get_mesh("batch") if self.parallel_dims.dp_enabled else None
        rank, size = (0, 1) if mesh is None else (mesh.get_local_rank(), mesh.size())
        each = len(batch.tokens) // size
        return batch.rows(rank * each, (rank + 1) * each)

    def step_on(self, batch: Batch) -> None:
        """One training step."""
        self.step += 1
        self.train_step(self.batch_generator(self._micro_batches(self.own(batch))))

    def _micro_batches(self, own: Batch) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        size = self.job_config.training.local_batch_size
        for start in range(0, len(own.tokens), size):
            part = own.rows(start, start + size)
            yield inputs_of(part, self.documents), part.labels

    def _keep(self, step: int, loss: float, worst: float, grad_norm: float, *args: Any, **kwargs: Any) -> None:
        self.logged.append((float(loss), float(grad_norm)))


def inputs_of(batch: Batch, documents: bool) -> dict[str, Tensor]:
    """What a data loader yields beside labels."""
    return {"input": batch.tokens} | ({"starts": batch.starts} if documents else {})


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Within, ``model`` keeps nothing for a backward pass."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()
