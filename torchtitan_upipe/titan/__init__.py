"""All that depends on TorchTitan's version: trainer, models, data loader, checkpoints, console."""

from torchtitan_upipe.device import enable_cpu

enable_cpu()  # before any torchtitan import: see device.py
