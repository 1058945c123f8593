"""CPU, and a device that does not exist, as back ends of TorchTitan; what only one kind of device needs.

TorchTitan 0.2.2 asks ``torch._utils`` for the device once, while it is being imported, and takes CUDA where there is no
accelerator. :func:`enable_cpu` or :func:`enable_simulated_device` must run before the first torchtitan import.
"""

from __future__ import annotations

import atexit
import os
import platform
import re
import resource
import sys
import types
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch._utils
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

CLEAR_REFS = Path("/proc/self/clear_refs")  # Linux: writing 5 resets the peak resident set size
STATUS = Path("/proc/self/status")
HOST = Path("/")  # where a driver lists what it drives
NO_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "CUDA error: out of memory")
SIMULATED = "simulated"  # device type of dry runs: told apart from host memory, holds only fake tensors


def enable_cpu() -> None:
    """Make TorchTitan run on CPU with gloo where torch finds no accelerator; do nothing where it finds one.

    Raises:
        RuntimeError: torchtitan was imported before, and has already decided for CUDA.
    """
    if torch._utils._get_available_device_type() is not None:
        return
    _answer_torchtitan("cpu", CpuModule())
    _keep_pageable()


def refuse_idle_gpus() -> None:
    """Refuse to compute on CPU beside GPUs that this process was given and torch cannot use.

    A GPU counts where the driver has made its device file, which a container without GPUs lacks, and where
    ``CUDA_VISIBLE_DEVICES`` does not hide it: without a device at its head, as in ``""``, ``"-1"`` or Slurm's
    ``"NoDevFiles"``, it hides all.

    Raises:
        ValueError: what torch was built for, the driver's version, and what to do.
    """
    visible = re.match(r"\s*(\d|GPU-|MIG-)", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
    gpus = list((HOST / "dev").glob("nvidia[0-9]*"))
    if torch._utils._get_available_device_type() != "cpu" or not visible or not gpus:
        return
    version = HOST / "proc/driver/nvidia/version"
    found = re.search(r"\d{3,}(\.\d+)+", version.read_text()) if version.exists() else None
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU alone"
    raise ValueError(
        f"torch {torch.__version__}, built for {built_for}, can use none of this machine's {len(gpus)} GPUs, whose "
        f"driver is {found[0] if found else 'of unknown version'}; install a build of torch for that driver, or set "
        'CUDA_VISIBLE_DEVICES="" to run on CPU.'
    )


def enable_simulated_device() -> None:
    """Give this process the device type :data:`SIMULATED`, and TorchTitan no other.

    Its tensors must be fake ones (``FakeTensorMode``): nothing can be computed or stored there. A fake ``"cuda"``
    device would need a CUDA build of torch.

    Raises:
        RuntimeError: torchtitan was imported before.
    """
    module = SimulatedModule()
    _setup_privateuseone_for_python_backend(SIMULATED, backend_module=module)
    _answer_torchtitan(SIMULATED, module)
    _keep_pageable()


def _answer_torchtitan(device_type: str, module: types.ModuleType) -> None:
    if "torchtitan.tools.utils" in sys.modules:
        raise RuntimeError(
            "torchtitan was imported before its device was set; start the job with "
            "`torchrun -m torchtitan_upipe.train`, or import torchtitan_upipe.titan first."
        )
    get_device_module = torch._utils._get_device_module
    torch._utils._get_available_device_type = lambda: device_type
    torch._utils._get_device_module = lambda name: module if name == device_type else get_device_module(name)  # type: ignore[assignment]


def _keep_pageable() -> None:
    """Let FSDP2's offload, which TorchTitan asks for without arguments, pin no memory: nothing here needs it."""
    CPUOffloadPolicy.__init__.__defaults__ = (False,)


def leave(code: int) -> NoReturn:
    """End the process with ``code``; on CPU, or where the job has failed, without the interpreter's own end.

    Gloo's threads may still hold a tensor then, and freeing one while the interpreter shuts down aborts the process
    (pytorch/pytorch#179291). NCCL's communicators, of which a failed rank still has some, may wait there for ranks that
    wait for this one.
    """
    on_cpu = torch._utils._get_available_device_type() == "cpu"
    if code == 0 and not on_cpu:
        sys.exit(code)
    if on_cpu:
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
        peak = peak_resident_bytes()
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


class SimulatedModule(CpuModule):
    """What torch and TorchTitan ask of a device module, for the device of dry runs."""

    def get_device_name(self, device: object = None) -> str:
        """Name in TorchTitan's log."""
        return SIMULATED

    def memory_stats(self, device: object = None) -> dict[str, int]:
        """Nothing: dry runs are watched from outside (``dry_run/live_bytes.py``)."""
        return dict.fromkeys(super().memory_stats(), 0)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Dtypes of autocast."""
        return [torch.bfloat16, torch.float16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """No random numbers here."""


def resident_bytes() -> int:
    """This process's resident set; where the system does not tell it (Linux does), its peak."""
    return _status("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The largest resident set since the process began, or :meth:`CpuModule.reset_peak_memory_stats`."""
    if known := _status("VmHWM"):
        return known
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(name: str) -> int:
    """An entry of the kernel's, in bytes; 0 where there is none."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def memory_of_rank(device_type: str) -> int:
    """Bytes of device memory that a rank has to itself: its device's, or on CPU its share of the machine's."""
    module = torch._utils._get_device_module(device_type)
    total: int = module.get_device_properties(module.current_device()).total_memory
    return total // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device_type == "cpu" else total


def host_memory_of_rank() -> int:
    """Bytes of this host's memory that a rank may take: an equal share."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def name_of_device(device_type: str) -> str:
    """The name of this process's device, as its maker spells it."""
    name: str = torch._utils._get_device_module(device_type).get_device_name()
    return name


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left; CPU and pinned allocators say so in words only."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in NO_MEMORY)


def prepare_for_gloo(model: nn.Module) -> None:
    """Let FSDP2 reduce with plain sums where the process group is gloo.

    TorchTitan sets FSDP's gradient divide factor to 1 (the loss is already normalised); FSDP2 then asks for
    ``PREMUL_SUM``, which gloo does not have.
    """
    if dist.get_backend() == "gloo":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
