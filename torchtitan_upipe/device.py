"""CPU as a back end of TorchTitan. Nothing outside this file names a device on its own.

TorchTitan 0.2.2 asks ``torch._utils`` for the device once, while it is being imported, and takes CUDA where there is no
accelerator. :func:`enable_cpu` must therefore run before the first torchtitan import.
"""

from __future__ import annotations

import atexit
import os
import platform
import resource
import sys
import types
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch._utils
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

CLEAR_REFS = Path("/proc/self/clear_refs")  # Linux: writing 5 resets the peak resident set size
STATUS = Path("/proc/self/status")


def enable_cpu() -> None:
    """Make TorchTitan run on CPU with gloo where torch finds no accelerator; do nothing where it finds one.

    Raises:
        RuntimeError: torchtitan was imported before, and has already decided for CUDA.
    """
    if torch._utils._get_available_device_type() is not None:
        return
    if "torchtitan.tools.utils" in sys.modules:
        raise RuntimeError(
            "torchtitan was imported before CPU support was enabled; start the job with "
            "`torchrun -m torchtitan_upipe.train`, or import torchtitan_upipe.train first."
        )
    get_device_module = torch._utils._get_device_module
    cpu = CpuModule()
    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda name: cpu if name == "cpu" else get_device_module(name)  # type: ignore[assignment]


def leave(code: int) -> NoReturn:
    """End the process with ``code``; on CPU without the interpreter's own end.

    Gloo's threads may still hold a tensor then, and freeing one while the interpreter shuts down aborts the process
    (pytorch/pytorch#179291).
    """
    if torch._utils._get_available_device_type() != "cpu":
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class CpuModule(types.ModuleType):
    """``torch.cpu`` with what TorchTitan asks of a device module: name, size and memory of the "device".

    Memory is this process's resident set: the peak since :meth:`reset_peak_memory_stats`, in bytes.
    """

    def __init__(self) -> None:
        super().__init__("torchtitan_upipe.device.cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        """Index of the only device."""
        return 0

    def get_device_name(self, device: object = None) -> str:
        """Name of the processor architecture, e.g. ``"CPU (x86_64)"``."""
        return f"CPU ({platform.machine()})"

    def get_device_properties(self, device: object = None) -> types.SimpleNamespace:
        """``total_memory`` in bytes: the machine's, shared by all ranks."""
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return types.SimpleNamespace(name=self.get_device_name(), total_memory=total)

    def memory_stats(self, device: object = None) -> dict[str, int]:
        """The keys that TorchTitan reads, both from the peak resident set; host memory has no retries and no OOMs."""
        peak = _peak_resident_bytes()
        return {
            "active_bytes.all.peak": peak,
            "reserved_bytes.all.peak": peak,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }

    def reset_peak_memory_stats(self, device: object = None) -> None:
        """Start a new peak, where the system can (Linux); elsewhere the peak is the process's."""
        if CLEAR_REFS.exists() and os.access(CLEAR_REFS, os.W_OK):
            CLEAR_REFS.write_text("5")

    def empty_cache(self) -> None:
        """Host memory has no cache to empty."""


def _peak_resident_bytes() -> int:
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def prepare_for_gloo(model: nn.Module) -> None:
    """Let FSDP2 reduce with plain sums where the process group is gloo.

    TorchTitan sets FSDP's gradient divide factor to 1 (the loss is already normalised); FSDP2 then asks for
    ``PREMUL_SUM``, which gloo does not have.
    """
    if dist.get_backend() == "gloo":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
