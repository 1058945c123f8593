"""What the server process of ``ranks.py`` imports before it forks ranks. No tensor work may happen here."""

import inspect
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs a network, and none should wait for one

import torchtitan_upipe.train  # noqa: F401  (first: it chooses the device)

# isort: split
import torchtitan.train

from torchtitan_upipe.job.load import load_config

# At the end TorchTitan's trainer gives slow ranks two seconds; here rank 0 stays until all are done (ranks.py).
torchtitan.train.time = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})


def remembered(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``find`` by the name of what is looked for: a job's sections are classes that are made for each job."""
    known: dict[tuple[str, str], Any] = {}

    def found(thing: Any) -> Any:
        if not isinstance(thing, type):
            return find(thing)
        name = thing.__module__, thing.__qualname__
        if name not in known:
            known[name] = find(thing)
        return known[name]

    return found


# Docstrings of all fields, for which a file is parsed for each class that it holds.
inspect.findsource = remembered(inspect.findsource)
load_config(["--job.config_file", str(Path(__file__).parent.parent / "train_configs/llama3_debug.toml")])
