"""What the server process of ``ranks.py`` imports before it forks ranks. No tensor work may happen here."""

import time
from types import SimpleNamespace

import torchtitan_upipe.train  # noqa: F401  (first: it chooses the device)

# isort: split
import torchtitan.train

# At the end TorchTitan's trainer gives slow ranks two seconds; here rank 0 stays until all are done (ranks.py).
torchtitan.train.time = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
