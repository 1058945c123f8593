"""Tiny flavors next to TorchTitan's own, for CPU runs and tests. The vocabulary is the shipped tokenizer's."""

from __future__ import annotations

from torchtitan.models.llama3 import TransformerModelArgs
from torchtitan.models.qwen3 import Qwen3ModelArgs

VOCAB_SIZE = 2048

LLAMA3_DEBUG = {
    # GQA, four query heads per KV head; eight KV heads would divide most degrees, four do not divide 8
    "debug": TransformerModelArgs(
        dim=256, n_layers=4, n_heads=16, n_kv_heads=4, vocab_size=VOCAB_SIZE, rope_theta=500000
    ),
    # fewer KV heads than ranks from degree 4 on
    "debug_kv2": TransformerModelArgs(
        dim=128, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=VOCAB_SIZE, rope_theta=500000
    ),
    # a head count with a factor 7, as Qwen2.5-7B's 28
    "debug_heads14": TransformerModelArgs(
        dim=224, n_layers=2, n_heads=14, n_kv_heads=2, vocab_size=VOCAB_SIZE, rope_theta=500000
    ),
}

QWEN3_DEBUG = {
    # H*d = 256 and D = 192, q/k norm
    "debug": Qwen3ModelArgs(
        dim=192, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=32, hidden_dim=512, vocab_size=VOCAB_SIZE
    ),
    # one KV head for all
    "debug_mqa": Qwen3ModelArgs(
        dim=96, n_layers=2, n_heads=8, n_kv_heads=1, head_dim=16, hidden_dim=256, vocab_size=VOCAB_SIZE
    ),
    # embedding and output share their weight, as in the small Qwen3 models
    "debug_tied": Qwen3ModelArgs(
        dim=96,
        n_layers=2,
        n_heads=8,
        n_kv_heads=4,
        head_dim=16,
        hidden_dim=256,
        vocab_size=VOCAB_SIZE,
        enable_weight_tying=True,
    ),
}
