"""``python -m torchtitan_upipe.export CHECKPOINT --to DIR``: a checkpoint of any step as a Hugging Face model.

Needs no GPU and one process; no more than one file's weights are in memory. CHECKPOINT is a folder ``step-N``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from torchtitan.config import TORCH_DTYPE_MAP

import torchtitan_upipe.titan.specs  # noqa: F401  (registers the models)
from torchtitan_upipe.device import SIMULATED
from torchtitan_upipe.huggingface.folder import ModelFiles
from torchtitan_upipe.job.load import split_options
from torchtitan_upipe.job.model import model_args
from torchtitan_upipe.job.pretrained import CONFIG, read_pretrained
from torchtitan_upipe.job.read import read_job
from torchtitan_upipe.titan.export import export_checkpoint, model_files


@dataclass(frozen=True)
class Options:
    """Turn a checkpoint into a folder that Transformers opens. All other options are the job's that wrote it.

    They are needed where the checkpoint has no config.json beside it, which this project's trainer leaves.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A folder step-N of a job's checkpoints."""

    to: Path
    """The folder to write; it must be new or empty."""

    dtype: Literal["as saved", "float32", "bfloat16", "float16"] = "as saved"
    """Of the weights written."""


def main(args: Sequence[str] | None = None) -> int:
    """Write the folder; return the exit code."""
    own_args, job_args = split_options(sys.argv[1:] if args is None else args)
    options = tyro.cli(Options, args=own_args, prog="torchtitan_upipe.export")
    try:
        if options.to.exists() and (not options.to.is_dir() or any(options.to.iterdir())):
            raise ValueError(f"--to {options.to} is there already and not an empty folder; choose another.")
        files = _files(options.checkpoint, job_args)
        dtype = None if options.dtype == "as saved" else TORCH_DTYPE_MAP[options.dtype]
        export_checkpoint(options.checkpoint, options.to, files, dtype)
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {options.to}: {files.model.model_type}, context of {files.model.length} tokens")
    return 0


def _files(checkpoint: Path, job_args: Sequence[str]) -> ModelFiles:
    if job_args:
        config = read_job(job_args, 0, SIMULATED)
        files = model_files(config, model_args(config))
        if files is None:
            raise ValueError(f"{config.model.name} {config.model.flavor} is no model that Transformers has.")
        return files
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is not a folder; name a step-N of a job's checkpoints.")
    if not (checkpoint / CONFIG).is_file():
        raise ValueError(f"{checkpoint} has no {CONFIG}; name the job that wrote it, too: --job.config_file.")
    return ModelFiles(read_pretrained(str(checkpoint)), checkpoint)


if __name__ == "__main__":
    sys.exit(main())
