"""A job that is asked to stop: its ranks agree on one layer boundary and end there together.

Every rank runs the same program and counts the boundaries that it passes, so that boundary n is the same place on all
of them: between the same two collectives, with the same work behind it. A rank that gets a signal says so in the store
that the ranks have met at. A thread of each rank looks there once a second, puts down the number of its next boundary,
and takes the largest of all as the one to stop at. Once it has put its own down the rank does not pass that boundary
before it knows the largest. It waits for threads alone, which no collective holds up: nothing can hang for it, and a
boundary costs a sum and a comparison.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LOOK = 1.0  # seconds between two looks at the store
SHORTLY = 0.05  # the same, once a rank has been asked
GRACE = 10.0  # seconds that a rank has to end by itself where not all have answered
REASON, FAILED = "stop/reason", "stop/failed"


class Stopped(BaseException):
    """This rank, as all others, is at the boundary agreed on; says who was asked. No error, hence no ``Exception``."""


class Stop:
    """What a job does with ``SIGTERM`` and ``SIGUSR1``, from its making to :meth:`close`.

    Signals are noticed at once, whatever the main thread is busy with. Must be made on the main thread.
    """

    def __init__(self) -> None:
        self._number = 0  # of the boundary passed last
        self._asked = False
        self._agreed = threading.Event()
        self._stop_at = 0
        self._reason = ""
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None
        self._store: Any = None
        self._rank = self._size = 0
        self._failed = False
        self._closed = threading.Event()
        self._signals, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)

    def __enter__(self) -> Stop:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def watch(self, patience: float) -> None:
        """Begin to listen to the other ranks of the default group.

        Args:
            patience: seconds within which every rank's thread must answer, once one rank is asked.
        """
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = store.clone()  # a connection of its own: a look may wait
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._thread = threading.Thread(target=self._listen, args=(patience,), name="stop", daemon=True)
        self._thread.start()

    def boundary(self) -> None:
        """Pass a place that all ranks pass in the same order.

        Raises:
            Stopped: this is where all ranks stop.
            TimeoutError: a rank's thread has not answered.
        """
        self._number += 1  # before the look: whoever sets ``_asked`` reads the number after it
        if not self._asked:
            return
        self._agreed.wait()
        if self._failure is not None:
            raise TimeoutError(f"not all ranks answered after {self._reason}") from self._failure
        if self._number >= self._stop_at:
            raise Stopped(self._reason)

    def close(self, failed: bool = False) -> None:
        """Give signals their meaning back, and let ranks that are asked later know that this one goes no further.

        Args:
            failed: it ends by an error. Ranks that are asked to end then do so at once.
        """
        self._failed = failed
        self._closed.set()
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._sender.close()
        if self._thread is not None:
            self._thread.join(LOOK)
        self._signals.close()

    def _listen(self, patience: float) -> None:
        try:
            while not self._store.check([REASON]):
                if not select.select([self._signals], [], [], LOOK)[0]:
                    continue
                numbers = self._signals.recv(64)
                if not numbers:  # closed
                    self._store.set(FAILED, "") if self._failed else self._put_down()
                    return
                if asked := [number for number in numbers if number in SIGNALS]:
                    reason = f"{signal.Signals(asked[0]).name} on rank {self._rank}"
                    self._store.compare_set(REASON, "", reason)
            self._agree(patience)
        except (RuntimeError, OSError, ValueError):  # the store's server, or a socket, has gone: so will this rank
            self._failure = self._failure or RuntimeError("the ranks' store is gone")
        finally:
            self._agreed.set()

    def _put_down(self) -> None:
        self._store.set(_next_of(self._rank), str(self._number + 1))

    def _agree(self, patience: float) -> None:
        self._asked = True
        self._reason = self._store.get(REASON).decode()
        self._put_down()
        ranks = [_next_of(rank) for rank in range(self._size)]
        patient_until = time.monotonic() + patience
        while not self._store.check(ranks):
            if self._store.check([FAILED]):  # and this rank is being ended for it
                os._exit(1)
            if time.monotonic() > patient_until:
                self._give_up(RuntimeError(f"waited for {patience:.0f} s"))
                return
            time.sleep(SHORTLY)
        self._stop_at = max(int(number) for number in self._store.multi_get(ranks))

    def _give_up(self, error: Exception) -> None:
        """Let the main thread raise, or end a process whose main thread waits for a rank that has gone."""
        self._failure = error
        self._agreed.set()
        if not self._closed.wait(GRACE):
            os._exit(1)


def _next_of(rank: int) -> str:
    return f"stop/next boundary of rank {rank}"


def mark_boundaries(model: nn.Module, boundary: Callable[[], None]) -> None:
    """Call ``boundary`` where each block of ``model`` begins: its forward, its second run and its backward."""
    blocks: Any = model.layers

    def in_backward(block: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: boundary())

    for block in blocks.values():
        run_twice = getattr(block, "_checkpoint_wrapped_module", block)
        run_twice.register_forward_pre_hook(lambda *_: boundary())
        block.register_forward_hook(in_backward)
