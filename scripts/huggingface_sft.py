"""Fine-tune a model of Transformers on conversations, each sequence spread over several ranks.

    python scripts/huggingface_sft.py                                     # one rank
    torchrun --nproc_per_node 4 scripts/huggingface_sft.py                # a tiny random model on 4 ranks, on CPU, too
    torchrun --nproc_per_node 8 scripts/huggingface_sft.py --model Qwen/Qwen3-8B --dataset your.jsonl \
        --max-length 131072 --head-chunk 8 --stash host --tile-size 8192  # on 8 GPUs; see the comments below

Needs ``pip install -e .[huggingface]``. Copy it and change what differs.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from torchtitan_upipe.huggingface.trainer import ContextParallelMixin

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"


class ContextParallelSFT(ContextParallelMixin, SFTTrainer):
    """TRL's trainer; ``transformers.Trainer`` alone is ``huggingface.trainer.ContextParallelTrainer``."""


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="name or folder; by default a tiny random Llama")
    parser.add_argument("--dataset", default=str(ROOT / "scripts" / "conversations.jsonl"), help=".jsonl, or a name")
    parser.add_argument("--output", default="outputs/huggingface_sft")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max-length", type=int, default=512, help="tokens that conversations are packed into")
    parser.add_argument("--cp-size", type=int, help="ranks that share a sequence; by default all")
    parser.add_argument("--method", default="upipe", help="upipe, ulysses, ring or fpdt")
    parser.add_argument("--head-chunk", type=int, default=4, help="query heads in a stage: fewer take less memory")
    parser.add_argument("--stash", default="device", help="device, host or none")
    parser.add_argument("--tile-size", type=int, default=0, help="rows per tile of norm, feed-forward and loss")
    return parser.parse_args()


def model_and_tokenizer(name: str) -> tuple[Any, Any]:
    """Of ``name``, or a tiny random Llama for the shipped tokenizer."""
    if name:
        # Qwen3-8B beyond 40,960 tokens: give its config YaRN first (rope_parameters = {"rope_type": "yarn", "factor":
        # 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1000000}), as its model card says.
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "torchtitan_upipe" / "assets" / "tokenizer")
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.bos_token, TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config), tokenizer


def conversations(name: str) -> Dataset:
    """Rows with ``messages``, a list of ``role`` and ``content``; TRL takes others, too."""
    return (
        load_dataset("json", data_files=name, split="train")
        if Path(name).exists()
        else load_dataset(name, split="train")
    )


def main() -> None:
    """Train, and save the model."""
    chosen = options()
    set_seed(0)  # the same random model on all ranks
    model, tokenizer = model_and_tokenizer(chosen.model)
    on_gpu = torch.cuda.is_available()
    args = SFTConfig(
        output_dir=chosen.output,
        max_steps=chosen.steps,
        max_length=chosen.max_length,
        packing=True,  # a token attends within its own conversation
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        gradient_checkpointing=True,  # keeps the stash: attention's forward runs once
        learning_rate=1e-5 if chosen.model else 1e-3,
        lr_scheduler_type="cosine",
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        fsdp=int(os.environ.get("WORLD_SIZE", "1")) > 1,  # FSDP2 shards the weights over all ranks
        bf16=on_gpu,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
    )
    trainer = ContextParallelSFT(
        model=model,
        args=args,
        train_dataset=conversations(chosen.dataset),
        processing_class=tokenizer,
        cp_size=chosen.cp_size,
        context_parallel={
            "method": chosen.method,
            **({"head_chunk": chosen.head_chunk, "stash": chosen.stash} if chosen.method == "upipe" else {}),
            "tile_size": chosen.tile_size,
        },
    )
    trainer.train()
    trainer.save_model()  # a folder that from_pretrained reads


if __name__ == "__main__":
    main()
