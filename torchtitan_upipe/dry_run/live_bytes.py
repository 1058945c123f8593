"""Live tensor bytes by device and category, by watching every operator's outputs."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Observer(Protocol):
    """Names what is going on, for :class:`LiveBytes`."""

    def category(self, func: Any, result: torch.Tensor) -> str:
        """What the new storage of ``result``, made by the operator ``func``, is for."""

    def moment(self) -> str:
        """What is running now."""


class Unobserved:
    """One category, no moments: where only the sum matters."""

    def category(self, func: Any, result: torch.Tensor) -> str:
        """See :class:`Observer`."""
        return "all"

    def moment(self) -> str:
        """See :class:`Observer`."""
        return ""


@dataclass
class Usage:
    """Bytes on one kind of device: now, by category, at the peak, and the most at each moment."""

    live: int = 0
    categories: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)
    moment: str = ""
    moments: dict[str, int] = field(default_factory=dict)


@dataclass
class _Entry:
    device: str
    category: str
    size: int


class LiveBytes(TorchDispatchMode):
    """Counts storages made while it is active, each until it is freed.

    It looks into DTensors and follows ``UntypedStorage.resize_``, which is how FSDP2 frees what it has gathered. Under
    ``FakeTensorMode`` (entered before) it counts what would have been allocated.

    Args:
        observer: asked for the category of each new storage, and for the name of the moment at each new peak.

    Attributes:
        usage: by device type (``"cpu"``, ``"cuda"``, ...).
    """

    def __init__(self, observer: Observer | None = None) -> None:
        super().__init__()
        self.observer = observer or Unobserved()
        self.usage: defaultdict[str, Usage] = defaultdict(Usage)
        self._entries: dict[int, _Entry] = {}  # in the order of allocation
        self._ignored: set[int] = set()
        self._resize: Any = None

    @property
    def live(self) -> int:
        """Bytes on all devices now."""
        return sum(usage.live for usage in self.usage.values())

    @property
    def peak(self) -> int:
        """Sum of the devices' peaks, in bytes."""
        return sum(usage.peak for usage in self.usage.values())

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Do not count the storages of these tensors."""
        self._ignored |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def adopt(self, tensor: torch.Tensor) -> None:
        """Count the storage of ``tensor``, which was there before."""
        self._watch(None, tensor)

    def restart(self) -> None:
        """Forget the peaks so far."""
        for usage in self.usage.values():
            usage.peak, usage.moments = 0, {}
            self._note_peak(usage)

    def retag(self, category: str, *tensors: torch.Tensor) -> None:
        """Count the storages of ``tensors`` under ``category`` from now on."""
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            entry = self._entries.get(local.untyped_storage()._cdata)
            if entry is not None:
                self._move(entry, category)

    def retag_since(self, known: set[int], old: str, new: str) -> None:
        """Count under ``new`` what was counted under ``old`` and is not among ``known`` (see :meth:`keys`)."""
        for key, entry in self._entries.items():
            if entry.category == old and key not in known:
                self._move(entry, new)

    def keys(self) -> set[int]:
        """Identities of the storages that live now."""
        return set(self._entries)

    def __enter__(self) -> LiveBytes:
        resize = self._resize = torch.UntypedStorage.resize_

        def watched_resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            entry = self._entries.get(storage._cdata)
            if entry is not None:
                self._change(entry, storage.nbytes() - entry.size)
            return result

        torch.UntypedStorage.resize_ = watched_resize  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count the storages of what it returns."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor runs first; what it does to its local tensors comes back here
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self._watch(func, value)
        return result

    def _watch(self, func: Any, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        entry = self._entries.get(key)
        if entry is not None:
            if storage.nbytes() != entry.size:  # an operator that resizes
                self._change(entry, storage.nbytes() - entry.size)
            return
        if key in self._ignored or tensor.device.type == "meta":
            return
        entry = _Entry(tensor.device.type, self.observer.category(func, tensor), 0)
        self._entries[key] = entry
        self._change(entry, storage.nbytes())
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        entry = self._entries.pop(key)
        self._change(entry, -entry.size)

    def _change(self, entry: _Entry, size: int) -> None:
        usage = self.usage[entry.device]
        entry.size += size
        usage.live += size
        usage.categories[entry.category] += size
        if size > 0:
            self._note_peak(usage)

    def _note_peak(self, usage: Usage) -> None:
        moment = self.observer.moment()
        usage.moments[moment] = max(usage.moments.get(moment, 0), usage.live)
        if usage.live > usage.peak:
            usage.peak, usage.at_peak = usage.live, {k: v for k, v in usage.categories.items() if v}
            usage.moment = moment

    def _move(self, entry: _Entry, category: str) -> None:
        self.usage[entry.device].categories[entry.category] -= entry.size
        self.usage[entry.device].categories[category] += entry.size
        entry.category = category
