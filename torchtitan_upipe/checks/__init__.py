"""What is tried on a job's own ranks before the job starts; ``torchtitan_upipe.check`` runs it."""

from torchtitan_upipe.device import enable_cpu

enable_cpu()  # before any torchtitan import: see device.py
