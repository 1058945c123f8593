"""UPipe context parallelism for TorchTitan.

Importing this package does nothing else: ``torchtitan_upipe.train`` is the entry point, and
``torchtitan_upipe.train_spec`` registers the models ``llama3_upipe`` and ``qwen3_upipe`` with TorchTitan.
"""

__version__ = "0.1.0"
