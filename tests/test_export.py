"""What a run leaves is a folder that Transformers opens, with the trainer's logits, on a longer context, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.jobs import job_args, train
from tests.pretrained import make, name_of, save
from tests.ranks import run_ranks
from tests.reference import relative_error
from tests.test_huggingface import logits_rank
from torchtitan_upipe.export import main
from torchtitan_upipe.huggingface.folder import ModelFiles
from torchtitan_upipe.huggingface.weights import split
from torchtitan_upipe.job.pretrained import read_pretrained
from torchtitan_upipe.titan.export import export_checkpoint

LENGTH = 256  # four times the models' context
LONGER: dict[str, dict[str, Any]] = {  # how the job stretches it
    "llama": {"rope_scaling__type": "yarn", "rope_scaling__factor": 4.0},
    "llama3.2": {"rope_theta": 4e6},
    "mistral": {"rope_scaling__type": "linear", "rope_scaling__factor": 4.0},
    "qwen3-yarn": {"rope_scaling__type": "none", "rope_theta": 8e4},
    "qwen3-tied": {"rope_scaling__type": "llama3", "rope_scaling__factor": 4.0, "rope_scaling__high_freq_factor": 2.0},
}


def options(kind: str, assets: Path) -> dict[str, Any]:
    longer = {f"model__{name}": value for name, value in LONGER[kind].items()}
    return {
        "model__name": name_of(kind),
        "model__flavor": "hf",
        "model__hf_assets_path": assets,
        "training__seq_len": LENGTH,
        "context_parallel__head_chunk": 4,
        **longer,
    }


@pytest.mark.parametrize("kind", LONGER)
def test_a_trained_model_comes_back(kind: str, tmp_path: Path) -> None:
    """Two steps on two ranks; the last is written as a model, the first exported without a group of processes."""
    assets = save(make(kind), tmp_path / "hf")
    job = options(kind, assets)
    flags = ["--checkpoint.enable", "--checkpoint.initial_load_in_hf", "--checkpoint.last_save_in_hf"]
    train(tmp_path / "run", 2, *flags, training__steps=2, checkpoint__interval=1, optimizer__lr=1e-2, **job)
    steps = tmp_path / "run" / "checkpoint"
    assert main([str(steps / "step-1"), "--to", str(tmp_path / "first")]) == 0
    logits = {}
    tokens = torch.randint(2048, (2, LENGTH))
    for name, folder in (("before", assets), ("first", tmp_path / "first"), ("last", steps / "step-2")):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            logits[name] = model(tokens).logits
    flags = ["--checkpoint.enable", "--checkpoint.load_only", "--checkpoint.initial_load_path"]
    for name, flag in (
        ("first", [str(steps / "step-1")]),
        ("last", [str(steps / "step-2"), "--checkpoint.initial_load_in_hf"]),
    ):
        args = job_args(tmp_path / f"{name}-run", 2, *flags, *flag, training__local_batch_size=2, **job)
        trained = torch.cat(run_ranks(logits_rank, 2, args, tokens, init=False), dim=1)
        assert relative_error(logits[name], trained) < 1e-4
    assert relative_error(logits["before"], logits["first"]) > 1e-2  # it has learnt, or turns otherwise
    assert relative_error(logits["first"], logits["last"]) > 1e-3
    check_folder(steps / "step-2", kind)
    check_folder(tmp_path / "first", kind)


def check_folder(folder: Path, kind: str) -> None:
    assert sorted(file.name for file in folder.iterdir()) == [
        "checksums.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    text = "def f(x): return x"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    values = json.loads((folder / "config.json").read_text())
    assert values["max_position_embeddings"] == LENGTH
    assert values["dtype"] == "float32"
    # each spelling alone says the same
    rope = read_pretrained(str(folder)).rope
    for spelling in (("rope_parameters",), ("rope_scaling", "rope_theta")):
        other = folder.parent / f"{folder.name}-{spelling[0]}"
        other.mkdir()
        (other / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k not in spelling}))
        assert read_pretrained(str(other)).rope == rope
    assert rope.type == LONGER[kind].get("rope_scaling__type", "llama3")
    GenerationConfig.from_pretrained(folder)


def test_a_flavor_of_torchtitans_is_described_from_its_shape(tmp_path: Path) -> None:
    """No config.json came with it. Weights go to several files with an index, in the dtype that is asked for."""
    train(tmp_path / "run", 2, "--checkpoint.enable", training__steps=2, checkpoint__interval=1)
    step = tmp_path / "run" / "checkpoint" / "step-1"
    files = ModelFiles(read_pretrained(str(step)), step)
    export_checkpoint(step, tmp_path / "hf", files, torch.bfloat16, limit=700_000)
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert {weight.dtype for weight in load_file(shards[0]).values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.dtype == torch.bfloat16
    assert model.config.rope_parameters["rope_type"] == "llama3"
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 1)

    # a finished step in torch's format, whose job is named, since one made it elsewhere
    (step / "config.json").unlink()
    again = ["--to", str(tmp_path / "again"), "--dtype", "bfloat16", *job_args(tmp_path / "run", 2)]
    assert main([str(step), *again]) == 0
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for name, weight in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], weight), name


def test_files_hold_what_fits() -> None:
    assert split({"a": 3, "b": 3, "c": 9, "d": 1}, limit=6) == [["a", "b"], ["c"], ["d"]]


def test_what_cannot_be_exported_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "step-1").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    new = ["--to", str(tmp_path / "new")]
    for args, sentence in (
        ([str(tmp_path / "no"), *new], "is not a folder; name a step-N"),
        ([str(tmp_path / "step-1"), *new], "has no config.json; name the job that wrote it"),
        ([str(tmp_path / "step-1"), *new, *job_args(tmp_path, 1)], "is not complete: it has no .metadata"),
        ([str(tmp_path / "step-1"), "--to", str(tmp_path / "full")], "is there already and not an empty folder"),
    ):
        assert main(args) == 1
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()
