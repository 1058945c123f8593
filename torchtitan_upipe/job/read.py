"""From a command line to a job that can run: read, user's modules imported, checked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module

from torchtitan.config import JobConfig
from torchtitan.protocols import BaseModelArgs
from torchtitan.protocols.train_spec import _extra_train_specs, get_train_spec
from torchtitan.tools.utils import device_type

from torchtitan_upipe.job.check import validate_job
from torchtitan_upipe.job.load import load_config
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
    validate_job(config, model_args(config), world_size or needed_ranks(config), device)
    return config


def model_args(config: JobConfig) -> BaseModelArgs:
    """TorchTitan's arguments of the job's model and flavor.

    Raises:
        ValueError: no such model, or no such flavor.
    """
    name, flavor = config.model.name, config.model.flavor
    if name not in _extra_train_specs:  # TorchTitan's own models do not attach the plugin's methods
        raise ValueError(
            f"model.name = {name!r} is unknown here; choose one of {', '.join(_extra_train_specs)}, or name the module "
            "that registers it in experimental.custom_import."
        )
    flavors = get_train_spec(name).model_args
    if flavor not in flavors:
        raise ValueError(f"model.flavor = {flavor!r} is unknown for {name}; choose one of {', '.join(flavors)}.")
    return flavors[flavor]


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
