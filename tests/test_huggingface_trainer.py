"""Trainers of Transformers and TRL under context parallelism and FSDP2: they log what one rank logs without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback

from tests.huggingface_jobs import Log, conversations, llama, log_of, mistral, qwen2, qwen3, train
from tests.jobs import ROOT
from tests.ranks import run_ranks

CASES: dict[str, dict[str, Any]] = {
    "upipe": {
        "model": llama,
        "collator": "packed",
        "context_parallel": {"head_chunk": 2, "tile_size": 8},
        "gradient_accumulation_steps": 2,
    },
    "stash": {
        "model": qwen2,
        "collator": "padded",
        "context_parallel": {"head_chunk": 2, "stash": "host"},
        "gradient_checkpointing": True,
    },
    "hybrid": {"model": mistral, "collator": "packed", "context_parallel": {"method": "ulysses", "ring_degree": 2}},
    "fpdt": {"model": qwen3, "collator": "packed", "context_parallel": {"method": "fpdt", "sequence_chunk": 16}},
    "data_parallel": {
        "model": llama,
        "collator": "padded",
        "context_parallel": {"method": "ring"},
        "cp_size": 2,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "evaluated": 8,
    },
}


UPIPE, RING = {"head_chunk": 2}, {"method": "ring"}
BFLOAT16 = {"collator": "packed", "bf16": True, "max_steps": 3, "eval_steps": 3, "gradient_checkpointing": True}


def run_case(name: str, folder: Path, ranks: int) -> Log:
    case = dict(CASES[name])
    case["model"] = case["model"]()
    trainer = train(folder / name, ranks, **case)
    if ranks > 1:
        assert all(isinstance(p, DTensor) for p in trainer.model.model.layers.parameters())  # FSDP2 holds them
    return log_of(trainer)


def plain_case(name: str, folder: Path) -> Log:
    """The same by Transformers' own trainer, on one rank, which draws the batches of all ranks."""
    case = CASES[name] | {"context_parallel": None, "cp_size": None}
    case = {key: value for key, value in case.items() if not key.startswith("per_device")}
    return log_of(train(folder / name, 1, **(case | {"model": case["model"]()})))


def cases_rank(folder: Path) -> dict[str, Log]:
    return {name: run_case(name, folder, 4) for name in CASES}


def test_four_ranks_log_what_one_logs_without(tmp_path: Path) -> None:
    rank = run_ranks(cases_rank, 4, tmp_path / "four", init=False, timeout=240)[0]
    for name, log in rank.items():
        plain = plain_case(name, tmp_path / "plain")
        assert [line.keys() for line in log] == [line.keys() for line in plain]
        assert len(log) == 12  # ten steps, two evaluations
        for line, expected in zip(log, plain, strict=True):
            assert line == pytest.approx(expected, rel=1e-5), name


def bfloat16_rank(folder: Path) -> list[Log]:
    return [
        log_of(train(folder, 2, qwen2(), context_parallel={"tile_size": size} | UPIPE, **BFLOAT16)) for size in (0, 8)
    ]


def test_bfloat16_does_not_round_the_loss(tmp_path: Path) -> None:
    """Under the mixed precision of FSDP2, which rounds what a model returns (4.859 for 4.853)."""
    plain = log_of(train(tmp_path, 1, qwen2(), context_parallel=None, **BFLOAT16))
    for log in run_ranks(bfloat16_rank, 2, tmp_path, init=False)[0]:
        for line, expected in zip(log, plain, strict=True):
            assert line == pytest.approx(expected, rel=1e-4 if "eval_loss" in line else 5e-3)
            assert line.get("loss", 0) == pytest.approx(expected.get("loss", 0), rel=1e-4)


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


SAVING = {
    "collator": "packed",
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 3,
    "eval_steps": 3,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,  # the worse one counts as the best, so that it is not the last
}


def saving_rank(folder: Path) -> dict[str, Any]:
    """One run without a break, which also ends with its best model, and one broken off after its first checkpoint."""

    def run(name: str, method: dict[str, Any], **options: Any) -> Any:
        return train(folder / name, 2, **(SAVING | {"model": llama()} | options), context_parallel=method)

    whole = run("whole", UPIPE, load_best_model_at_end=True)
    log = log_of(whole)
    best = whole.evaluate()["eval_loss"]
    run("broken", UPIPE, callbacks=[StopAfter(3)])
    resumed = run("broken", RING, resume=str(folder / "broken" / "checkpoint-3"))
    return {"whole": log, "resumed": log_of(resumed), "best": best}


def test_save_resume_and_load_the_best(tmp_path: Path) -> None:
    """A run may go on with another method; its checkpoints are models of Transformers."""
    found = run_ranks(saving_rank, 2, tmp_path, init=False)[0]
    assert len(found["resumed"]) == len(found["whole"])
    for line, expected in zip(found["resumed"], found["whole"], strict=True):
        assert line == pytest.approx(expected, rel=1e-4)
    losses = [line["eval_loss"] for line in found["whole"] if "eval_loss" in line]
    assert losses[0] > losses[1] * (1 + 1e-4)
    assert found["best"] == pytest.approx(losses[0], rel=1e-6)

    folder = tmp_path / "whole" / "checkpoint-6"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert set(load_file(folder / "model.safetensors")) <= set(model.state_dict())
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    ids = torch.tensor([conversations()[0]["input_ids"]])
    assert not torch.equal(model(ids).logits, llama()(ids).logits)
    assert model.generate(ids, max_new_tokens=2).shape[1] == ids.shape[1] + 2


def sft(folder: Path, packing: bool, context_parallel: dict[str, Any] | None) -> Log:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from torchtitan_upipe.huggingface.trainer import ContextParallelMixin

    class ContextParallelSFT(ContextParallelMixin, SFTTrainer):
        """As docs/huggingface.md says."""

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "torchtitan_upipe" / "assets" / "tokenizer")
    tokenizer.pad_token = tokenizer.bos_token
    model = llama()
    model.resize_token_embeddings(len(tokenizer))
    args = SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        max_steps=3,
        per_device_train_batch_size=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="no",
        max_length=64,
        packing=packing,
        shuffle_dataset=False,
        fsdp=context_parallel is not None,
    )
    dataset = Dataset.from_list(conversations(24))
    common: dict[str, Any] = {
        "model": model,
        "args": args,
        "train_dataset": dataset,
        "eval_dataset": dataset.select(range(4)),
        "processing_class": tokenizer,
    }
    if context_parallel is None:
        trainer = SFTTrainer(**common)
    else:
        trainer = ContextParallelSFT(**common, context_parallel=context_parallel)
    trainer.train()
    return log_of(trainer)


def sft_rank(folder: Path) -> list[Log]:
    return [sft(folder, packing, {"head_chunk": 2}) for packing in (True, False)]


def test_sft_trainer_packed_and_padded(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    logs = run_ranks(sft_rank, 2, tmp_path, init=False)[0]
    for packing, log in zip((True, False), logs, strict=True):
        plain = sft(tmp_path, packing, None)
        assert len(log) == len(plain) == 4
        for line, expected in zip(log, plain, strict=True):
            assert line == pytest.approx(expected, rel=1e-5), packing


def adapter_rank(folder: Path) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    options = {"collator": "packed", "context_parallel": {"head_chunk": 2}, "max_steps": 2, "eval_strategy": "no"}
    torch.manual_seed(3)
    model = get_peft_model(llama(), LoraConfig(target_modules=["gate_proj", "down_proj"], r=2))
    trainer = train(folder / "mlp", 2, model=model, **options)
    trainer.save_model(str(folder / "adapter"))
    with pytest.raises(ValueError, match="leave q_proj"):
        train(folder / "q", 2, model=get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], r=2)), **options)
    return {"log": log_of(trainer)}


def test_adapters_of_the_feed_forward_train_and_save_and_others_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    found = run_ranks(adapter_rank, 2, tmp_path, init=False)[0]["log"]
    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=["gate_proj", "down_proj"], r=2)
    plain = train(
        tmp_path / "plain",
        1,
        model=peft.get_peft_model(llama(), config),
        collator="packed",
        context_parallel=None,
        max_steps=2,
        eval_strategy="no",
    )
    for line, expected in zip(found, log_of(plain), strict=True):
        assert line == pytest.approx(expected, rel=1e-5)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ours = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter").state_dict()
    assert saved
    assert any(key.endswith("lora_B.default.weight") and value.abs().sum() > 0 for key, value in ours.items())


def refusals_rank(folder: Path) -> None:
    assert not dist.is_initialized()
    options = {"model": llama(), "collator": "packed", "context_parallel": {}}
    for fields, message in (
        ({"cp_size": 3}, "cp_size = 3 does not divide the 2 ranks"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is not supported"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
        ({"context_parallel": {"method": "rign"}}, "rign"),
    ):
        with pytest.raises(ValueError, match=message):
            train(folder, 2, **(options | fields))


def test_what_cannot_run_is_refused(tmp_path: Path) -> None:
    run_ranks(refusals_rank, 2, tmp_path, init=False)
