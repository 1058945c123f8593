"""Reading and checking a job: its file and command line, its fields and files, its shape in numbers."""

from torchtitan_upipe.device import enable_cpu

enable_cpu()  # before any torchtitan import: see device.py
