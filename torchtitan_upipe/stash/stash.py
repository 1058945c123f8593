"""The stash: what a stage keeps for the backward pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Place = tuple[int, int]  # (stage, query tile or sequence chunk)
PutAway = Callable[[Tensor], "Kept"]


class Reading(Protocol):
    """A tensor asked for."""

    def get(self) -> Tensor:
        """The tensor, on the device."""


class Readable(Protocol):
    """A tensor of which rows can be asked for."""

    def begin_read(self, rows: slice) -> Reading:
        """Ask for the rows ``[:, rows]``; the tensor stays here."""


class Kept(Readable, Protocol):
    """A tensor put away, on the device or on the host (:class:`~torchtitan_upipe.stash.host_pool.HostCopy`)."""

    def settle(self) -> None:
        """Nothing holds the tensor's memory on the device any more, if it was put elsewhere."""

    def fetch(self) -> None:
        """A hint that :meth:`get`, or :meth:`read` of all rows, comes soon."""

    def get(self) -> Tensor:
        """The tensor, which leaves."""


@dataclass(frozen=True)
class KeptOnDevice:
    """:class:`Kept` where the tensor stays where it is."""

    tensor: Tensor

    def settle(self) -> None:
        """Nothing to do."""

    def begin_read(self, rows: slice) -> KeptOnDevice:
        """A view."""
        return KeptOnDevice(self.tensor[:, rows])

    def fetch(self) -> None:
        """Nothing to do."""

    def get(self) -> Tensor:
        """The tensor itself."""
        return self.tensor


def read_ahead(wanted: Iterable[tuple[Readable, slice]]) -> Iterator[Tensor]:
    """``[:, rows]`` of each tensor, the next one on its way while the caller works with this one."""
    coming: deque[Reading] = deque()
    for kept, rows in wanted:
        coming.append(kept.begin_read(rows))
        if len(coming) > 1:
            yield coming.popleft().get()
    while coming:
        yield coming.popleft().get()


class Stash:
    """Attention output and log-sum-exp of each stage and query tile of one layer, in one forward pass.

    ``o [B, n, h, d]`` is kept in token layout (docs/design.md, "The stash"), ``lse [B, h, Sq]`` as the heads' rank has
    it, so that running the block a second time needs neither attention nor an exchange. The stash only holds, other
    tensors as well; who fills it and when is its owner's business.

    Args:
        put_away: where tensors go; by default they stay on the device.

    Attributes:
        complete: set by its owner once all stages are here.
        put_away: see above.
    """

    def __init__(self, put_away: PutAway = KeptOnDevice) -> None:
        self.complete = False
        self.put_away = put_away
        self._kept: dict[Place, tuple[Kept, ...]] = {}
        self._newest: tuple[Kept, ...] = ()

    def put(self, place: Place, *tensors: Tensor) -> None:
        """Keep ``tensors``. What was put before has had the time of a stage to leave the device."""
        self.settle()
        self._kept[place] = self._newest = tuple(self.put_away(tensor) for tensor in tensors)

    def settle(self) -> None:
        """Nothing put here takes memory on the device any more, unless the device is where it is kept."""
        for kept in self._newest:
            kept.settle()
        self._newest = ()

    def outputs(self, wanted: Iterable[tuple[Place, slice]]) -> Iterator[Tensor]:
        """``o[:, rows]`` of each place, which stays here; see :func:`read_ahead`."""
        return read_ahead((self._kept[place][0], rows) for place, rows in wanted)

    def read(self, place: Place) -> tuple[Tensor, ...]:
        """What ``place`` keeps, which stays here."""
        return tuple(kept.begin_read(slice(None)).get() for kept in self._kept[place])

    def fetch(self, place: Place) -> None:
        """A hint that ``place`` is read or taken next."""
        for kept in self._kept.get(place, ()):
            kept.fetch()

    def take(self, place: Place) -> tuple[Tensor, ...] | None:
        """What was put at ``place``, which leaves the stash, or None."""
        kept = self._kept.pop(place, None)
        return None if kept is None else tuple(one.get() for one in kept)
