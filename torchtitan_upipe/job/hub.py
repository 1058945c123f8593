"""Models of the Hugging Face Hub, by name: fetched once into its cache, where the rest of the job finds a folder."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torchtitan.config import JobConfig

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # of an owner and a model
DESCRIPTIONS = ["*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt"]
WEIGHTS = ["*.safetensors"]


def fetch_assets(config: JobConfig, simulated: bool) -> None:
    """Where ``model.hf_assets_path`` names no folder but a model of the Hub, put the folder of its copy in its place.

    Weights are fetched where the job begins with them. Ranks of a host wait for one another at the cache's own locks.

    Args:
        simulated: nothing but the model's shape is asked for, which only ``flavor = "hf"`` has in such a folder.

    Raises:
        ValueError: there is neither a folder nor such a model, or the Hub cannot be reached.
    """
    model, checkpoint = config.model, config.checkpoint
    name = model.hf_assets_path
    if Path(name).exists() or not NAME.fullmatch(name) or (simulated and model.flavor != "hf"):
        return
    weights = checkpoint.enable and checkpoint.initial_load_in_hf and not checkpoint.initial_load_path
    try:
        model.hf_assets_path = snapshot_download(
            name, allow_patterns=DESCRIPTIONS + (WEIGHTS if weights and not simulated else [])
        )
    except (OSError, HFValidationError) as error:  # the library's errors of networks and repositories are OSErrors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"model.hf_assets_path = {name!r} is no folder here, and no model of that name could be fetched from the "
            f"Hub ({reason}); name a downloaded model's folder."
        ) from error
