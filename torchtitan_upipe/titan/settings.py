"""Settings that a job leaves to the planner, chosen once its ranks know each other."""

from __future__ import annotations

import os

import torch.distributed as dist
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

from torchtitan_upipe.memory.startup import Place, fill_settings, leaves_settings, place_of, smallest


def choose_settings(config: JobConfig, world_size: int) -> None:
    """Set them, the same on all ranks, for what the poorest rank has; nothing where the job leaves none.

    Raises:
        ValueError: nothing fits.
    """
    if not leaves_settings(config, device_type):
        return
    ranks_per_host = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    places: list[Place | None] = [None] * dist.get_world_size()
    dist.all_gather_object(places, place_of(device_type, ranks_per_host))
    logger.info(fill_settings(config, world_size, smallest([place for place in places if place is not None])))
