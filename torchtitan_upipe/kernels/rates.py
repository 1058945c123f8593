"""How fast attention kernels run on which device: the table ``assets/kernel_rates.json``, by which ``"auto"`` chooses.

Each entry names one device and one source; rates of different sources are never compared. ``python -m benchmarks.gpu``
measures an entry and writes it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).parent.parent / "assets" / "kernel_rates.json"
BACKWARD = 2.5  # FLOPs of a backward pass over those of a forward pass


@dataclass(frozen=True)
class Rate:
    """TFLOP/s of one kernel, counting the visible half of a causal square."""

    forward: float
    backward: float

    @property
    def seconds(self) -> float:
        """Of one forward and one backward pass, per TFLOP of the forward pass."""
        return 1 / self.forward + BACKWARD / self.backward


@dataclass(frozen=True)
class RatesOfDevice:
    """What one source says of one device.

    Attributes:
        device: its name, as ``torch.cuda.get_device_name`` gives it.
        capability: its compute capability, ``(9, 0)``.
        source: ``"measured: ..."`` or ``"published: ..."``, and where.
        tokens: of the sequence that was timed.
        head_dim: width of a head that was timed.
        rates: by kernel name.
    """

    device: str
    capability: tuple[int, int]
    source: str
    tokens: int
    head_dim: int
    rates: Mapping[str, Rate]

    def fastest(self, default: str, candidates: Collection[str]) -> str:
        """The fastest of ``candidates``; ``default`` where its own rate is not known, so that nothing is compared."""
        if default not in self.rates:
            return default
        known = [name for name in self.rates if name in candidates or name == default]
        return min(known, key=lambda name: self.rates[name].seconds)


def read_rates(path: Path = TABLE) -> list[RatesOfDevice]:
    """The entries of the table."""
    return [
        RatesOfDevice(
            **{**entry, "capability": tuple(entry["capability"])},
            rates={name: Rate(**rate) for name, rate in rates.items()},
        )
        for entry in json.loads(path.read_text())
        for rates in [entry.pop("rates")]
    ]


def rates_of(device: str, capability: tuple[int, int], table: Sequence[RatesOfDevice]) -> RatesOfDevice | None:
    """The entry of this device, else of another with the same compute capability, else None."""
    same = [entry for entry in table if entry.device == device]
    alike = [entry for entry in table if entry.capability == capability]
    return next(iter([*same, *alike]), None)


def write_rates(entry: RatesOfDevice, path: Path = TABLE) -> None:
    """Put ``entry`` into the table, in the place of what it says of the same device."""
    others = [other for other in read_rates(path) if other.device != entry.device] if path.exists() else []
    path.write_text(json.dumps([_plain(e) for e in [entry, *others]], indent=2) + "\n")


def _plain(entry: RatesOfDevice) -> dict[str, object]:
    rates = {name: vars(rate) for name, rate in entry.rates.items()}
    return {**vars(entry), "capability": list(entry.capability), "rates": rates}
