"""How torchrun starts a rank and hears how it ended; and a rank that no one started."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path

PATIENCE = 30.0  # seconds that the other ranks of a node leave its first one to report the same refusal
FIRST = 5.0  # seconds that they leave it to report the same failure, which may also be theirs alone


def local_rank() -> int:
    """This process's number on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def stand_alone() -> None:
    """Where neither torchrun nor a scheduler has said which rank this is: the only one."""
    if "RANK" in os.environ or "LOCAL_RANK" in os.environ:
        return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")  # any free one


def refuse(error: ValueError) -> int:
    """Report a refused job once per node, where torchrun's closing summary shows it; return the exit code.

    torchrun prints the message of the first failing rank's error file last of all. The other ranks wait to be ended
    by torchrun, so that theirs is not the failure it reports.
    """
    if local_rank() != 0:
        time.sleep(PATIENCE)
        return 1
    return fail(f"ValueError: {error}")


def fail(message: str) -> int:
    """Report what ended this rank's job, once per node where all ranks ended by the same; return the exit code."""
    _tell_torchrun(message)  # at once: TorchTitan has left it a whole traceback
    if local_rank() != 0:
        time.sleep(FIRST)  # torchrun ends this rank meanwhile, if the first one has failed
    print(message, file=sys.stderr, flush=True)
    return 1


def _tell_torchrun(message: str) -> None:
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        Path(error_file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))


def keep_traceback(error: BaseException, folder: Path) -> Path | None:
    """Write the traceback of ``error`` below ``folder``; None where that is not possible."""
    path = folder / "errors" / f"rank-{os.environ.get('RANK', '0')}.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)))
    except OSError:
        return None
    return path
