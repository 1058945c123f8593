"""What the server process of ``ranks.py`` imports before it forks ranks. No tensor work may happen here."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs a network, and none should wait for one

import torchtitan_upipe.train  # noqa: F401  (first: it chooses the device)

# isort: split
import torchtitan.train

from torchtitan_upipe.job.load import load_config

# At the end TorchTitan's trainer gives slow ranks two seconds; here rank 0 stays until all are done (ranks.py).
torchtitan.train.time = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})

# Files that the docstrings of fields are read from stay in memory.
load_config(["--job.config_file", str(Path(__file__).parent.parent / "train_configs/llama3_debug.toml")])
