"""RoPE of every type, batches, refusals, and names of models of Transformers under context parallelism."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tests.jobs import ROOT
from tests.reference import relative_error
from torchtitan_upipe.huggingface import context_parallel, shard_batch, summed_loss
from torchtitan_upipe.huggingface.rope import RopeOfConfig

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LONG = 1 << 12
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 1024},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0 + i / 8 for i in range(4)],
        "long_factor": [2.0 + i for i in range(4)],
        "original_max_position_embeddings": 1024,
    },
}


def llama(**fields: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SMALL | fields)))


def rotary(kind: str) -> LlamaRotaryEmbedding:
    parameters = {"rope_type": kind, "rope_theta": 10000.0} | ROPES[kind]
    return LlamaRotaryEmbedding(LlamaConfig(max_position_embeddings=1024, rope_parameters=parameters, **SMALL))


@pytest.mark.parametrize("longest", [512, LONG])
@pytest.mark.parametrize("kind", ROPES)
def test_rope_turns_as_transformers_does(kind: str, longest: int) -> None:
    """Both within the original context and beyond, where two types change their frequencies."""
    torch.manual_seed(0)
    heads, positions = torch.randn(1, 5, 2, 8), torch.tensor([[0, 1, 7, 100, longest - 1]])
    rope = RopeOfConfig(rotary(kind), head_dim=8).rope(positions, longest)
    cos, sin = rotary(kind)(heads, positions)
    expected = apply_rotary_pos_emb(heads, heads, cos, sin, unsqueeze_dim=2)[0]
    assert relative_error(rope(heads), expected) < 1e-4  # the angles of Transformers are float32 products

    grad = torch.randn_like(heads)
    leaf = heads.clone().requires_grad_()
    rope(leaf).backward(grad)
    again = heads.clone().requires_grad_()
    apply_rotary_pos_emb(again, again, cos, sin, unsqueeze_dim=2)[0].backward(grad)
    assert relative_error(leaf.grad, again.grad) < 1e-4


def test_the_lengths_matter_where_transformers_says_so() -> None:
    for kind in ROPES:
        rope = RopeOfConfig(rotary(kind), head_dim=8)
        positions = torch.tensor([[0]])
        same = torch.equal(rope.rope(positions, 512).frequencies, rope.rope(positions, LONG).frequencies)
        assert same == (kind not in ("dynamic", "longrope"))


def test_angles_hold_at_five_million_tokens() -> None:
    """Where Transformers' own table is off by more than a tenth of a radian."""
    table = LlamaRotaryEmbedding(LlamaConfig(head_dim=128, **SMALL))
    rope = RopeOfConfig(table, head_dim=128).rope(torch.tensor([[5_000_001]]), 5_000_002)
    heads = torch.cat([torch.ones(64), torch.zeros(64)]).view(1, 1, 1, 128)
    exact = torch.cat([(5_000_001 * rope.frequencies).cos(), (5_000_001 * rope.frequencies).sin()])
    ours = rope(heads).flatten()
    cos, sin = table(heads, rope.positions)
    theirs = apply_rotary_pos_emb(heads, heads, cos, sin, unsqueeze_dim=2)[0].flatten()
    assert (ours - exact).abs().max() < 1e-6
    assert (theirs - exact).abs().max() > 0.1


def test_names_and_files_stay(tmp_path: Path) -> None:
    model = llama()
    names = list(model.state_dict())
    ids = torch.arange(1, 20)[None]
    expected = model(ids).logits
    context_parallel(model, None, head_chunk=2, tile_size=8)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)


def test_documents_come_from_positions_or_sequence_numbers() -> None:
    ids = torch.arange(1, 11)[None]
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 4]])
    numbers = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2, 2]], dtype=torch.int32)
    by_positions = shard_batch({"input_ids": ids, "position_ids": positions}, None)
    by_numbers = shard_batch({"input_ids": ids, "seq_idx": numbers, "cu_seq_lens_q": None}, None)
    assert by_positions["whole_sequences"] == by_numbers["whole_sequences"]
    assert by_positions["whole_sequences"].documents.starts == ((0, 3, 5),)
    assert torch.equal(by_positions["position_ids"], by_numbers["position_ids"])
    assert by_positions["whole_sequences"].longest == 5


def test_labels_are_shifted_once() -> None:
    ids = torch.arange(1, 6)[None]
    shifted = torch.tensor([[2, 3, 4, 5, -100]])
    for batch in ({"labels": ids}, {"shift_labels": shifted}, {"labels": ids + 9, "shift_labels": shifted}):
        assert torch.equal(shard_batch({"input_ids": ids} | batch, None)["shift_labels"], shifted)


IDS = torch.ones(1, 4, dtype=torch.int64)
BATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "left": ({"attention_mask": torch.tensor([[0, 1, 1, 1]])}, "padded on the right"),
    "four dimensions": ({"attention_mask": torch.ones(1, 1, 4, 4)}, "padded on the right"),
    "labelled padding": ({"attention_mask": torch.tensor([[1, 1, 0, 0]]), "labels": IDS}, "padding have labels"),
    "unknown": ({"token_type_ids": IDS}, "token_type_ids"),
    "lengths alone": ({"cu_seq_lens_q": IDS[0]}, "cu_seq_lens_q"),
}


@pytest.mark.parametrize("fields, message", BATCHES.values(), ids=BATCHES)
def test_batches_that_cannot_be_shared_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shard_batch({"input_ids": IDS} | fields, None)


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "none"}, "method = 'none' is unknown"),
    "ring": ({"ring_degree": 2}, "ring_degree = 2 does not divide"),
    "chunk": ({"sequence_chunk": 64}, "sequence_chunk = 64 has no meaning"),
    "tiles": ({"method": "ulysses", "query_tiles": 2}, "query_tiles = 2 has no meaning"),
    "stash": ({"stash": "disk"}, "stash = 'disk' is unknown"),
    "no stash": ({"method": "ring", "stash": "host"}, 'stash = "host" has no meaning'),
    "kernel": ({"attention_kernel": "flash3"}, "attention_kernel = 'flash3' runs on CUDA only"),
    "negative": ({"tile_size": -1}, "tile_size = -1"),
}


@pytest.mark.parametrize("options, message", OPTIONS.values(), ids=OPTIONS)
def test_options_that_cannot_be_met_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        context_parallel(llama(), None, **options)


def test_models_that_cannot_be_met_are_refused() -> None:
    window = MistralForCausalLM(MistralConfig(sliding_window=4096, **SMALL))
    with pytest.raises(ValueError, match="sliding_window = 4096"):
        context_parallel(window, None)
    with pytest.raises(ValueError, match="SwiGLU"):
        context_parallel(llama(mlp_bias=True), None, tile_size=8)
    with pytest.raises(ValueError, match="Linear is not supported"):
        context_parallel(torch.nn.Linear(2, 2), None)
    quantised = llama()
    quantised.model.layers[1].self_attn.v_proj.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.uint8), False)
    with pytest.raises(ValueError, match="load the model unquantised"):
        context_parallel(quantised, None)
    twice = context_parallel(llama(), None, head_chunk=2)
    with pytest.raises(ValueError, match="called on this model before"):
        context_parallel(twice, None)


def test_calls_that_cannot_be_met_are_refused() -> None:
    model: Any = context_parallel(llama(attention_dropout=0.1), None, head_chunk=2)
    share = shard_batch({"input_ids": IDS}, None)
    with pytest.raises(ValueError, match="attention_dropout"):
        model.train()(**share)
    model.eval()
    model(**share)
    with pytest.raises(ValueError, match="shard_batch returns"):
        model(IDS)
    with pytest.raises(ValueError, match="use_cache = True"):
        model(**share, use_cache=True)
    with pytest.raises(ValueError, match="use_cache = True"):
        model.generate(IDS, max_new_tokens=1)
    with pytest.raises(ValueError, match="output_attentions = True"):
        model(**share, output_attentions=True)
    with pytest.raises(ValueError, match="was sharded as"):
        model(**shard_batch({"input_ids": IDS}, None, method="fpdt", sequence_chunk=2))
    with pytest.raises(ValueError, match="no labels"):
        summed_loss(model, share)


def test_it_runs_without_torchtitan() -> None:
    files = (ROOT / "torchtitan_upipe" / "huggingface").glob("*.py")
    modules = [f"torchtitan_upipe.huggingface.{file.stem}" for file in files if file.stem != "__init__"]
    program = (
        f"import importlib, sys; [importlib.import_module(m) for m in {modules}]; "
        "print([m for m in sys.modules if m.split('.')[0] == 'torchtitan'])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("stash, times", [("device", 1), ("host", 1), ("none", 2)])
@pytest.mark.parametrize("first", ["method", "checkpointing"])
def test_checkpointed_blocks_find_their_stash(first: str, stash: str, times: int, monkeypatch: Any) -> None:
    """Attention runs once where there is one, whether checkpointing is asked for before or after."""
    model = llama().train()
    if first == "checkpointing":
        model.gradient_checkpointing_enable()
    context_parallel(model, None, head_chunk=2, stash=stash)
    if first == "method":
        model.gradient_checkpointing_enable()
    calls = 0
    kernel = model.model.layers[0].self_attn.method.attention.kernel
    forward = kernel.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(kernel, "forward", counted)
    summed_loss(model, shard_batch({"input_ids": IDS, "labels": IDS}, None)).backward()
    assert calls == times * 2 * 2  # layers, stages
