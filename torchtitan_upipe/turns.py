"""One process after another in the place of a rank, and what rank 0 decides for all ranks.

A rank that has done a part of its work replaces itself by a new process (:meth:`Turn.next`): nothing of one part, its
device memory, its communicators, what TorchTitan keeps in modules, is left in the next one.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed import PrefixStore, Store, distributed_c10d  # type: ignore[attr-defined]

c10d: Any = distributed_c10d
TURN = "TORCHTITAN_UPIPE_TURN"
OPEN_FILES = Path("/proc/self/fd")
WAIT = timedelta(hours=1)  # for rank 0 to decide, and for the slowest rank to begin its turn


class Turn:
    """This process's turn. Process groups that are made after it find each other under keys of the turn.

    torchrun keeps one store for all turns, which still holds the addresses of the turn before.
    """

    def __init__(self) -> None:
        self._number = int(os.environ.get(TURN, "0"))
        self._environment = dict(os.environ)  # before a trainer writes into it
        self._store: Store | None = None
        self._decisions = 0
        find, keys = c10d.rendezvous, f"turn {self._number}"

        def find_with_own_keys(*args: Any, **kwargs: Any) -> Iterator[tuple[Store, int, int]]:
            for store, rank, ranks in find(*args, **kwargs):
                yield PrefixStore(keys, store), rank, ranks

        c10d.rendezvous = find_with_own_keys  # what `init_process_group` calls

    def agree(self, decide: Callable[[], Any]) -> Any:
        """What ``decide`` returns on rank 0, which alone calls it, on all ranks.

        Args:
            decide: returns what JSON can hold, or raises ValueError or OSError.

        Raises:
            ValueError: what ``decide`` raised, on all ranks.
        """
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if self._store is None:
            self._store, _, _ = next(c10d.rendezvous("env://", rank, ranks, timeout=WAIT))
            self._store.set_timeout(WAIT)
        store, self._decisions = self._store, self._decisions + 1
        decision, heard, by_all = (f"decision {self._decisions}{part}" for part in ("", ", heard", ", heard by all"))
        if rank == 0:
            try:
                store.set(decision, json.dumps({"value": decide()}))
            except (ValueError, OSError) as error:
                store.set(decision, json.dumps({"refused": str(error)}))
        found = json.loads(store.get(decision))
        if store.add(heard, 1) == ranks:
            store.set(by_all, "")
        store.wait([by_all])  # the process of rank 0 may hold the store
        if "refused" in found:
            raise ValueError(found["refused"])
        return found["value"]

    def next(self) -> NoReturn:
        """Begin the next turn: this process anew, with the command that began it.

        torchrun sees no end, since the process keeps its number and its output.
        """
        atexit._run_exitfuncs()  # processes that read data ahead end here
        sys.stdout.flush()
        sys.stderr.flush()
        for name in os.listdir(OPEN_FILES) if OPEN_FILES.is_dir() else ():
            if int(name) > 2 and (OPEN_FILES / name).exists():
                os.set_inheritable(int(name), False)  # libraries may have opened theirs to be handed on
        os.execve(sys.executable, sys.orig_argv, {**self._environment, TURN: str(self._number + 1)})
