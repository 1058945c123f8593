"""FSDP2 on ranks without an accelerator, which Accelerate gives to accelerators alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import DistributedType, PartialState


@contextmanager
def fsdp_on_cpu(args: Any) -> Iterator[None]:
    """Within, Accelerate's state, built from ``args``, takes FSDP2 on gloo ranks as it does on accelerators.

    Accelerate 1.15 chooses FSDP only where it counts several accelerators, whatever the plugin asks for.
    """
    state = PartialState()
    if args.fsdp_plugin_args is None or state.distributed_type != DistributedType.MULTI_CPU:
        yield
        return
    shared = PartialState._shared_state
    shared["distributed_type"] = DistributedType.MULTI_XPU
    try:
        yield
    finally:
        if shared["distributed_type"] == DistributedType.MULTI_XPU:
            shared["distributed_type"] = DistributedType.MULTI_CPU
