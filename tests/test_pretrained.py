"""``flavor = "hf"``: any checkpoint of the architecture has Transformers' logits; what is not computed is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.jobs import ROOT, job_args, train
from tests.pretrained import KINDS, LLAMA3, SIZES, YARN, make, name_of, save
from tests.ranks import run_ranks
from tests.reference import relative_error
from tests.test_huggingface import logits_rank
from torchtitan_upipe.job.model import job_rope, model_args
from torchtitan_upipe.job.pretrained import read_pretrained
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.job.shape import model_shape
from torchtitan_upipe.memory.__main__ import main as memory_main
from torchtitan_upipe.plan import main as plan_main

LENGTH = 96  # more than the models' 64


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    assets = save(model, tmp_path / "hf")
    tokens = torch.randint(2048, (2, LENGTH))
    with torch.no_grad():
        expected = model(tokens).logits
    args = job_args(
        tmp_path / "run",
        2,
        "--checkpoint.enable",
        "--checkpoint.initial_load_in_hf",
        model__name=name_of(kind),
        model__flavor="hf",
        model__hf_assets_path=assets,
        training__seq_len=LENGTH,
        training__local_batch_size=2,
        context_parallel__head_chunk=4,
    )
    logits = torch.cat(run_ranks(logits_rank, 2, args, tokens, init=False), dim=1)
    assert relative_error(logits, expected) < 1e-4


def test_weights_come_from_another_precision(tmp_path: Path) -> None:
    """Of a bfloat16 checkpoint, as most are, every weight is read exactly; a job with tied weights writes them back."""
    from safetensors.torch import load_file

    model = make("llama3.2").bfloat16()
    assets = save(model, tmp_path / "hf")
    train(
        tmp_path / "run",
        2,
        "--checkpoint.enable",
        "--checkpoint.initial_load_in_hf",
        "--checkpoint.last_save_in_hf",
        model__flavor="hf",
        model__hf_assets_path=assets,
        training__steps=1,
        optimizer__lr=0.0,
    )
    saved: dict[str, Any] = {}
    for file in (tmp_path / "run" / "checkpoint" / "step-1").glob("*.safetensors"):
        saved |= load_file(file)
    assert "lm_head.weight" not in saved
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(saved[name], weight.float()), name


# --- RoPE ------------------------------------------------------------------------------------------------------------

YARNS = [
    YARN,
    {**YARN, "factor": 40.0, "beta_fast": 4.0, "beta_slow": 0.5},
    {**YARN, "attention_factor": 1.3},
    {**YARN, "rope_theta": 1e6, "factor": 1.0},
]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        LLAMA3,
        {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
        *YARNS,
    ],
    ids=lambda rope: rope["rope_type"],
)
@pytest.mark.parametrize("spelling", [4, 5])
@pytest.mark.parametrize("by_job", [False, True])
def test_frequencies_are_those_of_transformers(
    rope: dict[str, Any], spelling: int, by_job: bool, tmp_path: Path
) -> None:
    """Read from ``config.json`` in either spelling, or written in the job over a model without scaling."""
    config = Qwen3Config(**{**SIZES, "head_dim": 128, "rope_parameters": rope})
    if rope["rope_type"] == "default":
        expected = 1e6 ** -(torch.arange(0, 128, 2) / 128)
        scale = 1.0
    else:
        expected, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))

    values = json.loads(config.to_json_string())
    assert "rope_scaling" not in values
    options: dict[str, Any] = {}
    if by_job:
        options = {f"model__rope_scaling__{name}": v for name, v in rope.items() if not name.startswith("rope_")}
        options["model__rope_theta"] = rope["rope_theta"]
        options["model__rope_scaling__type"] = rope["rope_type"].replace("default", "none")
        rope = {"rope_theta": 7.0, "rope_type": "llama3", **{k: v for k, v in LLAMA3.items() if "rope" not in k}}
        values["rope_parameters"] = rope
    if spelling == 4:
        values["rope_theta"] = rope["rope_theta"]
        old = {name: value for name, value in rope.items() if name != "rope_theta"}
        values["rope_scaling"] = None if rope["rope_type"] == "default" else old
        del values["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    job = read(tmp_path, "qwen3_upipe", **options)
    got = job_rope(job, model_args(job))
    torch.testing.assert_close(got.frequencies(128).float(), expected, rtol=1e-6, atol=0)
    assert got.scale == pytest.approx(scale, rel=1e-6)


def test_the_models_context_is_the_scaled_one_where_the_job_names_none(tmp_path: Path) -> None:
    save(make("llama"), tmp_path)
    options = {"model__rope_scaling__type": "yarn", "model__rope_scaling__factor": 2}
    job = read(tmp_path, "llama3_upipe", **options)
    assert job_rope(job, model_args(job)).original_length == SIZES["max_position_embeddings"]
    job = read(tmp_path, "llama3_upipe", model__rope_theta=5e5)
    assert job_rope(job, model_args(job)).theta == 5e5


def read(assets: Path, name: str, flavor: str = "hf", **options: Any) -> Any:
    """A job of one rank, whose tokenizer may be missing."""
    for file in (Path(__file__).parent.parent / "torchtitan_upipe/assets/tokenizer").iterdir():
        (assets / file.name).write_bytes(file.read_bytes())
    settings = {"model__name": name, "model__flavor": flavor, "model__hf_assets_path": assets, **options}
    return read_job(job_args(assets / "run", 1, **settings))


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"model__rope_theta": 0.5}, r"rope_theta = 0.5 must be a finite number above 1"),
        ({"model__rope_scaling__type": "yarn"}, r"rope_scaling.factor = 0 must be a finite number of at least 1"),
        ({"model__rope_scaling__factor": 2}, r"factor = 2 has no meaning for type = \"model\"; remove it, or set"),
        (
            {
                "model__rope_scaling__type": "linear",
                "model__rope_scaling__factor": 2,
                "model__rope_scaling__beta_fast": 8,
            },
            r"beta_fast = 8 has no meaning for type = \"linear\"",
        ),
        (
            {
                "model__rope_scaling__type": "yarn",
                "model__rope_scaling__factor": 2,
                "model__rope_scaling__beta_slow": 64,
            },
            r"beta_slow = 64 must be between 0 and beta_fast",
        ),
        (
            {"model__name": "qwen3_upipe", "model__rope_scaling__type": "yarn", "model__rope_scaling__factor": 2},
            r"original_max_position_embeddings = 0 must be the model's context before; its flavor names none",
        ),
        ({"model__rope_theta": 1e6, "context_parallel__method": "torchtitan"}, r"a RoPE of the job's .* does not work"),
    ],
)
def test_rope_that_cannot_be_is_refused(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    name = options.pop("model__name", "llama3_upipe")
    with pytest.raises(ValueError, match=sentence):
        read(tmp_path, name, flavor="debug", **options)


def test_weights_of_another_rope_than_the_flavors_are_refused(tmp_path: Path) -> None:
    """TorchTitan's Llama3 would turn weights of Llama 3.0, which has no scaling, as those of 3.1."""
    sizes = {"num_key_value_heads": 2, "intermediate_size": 512}
    save(make("llama", **sizes, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}), tmp_path / "old")
    save(make("llama", **sizes, rope_parameters={**LLAMA3, "original_max_position_embeddings": 8192}), tmp_path / "new")
    flags = ["--checkpoint.enable", "--checkpoint.initial_load_in_hf", "--checkpoint.initial_load_path"]
    read_job(job_args(tmp_path / "run", 1, *flags, str(tmp_path / "new")))
    old = [*flags, str(tmp_path / "old")]
    with pytest.raises(ValueError, match=r"theta 500000 and type 'none', and model.flavor = 'debug_kv2' another, of"):
        read_job(job_args(tmp_path / "run", 1, *old))
    read_job(job_args(tmp_path / "run", 1, *old, model__rope_scaling__type="none"))


# --- config.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"model_type": "gemma3"}, r"model_type = 'gemma3' is not supported; llama, mistral, qwen3 are"),
        ({"attention_bias": True}, r"attention_bias = true \(biases of the projections\) is not supported"),
        ({"mlp_bias": True}, r"mlp_bias = true"),
        ({"model_type": "mistral", "sliding_window": 4096}, r"sliding_window = 4096 \(attention within a window\)"),
        ({"model_type": "mistral"}, r"sliding_window = 4096"),
        ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 8}, r"sliding_window = 8"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, r"with sliding_attention"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu'"),
        ({"quantization_config": {"bits": 4}}, r"quantised weights"),
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            r"rope_parameters of type 'longrope' is not supported; default,",
        ),
        ({"rope_parameters": {**YARN, "mscale": 1.0}}, r"with mscale is not supported"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"of type 'dynamic'"),
        ({"rope_parameters": YARN, "rope_scaling": {**YARN, "factor": 8.0}}, r"say different things"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"factor = None is no positive number"),
        ({"num_hidden_layers": "two"}, r"num_hidden_layers = 'two' is no positive whole number"),
        ({"hidden_size": None}, r"hidden_size = None is no positive whole number"),
        ({"num_key_value_heads": 3}, r"num_attention_heads = 8 is no multiple of num_key_value_heads = 3"),
        (None, r"config.json does not exist; set model.hf_assets_path"),
        ("{", r"config.json cannot be read"),
        ("[]", r"config.json holds a list where an object is expected"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: Any, sentence: str, tmp_path: Path) -> None:
    values = json.loads(LlamaConfig(**SIZES).to_json_string())
    if changes is not None:
        text = changes if isinstance(changes, str) else json.dumps({**values, **changes})
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_pretrained(str(tmp_path))


def test_a_model_under_another_name_is_refused(tmp_path: Path) -> None:
    save(make("qwen3"), tmp_path)
    with pytest.raises(ValueError, match=r'is of a qwen3 model, and .*; set model.name = "qwen3_upipe"'):
        read(tmp_path, "llama3_upipe")


@pytest.mark.parametrize("kind", ["llama3.2", "mistral", "qwen3"])
def test_the_ledger_counts_the_model_of_the_file(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    save(model, tmp_path)
    shape = model_shape(read(tmp_path, name_of(kind)))
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    assert sum(torch.Size(size).numel() for size in shape.block) == block
    assert (shape.inner, shape.tied) == (176, kind == "llama3.2")
    assert (shape.layers, shape.heads, shape.kv_heads) == (2, 8, 2)


def test_the_commands_of_memory_take_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ledger and dry run of the same job are those of a flavor of the same shape."""
    save(make("llama3.2"), tmp_path / "tied")
    save(make("llama", num_hidden_layers=4, hidden_size=256, intermediate_size=768), tmp_path / "hf")
    args = ["--job.config_file", str(ROOT / "train_configs/llama3_debug.toml"), "--training.seq_len", "4096"]
    assets = ["--model.flavor", "hf", "--model.hf_assets_path"]
    assert memory_main([*args, *assets, str(tmp_path / "tied"), "--dry-run"]) == 0
    table = capsys.readouterr().out
    (device,) = [line for line in table.splitlines() if line.startswith("│ device  ")]
    ledger, dry_run = (float(cell) for cell in device.split("│")[2:4])
    assert ledger == pytest.approx(dry_run, rel=0.1)
    budget = ["--device-memory", "10GiB", "--host-memory", "10GiB"]
    assert plan_main([*args, *assets, str(tmp_path / "hf"), *budget]) == 0
    assert "longest" in capsys.readouterr().out
