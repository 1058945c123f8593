"""From the job file's ``attention_kernel`` to a kernel object."""

from __future__ import annotations

import importlib.util

import torch

from torchtitan_upipe.device import SIMULATED
from torchtitan_upipe.kernels.contract import AttentionKernel
from torchtitan_upipe.kernels.rates import rates_of, read_rates
from torchtitan_upipe.kernels.reference import ReferenceKernel
from torchtitan_upipe.kernels.sdpa import CpuFlashKernel, CudaFlashKernel, CudnnKernel
from torchtitan_upipe.kernels.simulated import VARLEN, SimulatedKernel, SimulatedVarlenKernel

KERNEL_NAMES = ("auto", "sdpa", "cudnn", "flash2", "flash3", "reference")
CUDA_ONLY = {"cudnn": "", "flash2": "flash_attn", "flash3": "flash_attn_interface"}  # name -> module it needs


def check_kernel(name: str, device_type: str, dtype: torch.dtype, deterministic: bool = False) -> None:
    """Refuse a kernel that cannot run here.

    Args:
        name: one of ``KERNEL_NAMES``.
        device_type: ``"cpu"`` or ``"cuda"``.
        dtype: what attention will compute in.
        deterministic: gradients must be the same in every run.

    Raises:
        ValueError: the name is unknown, the kernel needs CUDA, a package or a precision that is not there.
    """
    if name not in KERNEL_NAMES:
        raise ValueError(f"attention_kernel = {name!r} is unknown; choose one of {', '.join(KERNEL_NAMES)}.")
    if name in CUDA_ONLY and device_type == "cpu":
        raise ValueError(
            f"attention_kernel = {name!r} runs on CUDA only and this job runs on {device_type}; "
            'use "auto", "sdpa" or "reference".'
        )
    if name == "cudnn" and deterministic:
        raise ValueError(
            'attention_kernel = "cudnn" has no deterministic backward, which debug.deterministic = true asks for; '
            'use "sdpa", "flash2" or "flash3", or remove the field.'
        )
    if device_type == SIMULATED:
        return  # stands for a machine that may have what this one lacks
    module = CUDA_ONLY.get(name)
    if not _installed(name):
        remedy = (
            "pip install --no-build-isolation flash-attn==2.8.3" if name == "flash2" else "install FlashAttention-3"
        )
        raise ValueError(f"attention_kernel = {name!r} needs the module {module}, which is missing: {remedy}.")
    if device_type == "cuda" and name != "reference" and dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"attention_kernel = {name!r} computes in bfloat16 on CUDA and this job asks for {dtype}; "
            'set training.mixed_precision_param = "bfloat16", or attention_kernel = "reference" for a small test.'
        )


def resolve_kernel(name: str, device_type: str, head_dim: int = 128) -> str:
    """The kernel that ``"auto"`` stands for on this machine; any other name stands for itself.

    By default ``"flash3"`` where it is installed on Hopper, else ``"sdpa"``. Another one is chosen only where the table
    of rates (``rates.py``) says that it is faster on this device, and only if it can do what the job needs.
    """
    if name != "auto" or device_type != "cuda":
        return "sdpa" if name == "auto" else name
    capability = torch.cuda.get_device_capability()
    default = "flash3" if _installed("flash3") and capability[0] == 9 else "sdpa"
    entry = rates_of(torch.cuda.get_device_name(), capability, read_rates())
    return default if entry is None else entry.fastest(default, _able(head_dim))


def _able(head_dim: int) -> list[str]:
    """The kernels that are here and can do the job; cuDNN has no deterministic backward, and heads of at most 128."""
    refused = {"cudnn"} if torch.are_deterministic_algorithms_enabled() or head_dim % 8 or head_dim > 128 else set()
    return [name for name in ("sdpa", *CUDA_ONLY) if _installed(name) and name not in refused]


def _installed(name: str) -> bool:
    module = CUDA_ONLY.get(name)
    return not module or importlib.util.find_spec(module) is not None


def build_kernel(name: str, device_type: str, head_dim: int = 128) -> AttentionKernel:
    """Build the kernel ``name`` (already checked by :func:`check_kernel`) for ``device_type`` and heads that wide."""
    if device_type == SIMULATED:
        return SimulatedVarlenKernel(name) if name in VARLEN else SimulatedKernel(name)
    match resolve_kernel(name, device_type, head_dim):
        case "reference":
            return ReferenceKernel()
        case "cudnn":
            return CudnnKernel()
        case "flash2":
            from torchtitan_upipe.kernels.flash_attn import FlashAttn2Kernel

            return FlashAttn2Kernel()
        case "flash3":
            torch.nn.attention.activate_flash_attention_impl("FA3")
            return CudaFlashKernel("flash3")
        case _ if device_type == "cuda":
            if torch.nn.attention.current_flash_attention_impl() is not None:  # an earlier "flash3" of this process
                torch.nn.attention.restore_flash_attention_impl()
            return CudaFlashKernel()
        case _:
            return CpuFlashKernel()
