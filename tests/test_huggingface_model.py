"""Models of Transformers under every method against the unmodified model: logits and all gradients, float32."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.ranks import preload, run_ranks
from tests.reference import relative_error
from torchtitan_upipe.data.sharding import shard_positions
from torchtitan_upipe.device import prepare_for_gloo
from torchtitan_upipe.huggingface import context_parallel, shard_batch, summed_loss

preload("tests.huggingface_jobs")  # what ranks need of Transformers

SMALL = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "initializer_range": 0.1}
MODELS: dict[str, tuple[type[Any], Any]] = {
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(
            num_attention_heads=8, num_key_value_heads=2, attention_bias=True, **SMALL
        ),  # biases, of o_proj, too
    ),
    "mistral": (  # heads that four ranks do not divide, H*d = 72, D = 48
        MistralForCausalLM,
        MistralConfig(num_attention_heads=6, num_key_value_heads=3, head_dim=12, sliding_window=None, **SMALL),
    ),
    "qwen2": (  # biases of q, k, v; fewer KV heads than ranks, heads that no two ranks divide
        Qwen2ForCausalLM,
        Qwen2Config(num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True, **SMALL),
    ),
    "qwen3": (  # norms of q, k; YaRN, which scales the rotated heads
        Qwen3ForCausalLM,
        Qwen3Config(
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=64,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            **SMALL,
        ),
    ),
}
LENGTH = 37  # no multiple of anything
STARTS = ((0, 5, 6, 23), (0,))
ENDS = (29, LENGTH)
BATCHES = ("packed", "padded")


@dataclass(frozen=True)
class Variant:
    """How a model is made to work on shares."""

    method: str
    ring_degree: int = 1
    sequence_chunk: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False

    def where(self) -> dict[str, Any]:
        return {"method": self.method, "ring_degree": self.ring_degree, "sequence_chunk": self.sequence_chunk}


def variants(degree: int) -> list[Variant]:
    which = [
        Variant("ulysses"),
        Variant("upipe", options={"head_chunk": 1, "stash": "none", "query_tiles": 2}),
        Variant("upipe", options={"head_chunk": 2, "stash": "host", "tile_size": 5}, checkpointing=True),
        Variant("fpdt", sequence_chunk=8 * degree, options={"tile_size": 64}, checkpointing=True),
    ]
    if degree > 1:
        which += [
            Variant("ring", degree),
            Variant("upipe", 2, options={"head_chunk": 2, "attention_kernel": "reference"}, checkpointing=True),
        ]
    if degree > 2:
        which.append(Variant("ulysses", 2))
    return which


def build(name: str) -> Any:
    """The same model every time, its norms and biases not those of initialisation."""
    torch.manual_seed(1)
    model_class, config = MODELS[name]
    model = model_class(type(config).from_dict(config.to_dict()))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def batch(kind: str) -> dict[str, Tensor]:
    """Two rows as a collator makes them, the second of one document, the first packed or padded on the right."""
    torch.manual_seed(2)
    ids = torch.randint(1, 96, (2, LENGTH))
    labels = ids.clone()
    labels[:, 10:13] = -100
    result = {"input_ids": ids, "labels": labels}
    if kind == "packed":
        starts = [torch.tensor([row]).T for row in STARTS]
        token = torch.arange(LENGTH)
        result["position_ids"] = torch.stack([token - s.where(s <= token, 0).amax(0) for s in starts])
    if kind == "padded":
        mask = torch.arange(LENGTH) < torch.tensor(ENDS)[:, None]
        result |= {"attention_mask": mask.long(), "labels": labels.masked_fill(~mask, -100)}
    return result


def unmodified(name: str, kind: str) -> dict[str, Tensor]:
    """Logits and gradients of the model as Transformers runs it, with the mask written out token by token."""
    model, inputs = build(name), batch(kind)
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    token = torch.arange(LENGTH)
    hidden = later.repeat(2, 1, 1)
    if kind == "packed":
        number = torch.stack([(token[:, None] >= torch.tensor(row)).sum(1) for row in STARTS])
        hidden |= number[:, :, None] != number[:, None, :]
    if kind == "padded":
        hidden |= (token >= torch.tensor(ENDS)[:, None])[:, None, :]
    mask = torch.zeros(2, 1, LENGTH, LENGTH).masked_fill(hidden[:, None], torch.finfo(torch.float32).min)
    positions = inputs.get("position_ids", token.expand(2, -1))
    logits = model(inputs["input_ids"], attention_mask=mask, position_ids=positions, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), reduction="sum")
    loss.backward()
    grads = {key: p.grad for key, p in model.named_parameters()}
    return {"logits": logits.detach(), "loss": loss.detach(), **grads}


def group() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))


def errors_of_share(
    name: str, kind: str, variant: Variant, mesh: DeviceMesh, truth: dict[str, Tensor]
) -> dict[str, float]:
    """How far this rank's logits, and the ranks' loss and gradients, are from the unmodified model's."""
    model = context_parallel(build(name), mesh, **variant.where(), **variant.options)
    if variant.checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    share = shard_batch(batch(kind), mesh, **variant.where())
    with torch.no_grad():
        logits = model(**{key: value for key, value in share.items() if key != "shift_labels"}).logits
    loss = summed_loss(model, share)
    loss.backward()

    degree = mesh.size()
    ring = degree if variant.method == "ring" else variant.ring_degree
    padded = logits.shape[1] * degree
    mine = shard_positions(padded, mesh.get_local_rank(), degree // ring, ring, variant.sequence_chunk)
    far = 0.0
    for row, end in enumerate(ENDS if kind == "padded" else (LENGTH, LENGTH)):
        real = mine < end
        if real.any():  # a rank may hold padding alone
            far = max(far, float((logits[row, real] - truth["logits"][row, mine[real]]).abs().amax()))
    total = loss.detach().clone()
    dist.all_reduce(total)
    found = {"logits": far, "loss": relative_error(total, truth["loss"])}
    for key, parameter in model.named_parameters():
        dist.all_reduce(parameter.grad)
        found[key] = relative_error(parameter.grad, truth[key])
    return found


def parity_rank(truths: Path) -> dict[Any, dict[str, float]]:
    mesh, known = group(), torch.load(truths)
    return {
        (name, kind, i): errors_of_share(name, kind, variant, mesh, known[name, kind])
        for name in MODELS
        for i, variant in enumerate(variants(mesh.size()))
        for kind in BATCHES
    }


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("unmodified") / "truths.pt"
    torch.save({(name, kind): unmodified(name, kind) for name in MODELS for kind in BATCHES}, file)
    return file


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_every_method_gives_the_unmodified_models_logits_and_gradients(degree: int, truths: Path) -> None:
    for rank in run_ranks(parity_rank, degree, truths):
        for case, found in rank.items():
            assert found.pop("logits") < 1e-4, case
            assert max(found.values()) < 1e-5, (case, variants(degree)[case[-1]], found)


def sharded_rank(truths: Path) -> dict[Any, dict[str, float]]:
    """FSDP2 before and after the method, as Accelerate shards: blocks, embedding, final norm with the output layer."""
    mesh, truth = group(), torch.load(truths)["llama", "packed"]
    found = {}
    for first in ("method", "fsdp"):
        for tile_size in (0, 8):
            model = build("llama")
            for step in (first, "fsdp" if first == "method" else "method"):
                if step == "method":
                    context_parallel(model, mesh, head_chunk=2, tile_size=tile_size)
                else:
                    shard(model, mesh)
            model.gradient_checkpointing_enable()
            model.train()
            loss = summed_loss(model, shard_batch(batch("packed"), mesh))
            (loss * mesh.size()).backward()  # FSDP2 takes the mean over ranks
            found[first, tile_size] = {
                key: relative_error(p.grad.full_tensor(), truth[key]) for key, p in model.named_parameters()
            }
    return found


def single_projections_rank() -> None:
    mesh = group()
    with pytest.raises(ValueError, match="ring_degree = 3 does not divide"):
        context_parallel(build("llama"), mesh, ring_degree=3)
    model = context_parallel(build("llama"), mesh, head_chunk=2)
    fully_shard(model.model.layers[0].self_attn.k_proj, mesh=mesh)
    with pytest.raises(ValueError, match="let fully_shard take whole blocks"):
        model(**shard_batch({"input_ids": batch("packed")["input_ids"]}, mesh))


def test_single_projections_are_not_sharded() -> None:
    run_ranks(single_projections_rank, 2)


def shard(model: Any, mesh: DeviceMesh) -> None:
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    prepare_for_gloo(model)


def test_before_and_after_fsdp(truths: Path) -> None:
    found = run_ranks(sharded_rank, 2, truths)[0]
    assert len(found) == 4
    for case, errors in found.items():
        assert max(errors.values()) < 1e-5, (case, errors)
