"""Where ranks leave their findings: torch's key-value store, which works in whatever state the collectives are."""

from __future__ import annotations

import pickle
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store


class Missing:
    """In the place of a rank's findings: none came.

    Attributes:
        at: what the rank was last about to do.
    """

    def __init__(self, at: str) -> None:
        self.at = at


class Board:
    """Findings of all ranks, read by rank 0, and what it makes of them, read by all.

    Args:
        store: shared by all ranks; by default that of the process group.
        patience: seconds that rank 0 waits for a rank once it is ready itself.
    """

    def __init__(self, rank: int, size: int, patience: float, store: Store | None = None) -> None:
        self.rank, self.size, self.patience = rank, size, timedelta(seconds=patience)
        self._store = PrefixStore("check", store or _get_default_store())

    def mark(self, doing: str) -> None:
        """Say what this rank is about to do, for whoever misses it."""
        self._store.set(f"at/{self.rank}", doing)

    def put(self, topic: str, findings: Any) -> None:
        """Leave this rank's findings."""
        self._store.set(f"{topic}/{self.rank}", pickle.dumps(findings))  # type: ignore[arg-type]

    def missing(self, topic: str) -> dict[int, Missing]:
        """The ranks that have left nothing."""
        absent = [rank for rank in range(self.size) if not self._store.check([f"{topic}/{rank}"])]
        return {rank: Missing(self._at(rank)) for rank in absent}

    def all(self, topic: str) -> list[Any]:
        """The findings of all ranks, or :class:`Missing`: who has left nothing after :attr:`patience`."""
        try:
            self._store.wait([f"{topic}/{rank}" for rank in range(self.size)], self.patience)
            absent: dict[int, Missing] = {}
        except dist.DistError:
            absent = self.missing(topic)
        return [
            absent[rank] if rank in absent else pickle.loads(self._store.get(f"{topic}/{rank}"))
            for rank in range(self.size)
        ]

    def publish(self, topic: str, value: Any) -> None:
        """Let all ranks :meth:`read` this."""
        self._store.set(topic, pickle.dumps(value))  # type: ignore[arg-type]

    def read(self, topic: str) -> Any:
        """What rank 0 has published, once it has.

        Raises:
            DistError: it has not in thrice the patience, in which it may wait for others itself.
        """
        self._store.wait([topic], 3 * self.patience)
        return pickle.loads(self._store.get(topic))

    def part(self) -> None:
        """Wait until all ranks are here, or for :attr:`patience`: the store may end with rank 0."""
        self.put("end", True)
        if self.rank == 0:
            self.all("end")

    def _at(self, rank: int) -> str:
        return self._store.get(f"at/{rank}").decode() if self._store.check([f"at/{rank}"]) else "nothing yet"
