"""Put a context-parallel method in the place of a model's attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from torchtitan_upipe.cp.build import build_method
from torchtitan_upipe.huggingface.adopt import adopt
from torchtitan_upipe.huggingface.attention import ContextParallelAttention, check_linear
from torchtitan_upipe.huggingface.layers import StashedLayer, TiledLayer
from torchtitan_upipe.huggingface.layout import groups_of, layout_of
from torchtitan_upipe.huggingface.loss import FinalNorm, LossTask, TiledOutput
from torchtitan_upipe.huggingface.rope import NoTable, RopeOfConfig
from torchtitan_upipe.kernels.select import build_kernel, check_kernel
from torchtitan_upipe.stash.host_pool import HostPool
from torchtitan_upipe.stash.stash import Stash

MODELS = ("llama", "mistral", "qwen2", "qwen3")  # model_type of a config
IMPLEMENTATION = "context_parallel"  # a name that Transformers does not know: it builds no mask for it


def context_parallel(
    model: nn.Module,
    mesh: DeviceMesh | None,
    method: str = "upipe",
    head_chunk: int = 8,
    ring_degree: int = 1,
    stash: str = "device",
    query_tiles: int = 1,
    sequence_chunk: int = 0,
    tile_size: int = 0,
    attention_kernel: str = "auto",
    device_type: str | None = None,
) -> nn.Module:
    """Let ``model`` work on a share of each sequence, in place; every module and parameter keeps its name.

    Before or after ``fully_shard``, which must take whole blocks. Gradients of a rank are those of its tokens: their
    sum over the ranks of ``mesh`` is the gradient, their mean what FSDP2 makes of them.

    Args:
        model: a ``ForCausalLM`` of Llama, Mistral, Qwen2 or Qwen3, with or without adapters on its feed-forward.
        mesh: of the context-parallel ranks, one-dimensional; None for one rank.
        method: ``"upipe"``, ``"ulysses"``, ``"ring"`` or ``"fpdt"``.
        head_chunk: query heads of the whole group in a stage, 0 = all; ``"upipe"`` only, which rounds it as
            docs/design.md says ("The head schedule").
        ring_degree: more than 1: a hybrid of ``"ulysses"`` or ``"upipe"`` with a ring; a divisor of the ranks.
        stash: where attention's outputs wait for the backward pass: ``"device"``, ``"host"``, or ``"none"`` to compute
            them again; ``"upipe"`` and ``"fpdt"``.
        query_tiles: slices of the queries in each stage; ``"upipe"`` only.
        sequence_chunk: tokens of a chunk of the whole sequence, 0 = all; ``"fpdt"`` only.
        tile_size: rows per tile of norms, feed-forward and loss; 0 = Transformers' own modules.
        attention_kernel: ``"auto"``, ``"sdpa"``, ``"cudnn"``, ``"flash2"``, ``"flash3"`` or ``"reference"``.
        device_type: of the device that the model will run on; by default that of the mesh, or of the model now.

    Returns:
        ``model``.

    Raises:
        ValueError: the model or the combination is not supported.
    """
    causal_lm: Any = model
    if hasattr(model, "get_base_model"):  # an adapter's wrapper
        causal_lm = causal_lm.get_base_model()
    _check_model(causal_lm)
    _check_options(method, head_chunk, stash, query_tiles, tile_size)
    if tile_size:
        _check_tiled(causal_lm, tile_size)
    base: Any = causal_lm.model
    config: Any = causal_lm.config
    layout = layout_of(mesh, method, ring_degree, sequence_chunk)
    ulysses_group, ring_group = groups_of(mesh, layout)
    device_type = device_type or (next(model.parameters()).device.type if mesh is None else mesh.device_type)
    check_kernel(attention_kernel, device_type, torch.bfloat16 if device_type == "cuda" else torch.float32)

    attentions = [block.self_attn for block in base.layers]
    head_dim: int = attentions[0].head_dim
    kernel = build_kernel(attention_kernel, device_type, head_dim)
    rope = RopeOfConfig(base.rotary_emb, head_dim)
    pool = HostPool()
    new_stash: dict[str, Callable[[], Stash] | None] = {
        "none": None,
        "device": Stash,
        "host": partial(Stash, pool.put),
    }
    methods = [
        build_method(
            method,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_chunk=head_chunk,
            new_stash=new_stash[stash],
            query_tiles=query_tiles,
            put_away=pool.put,
            sequence_chunk=layout.sequence_chunk,
            ulysses_group=ulysses_group,
            ring_group=ring_group,
            kernel=kernel,
        )
        for _ in attentions
    ]
    for attention, one in zip(attentions, methods, strict=True):
        adopt(attention, ContextParallelAttention, method=one, rope=rope, layout=layout)
    if tile_size:
        _tile(causal_lm, tile_size)
    else:
        for block in base.layers:
            adopt(block, StashedLayer)
    adopt(base.rotary_emb, NoTable)
    config._attn_implementation_internal = IMPLEMENTATION
    base.register_forward_pre_hook(_check_call, with_kwargs=True)
    return model


def _tile(model: nn.Module, tile_size: int) -> None:
    """Blocks, final norm and output in tiles; of the last so few rows that logits are as an inner tensor's tile."""
    base: Any = model.model
    config: Any = model.config
    output: Any = model.lm_head
    for block in base.layers:
        adopt(block, TiledLayer, tile_size=tile_size)
    task = LossTask()
    rows = min(tile_size, max(1, tile_size * config.intermediate_size // config.vocab_size))
    adopt(base.norm, FinalNorm, task=task)
    adopt(output, TiledOutput, task=task, norm=[base.norm], tile_size=rows)


def _check_tiled(model: nn.Module, tile_size: int) -> None:
    """Refuse a feed-forward that is not SwiGLU or has biases, and an adapter on it or on the output."""
    base: Any = model.model
    config: Any = model.config
    if config.hidden_act != "silu" or getattr(config, "mlp_bias", False):
        raise ValueError(
            f"tile_size = {tile_size} needs a feed-forward of SwiGLU without biases, and the model has hidden_act = "
            f"{config.hidden_act!r}, mlp_bias = {getattr(config, 'mlp_bias', False)}; set tile_size = 0."
        )
    linears = [getattr(block.mlp, name) for block in base.layers for name in ("gate_proj", "up_proj", "down_proj")]
    for linear in (*linears, model.lm_head):
        check_linear(linear)


def _check_model(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if config is None or kind not in MODELS or not hasattr(model, "lm_head") or not hasattr(model, "model"):
        raise ValueError(f"a {type(model).__name__} is not supported; give a ForCausalLM of {', '.join(MODELS)}.")
    base: Any = model.model
    for block in base.layers:
        attention = block.self_attn
        if isinstance(attention, ContextParallelAttention):
            raise ValueError("context_parallel was called on this model before; load it anew.")
        window = config.sliding_window if kind == "mistral" else getattr(attention, "sliding_window", None)
        if window is not None:
            raise ValueError(
                f"sliding_window = {window} is not supported: attention here is causal over the whole sequence; set it "
                "to None (and use_sliding_window = False) in the config if the model may see all."
            )
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            check_linear(linear)


def _check_options(method: str, head_chunk: int, stash: str, query_tiles: int, tile_size: int) -> None:
    if stash not in ("device", "host", "none"):
        raise ValueError(f'stash = {stash!r} is unknown; choose "device", "host" or "none".')
    if head_chunk < 0 or tile_size < 0 or query_tiles < 1:
        raise ValueError(
            f"head_chunk = {head_chunk}, tile_size = {tile_size}, query_tiles = {query_tiles}: the first two must not "
            "be negative (0 = all heads, no tiles), the last at least 1."
        )
    if stash != "device" and method in ("ulysses", "ring"):
        raise ValueError(f'stash = "{stash}" has no meaning for method = "{method}", whose outputs autograd keeps.')
    if query_tiles > 1 and method != "upipe":
        raise ValueError(f'query_tiles = {query_tiles} has no meaning for method = "{method}"; leave it at 1.')


def _check_call(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Before the model runs: no cache, no attention weights.

    Raises:
        ValueError: they are asked for.
    """
    config: Any = base.config
    if kwargs.get("use_cache"):
        raise ValueError(
            "use_cache = True is not supported with context parallelism; generate with a model loaded anew."
        )
    if kwargs.get("output_attentions", config.output_attentions):
        raise ValueError(
            "output_attentions = True is not supported: no method makes attention weights; leave it False."
        )
    return args, {**kwargs, "use_cache": False}
