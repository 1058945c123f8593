"""What the server process of ``ranks.py`` imports before it forks ranks. No tensor work may happen here."""

import os
import time
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs a network, and none should wait for one

import torchtitan_upipe.train  # noqa: F401  (first: it chooses the device)

# isort: split
import torchtitan.train

# At the end TorchTitan's trainer gives slow ranks two seconds; here rank 0 stays until all are done (ranks.py).
torchtitan.train.time = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
