"""The plugin's part of a TorchTitan job file; name it in ``[job] custom_config_module``.

No ``from __future__ import annotations`` here: TorchTitan merges nested sections by their types, not by strings.
"""

from dataclasses import dataclass, field
from typing import Literal

import torchtitan.config.job_config as titan


@dataclass
class ContextParallel:
    """Section ``[context_parallel]``: how attention is spread over ``[parallelism] context_parallel_degree`` ranks."""

    method: Literal["upipe", "ulysses", "ring", "fpdt", "torchtitan"] = "upipe"
    """
    "upipe" walks through the heads in chunks, "ulysses" handles all heads at once; both exchange sequence shards for
    head shards. "ring" keeps the shards and passes keys and values around. "fpdt" walks through the sequence in chunks,
    all heads at once. "torchtitan" is TorchTitan's own context parallelism, for comparison; CUDA only.
    """

    settings: Literal["manual", "auto"] = "manual"
    """
    "auto": head_chunk, query_tiles, sequence_chunk, stash, stash_budget_gib, tile_size and [activation_checkpoint] mode
    and offload become those with which the job is predicted to be fastest on the device at hand, among those that fit
    into its memory (docs/time.md); a line of the log names them. Where one of these fields is set by hand as well, to
    other than its default, the job is refused, since one of the two would not count.
    `python -m torchtitan_upipe.plan --write` keeps a choice in a file.
    """

    head_chunk: int = 0
    """
    UPipe: query heads of the whole group per stage (U), any number up to the model's heads; rounded down to what keeps
    all ranks equally busy, a multiple or a divisor of the ulysses degree. 0 = the fastest, by the model of time, with
    which the job fits into the device's memory, by the ledger.
    """

    ring_degree: int = 1
    """
    More than 1: hybrid (USP). The context-parallel degree is ulysses_degree x ring_degree: all-to-alls among
    neighbouring ranks, a ring across. For "ulysses" and "upipe"; "ring" always takes all ranks.
    """

    sequence_chunk: int = 65536
    """
    FPDT: tokens of the whole sequence in a chunk, rounded down to a multiple of the context-parallel degree; the last
    chunk may be shorter. Queries, keys and values of a chunk wait in host memory (pinned on CUDA) for other chunks.
    """

    attention_kernel: Literal["auto", "sdpa", "cudnn", "flash2", "flash3", "reference"] = "auto"
    """
    "sdpa" is PyTorch's own flash operator (CPU and CUDA); "cudnn", "flash2" (flash-attn) and "flash3" run on CUDA;
    "reference" is eager float32. "auto" is "flash3" where it is installed on Hopper, else "sdpa", or what
    `assets/kernel_rates.json` says is faster than that on the device.
    """

    query_tiles: int = 1
    """
    UPipe: slices of the queries in each stage, which run one after another against the same keys and values. More of
    them take less memory and more, smaller kernel calls.
    """

    stash: Literal["none", "device", "host"] = "device"
    """
    UPipe and FPDT: what a stage or chunk keeps for the backward pass. "device" keeps attention output and log-sum-exp,
    "host" moves them to host memory (pinned on CUDA); "none" keeps nothing and computes attention again in backward.
    """

    stash_budget_gib: float = 0.0
    """
    stash = "host": host memory of a rank in GiB for stashes; layers beyond it compute attention again. 0 = no limit.
    """

    tile_size: int = 0
    """
    Rows per tile of norm, MLP and loss, for every method; 0 = no tiling. 32768 is right for long runs: the tiles' inner
    tensors stay small beside the hidden states, and the matrix products large.
    """

    hidden_states: Literal["device", "host"] = "device"
    """
    Where whole hidden states and their gradients are. "host": in host memory (pinned on CUDA), of which blocks, the
    embedding and the loss read and write tiles of tile_size rows; on the device are weights, keys and values of one KV
    set and tiles. For "upipe", "ulysses" and "ring", with mode = "full" of activation checkpointing, whose block inputs
    are there already, and stash = "host" or "none".
    """


@dataclass
class RopeScaling:
    """Section ``[model.rope_scaling]``: how RoPE is stretched to a longer context, as Transformers does it."""

    type: Literal["model", "none", "linear", "llama3", "yarn"] = "model"
    """
    "model" is the model's own: of its flavor, or of config.json. "none" leaves frequencies as `rope_theta` makes them,
    "linear" divides all by `factor`, "llama3" those of long wavelengths, "yarn" those of few turns within the original
    context. A field of another type is refused.
    """

    factor: float = 0.0
    """"linear", "llama3" and "yarn": by how much the context grows, at least 1."""

    original_max_position_embeddings: int = 0
    """"llama3" and "yarn": tokens of the context before; 0 = what config.json or the flavor says."""

    low_freq_factor: float = 1.0
    """"llama3": wavelengths longer than the original context divided by this are stretched by `factor`."""

    high_freq_factor: float = 4.0
    """"llama3": wavelengths shorter than the original context divided by this are kept."""

    beta_fast: float = 32.0
    """"yarn" (its beta): frequencies of more turns than this within the original context are kept."""

    beta_slow: float = 1.0
    """"yarn" (its alpha): frequencies of fewer turns than this within the original context are divided by `factor`."""

    attention_factor: float = 0.0
    """"yarn": what rotated queries and keys are multiplied by; 0 = 0.1 ln(factor) + 1."""


@dataclass
class Model(titan.Model):
    """TorchTitan's section with the job's RoPE.

    With flavor = "hf" the model's shape and RoPE are those of config.json in `hf_assets_path`: Llama, Mistral without
    a window (name = "llama3_upipe") or dense Qwen3 ("qwen3_upipe").
    """

    rope_theta: float | None = None
    """Base of RoPE's frequencies. None: the model's own."""

    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    """How RoPE is stretched to a longer context."""


@dataclass
class Parallelism(titan.Parallelism):
    """TorchTitan's section with one other default."""

    context_parallel_load_balancer: str | None = None
    """
    None: what the method needs, contiguous shards for Ulysses and UPipe, zigzag ("headtail") for ring, slices of chunks
    for FPDT. TorchTitan's default is "headtail".
    """


@dataclass
class Training(titan.Training):
    """TorchTitan's section with more fields.

    Beside TorchTitan's datasets there are "stdlib", "local", "chat" (.jsonl or .parquet with `messages`) and "mixture",
    whose `dataset_path` is a TOML file of tables [[source]]: `dataset`, `dataset_path`, `weight` (share of the tokens),
    `min_tokens` and `max_tokens` (of a document).
    """

    document_mask: bool = False
    """
    Packed documents: tokens attend within their own document only (block-causal), and positions start anew in each.
    Documents end with the tokenizer's end-of-sequence token.
    """

    packing: Literal["join", "first_fit"] = "join"
    """
    Text: "join" cuts the documents, one joined to the next, into sequences; "first_fit" puts each whole into the first
    of a few open sequences with room, which are padded, and cuts only what is longer than a sequence.
    """

    longer_conversations: Literal["drop", "cut"] = "drop"
    """
    dataset = "chat": what becomes of a conversation with more tokens than a sequence, in training and validation; "cut"
    keeps its beginning. With document_mask several conversations share a sequence, else each has its own, padded.
    """

    labels_across_documents: bool = False
    """
    Whether the last token of a document, the end-of-sequence token, is trained to predict the first one of the next
    document, as in TorchTitan's own data; else that label is ignored, in training and validation, with and without
    document_mask.
    """


@dataclass
class ActivationCheckpoint(titan.ActivationCheckpoint):
    """TorchTitan's section with one more field."""

    offload: bool = False
    """
    With mode = "full": block inputs wait for the backward pass in host memory (pinned on CUDA), moved beside the
    computation.
    """


@dataclass
class Health:
    """Section ``[health]``: what becomes of a step whose loss or gradient norm is not finite (docs/running.md).

    It is seen on all ranks before the optimizer steps. The step's documents go to a file below `job.dump_folder`.
    """

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """"stop" ends the job with a sentence; "skip" drops the step's gradients, says so, and goes on."""

    max_skipped: int = 3
    """"skip": steps in a row that may be dropped; one more ends the job."""


@dataclass
class Evaluation:
    """Section ``[evaluation]``: what the model makes of a long context, in the layout it trains with.

    In training every `freq` steps and after the last one, or of a job's weights by
    ``python -m torchtitan_upipe.evaluate``; written to `<job.dump_folder>/<folder>/step-N.json` (docs/evaluation.md).
    """

    enable: bool = False
    """Evaluate in training. The evaluate command does so whatever is said here."""

    freq: int = 500
    """Steps from one evaluation to the next; the last step is evaluated, too."""

    dataset: str = ""
    """Text around needles and of losses; "" = that of `[validation]` if it is enabled, else of `[training]`."""

    dataset_path: str | None = None
    """Path of `dataset`."""

    needle_lengths: list[int] = field(default_factory=list)
    """Tokens of a prompt with a needle, at most training.seq_len; [] = that length and its halves, four at most."""

    needle_depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Where in the text the needle is: 0 = at the beginning, 1 = just before the question."""

    needle_keys: list[int] = field(default_factory=lambda: [1, 4])
    """Needles in a prompt, of which one is asked for. 1 = one needle; k = k - 1 distractors elsewhere in the text."""

    needle_trials: int = 2
    """Prompts for each length, depth and number of keys; 0 = no needles."""

    needle: str = "\nThe secret number of {key} is {value}.\n"
    """Template of a needle."""

    question: str = "\nWhat is the secret number of {key}? The secret number of {key} is "
    """Template of the question; the answer, a value, follows at once, and both are tokenized together."""

    needle_names: str = ""
    """A text file of keys, one a line; "" = names of cities."""

    needle_values: str = ""
    """A text file of values, one a line; "" = random numbers of six digits."""

    loss_sequences: int = 4
    """Sequences of each length whose loss is taken; 0 = no losses. They begin with the longest documents."""

    loss_lengths: list[int] = field(default_factory=list)
    """Shorter lengths whose loss is taken beside that of training.seq_len, e.g. the model's context before."""

    truncated_context: int = 0
    """
    What training.seq_len tokens of context gain over this many: the loss of a sequence's last tokens, of half this
    number, is taken with both. 0 = a quarter of training.seq_len.
    """

    seed: int = 0
    """Which keys, values and text the prompts have."""

    folder: str = "evaluation"
    """Below `job.dump_folder`."""

    plots: bool = True
    """Draw the heat map of needles and the curve of losses (PNG); needs matplotlib."""


@dataclass
class JobConfig:
    """What ``custom_config_module`` merges into TorchTitan's ``JobConfig``."""

    context_parallel: ContextParallel = field(default_factory=ContextParallel)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    parallelism: Parallelism = field(default_factory=Parallelism)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    health: Health = field(default_factory=Health)
    evaluation: Evaluation = field(default_factory=Evaluation)
