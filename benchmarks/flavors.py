"""Flavors that only the benchmarks need; name this module in ``[experimental] custom_import``."""

from __future__ import annotations

from dataclasses import replace

from torchtitan.models.qwen3 import Qwen3ModelArgs
from torchtitan.protocols.train_spec import get_train_spec

import torchtitan_upipe.titan.specs  # noqa: F401  (registers the models)
from torchtitan_upipe.titan.flavors import VOCAB_SIZE

# Heads wider than the model (H*d = 512, D = 128; Qwen3-32B: 8192 and 5120) and a small feed-forward, so that attention
# takes most of memory and time at the lengths that two cores can run
CPU_ATTENTION = Qwen3ModelArgs(
    dim=128, n_layers=2, n_heads=16, n_kv_heads=4, head_dim=32, hidden_dim=256, vocab_size=VOCAB_SIZE
)

get_train_spec("qwen3_upipe").model_args["cpu_attention"] = CPU_ATTENTION

# Llama3-8B with fewer layers, for hosts that its optimizer does not fit on
_llama3 = get_train_spec("llama3_upipe").model_args
for _layers in (16, 8):
    _llama3[f"8B_{_layers}layers"] = replace(_llama3["8B"], n_layers=_layers)
