"""From a command line to a job that can run: read, user's modules imported, checked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module

from torchtitan.config import JobConfig
from torchtitan.tools.utils import device_type

from torchtitan_upipe.device import SIMULATED
from torchtitan_upipe.job.check import validate_job
from torchtitan_upipe.job.hub import fetch_assets
from torchtitan_upipe.job.load import load_config
from torchtitan_upipe.job.model import model_args
from torchtitan_upipe.job.shape import needed_ranks


def read_job(args: Sequence[str], world_size: int | None = None, device: str = device_type) -> JobConfig:
    """Read and check the job that the command line describes.

    What the job's ``experimental.custom_import`` registers, models, flavors and datasets, is known from here on. The
    plugin's own models are known once ``torchtitan_upipe.train_spec`` is imported.

    Args:
        args: the command line without the program.
        world_size: ranks of the job; 0 = as many as its degrees need; by default what started this process says.
        device: type of the device it is meant for; by default this machine's.

    Raises:
        ValueError: with one sentence that says what is wrong and how to mend it.
    """
    config = load_config(args)
    _import_extension(config.experimental.custom_import)
    if world_size is None:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if config.comm.mode != "default":
            world_size = int(os.environ.get("NGPU", world_size))
    fetch_assets(config, device == SIMULATED)
    validate_job(config, model_args(config), world_size or needed_ranks(config), device)
    return config


def _import_extension(module: str) -> None:
    if not module:
        return
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        missing = "" if error.name == module else f" (it imports {error.name!r}, which is not there)"
        raise ValueError(
            f"experimental.custom_import = {module!r} cannot be imported{missing}; run from the folder that holds it, "
            "or add that folder to PYTHONPATH."
        ) from error
    except Exception as error:
        raise ValueError(
            f"experimental.custom_import = {module!r} fails while it is imported: {type(error).__name__}: {error}"
        ) from error
