"""Train the short-context model of the context extension demo from random weights, with Transformers alone.

python scripts/extend/base.py scripts/extend/model

Some minutes on one core. What is written is what a user would bring: config.json, weights, tokenizer.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from documents import SHORTEST, document, write_tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH = 64
CONTEXT = 128
TOKENS = 1024  # of a batch
STEPS = 4500  # until it retrieves
MORE_STEPS = 1000  # until it does so across its whole context


def main(folder: Path) -> None:
    """Write the model into ``folder``."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = fresh_model(tokenizer.get_vocab_size())
    train(model, tokenizer, STEPS, lr=3e-3, across=False)
    train(model, tokenizer, MORE_STEPS, lr=1e-3, across=True)
    model.save_pretrained(folder)


def fresh_model(vocab_size: int) -> LlamaForCausalLM:
    """A Llama of two layers whose RoPE turns its slowest wave by half a radian within the context."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        initializer_range=WIDTH**-0.5,  # 0.02 is for wide models
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, 0.5, 0.5)  # what all have in common: attention by position
    return model


def train(model: LlamaForCausalLM, tokenizer: Tokenizer, steps: int, lr: float, across: bool) -> None:
    """Train on documents of all lengths; not ``across``: of up to 40 tokens first, from which retrieval is learnt."""
    rng = random.Random(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50, (steps - step) / (0.3 * steps)))
    for step in range(1, steps + 1):
        growth = 1.0 if across else min(1.0, max(0.0, 3 * step / steps - 1))
        tokens = batch(rng, int(40 + (CONTEXT - 40) * growth), across, tokenizer)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}  loss {loss.item():.3f}", flush=True)


def batch(rng: random.Random, longest: int, across: bool, tokenizer: Tokenizer) -> Tensor:
    """``TOKENS`` tokens of documents of one length, which is drawn."""
    share = rng.random() ** (0.5 if across else 1.0)
    length = int((SHORTEST + 2) * (longest / (SHORTEST + 2)) ** share + 0.5)
    texts = [f"<s> {document(rng, length - 2, across)} </s>" for _ in range(TOKENS // length)]
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
