"""How often attention runs in a training step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.jobs import job_args
from tests.ranks import run_ranks
from tests.test_train import LLAMA, fpdt, upipe


def attention_forwards(args: list[str]) -> tuple[int, int]:
    """Floating-point operations of attention's forward and backward in one training step of this rank."""
    import torch.utils.flop_counter as flops

    from torchtitan_upipe.job.read import read_job
    from torchtitan_upipe.titan.trainer import Trainer

    trainer = Trainer(read_job(args))
    with flops.FlopCounterMode(display=False, custom_mapping=cpu_attention_flops()) as counter:
        trainer.train()
    trainer.close()
    return tuple(counter.get_flop_counts()["Global"][op] for op in cpu_attention_flops())  # type: ignore[return-value]


def cpu_attention_flops() -> dict[object, object]:
    """Torch's own formulas for its flash operators, for those of the CPU, which it does not know."""
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    def every_head(q: torch.Size, *of_keys: torch.Size) -> list[torch.Size]:
        """As if each query head had a KV head of its own: torch 2.11's formulas know no others."""
        return [q, *(torch.Size((*q[:2], *t[2:])) for t in of_keys)]

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
            *every_head(q, k, v)
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda do, q, k, v, *_, **__: (
            sdpa_backward_flop_count(do, *every_head(q, k, v))
        ),
    }


@pytest.mark.parametrize("method", [partial(upipe, 4), partial(fpdt, 64)], ids=["upipe", "fpdt"])
def test_a_stash_spares_one_attention_forward_under_full_checkpointing(
    method: Callable[[str], dict[str, object]], tmp_path: Path
) -> None:
    """Attention takes 3.5 instead of 4.5 forward-equivalents: backward is 2.5."""
    ratio = {}
    for stash in ("none", "device", "host"):
        options = {**LLAMA, **method(stash), "activation_checkpoint__mode": "full", "training__steps": 1}
        args = job_args(tmp_path / stash, 2, **options)
        ((forward, backward), _) = run_ranks(attention_forwards, 2, args, init=False)
        ratio[stash] = forward / (backward / 2.5)
    assert ratio == {"none": 2.0, "device": 1.0, "host": 1.0}
