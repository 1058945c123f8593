"""How fast devices are: the table ``assets/devices.json``, or what was measured on one.

The table holds datasheets' peaks and published rates of attention kernels, with their sources. What a real step reaches
of them are three numbers, fitted on published steps (``docs/time.md``); measured rates are taken as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent.parent / "assets" / "devices.json"
UNKNOWN = "h100-80gb"  # whose rates stand in for a device that is not in the table
SUSTAINED = 0.8  # of a datasheet's bandwidths
CALL_SECONDS = 5e-6  # of a kernel call
ALIKE = {"sdpa": "flash2", "reference": "flash2"}  # kernels without rates of their own


@dataclass(frozen=True)
class Fit:
    """What a real step reaches, fitted on published steps: ``python -m benchmarks.times``.

    Attributes:
        attention: share of the published rates of attention kernels.
        products: share of the peak of matrix products.
        step_seconds: of a step, whatever its length.
    """

    attention: float = 1.0
    products: float = 1.0
    step_seconds: float = 0.0


FITTED = Fit(attention=1.074, products=0.484, step_seconds=0.577)


@dataclass(frozen=True)
class Rates:
    """Rates of one device, in FLOP/s and bytes/s.

    Attributes:
        name: of the device.
        memory: bytes of the device.
        products: of matrix products in bfloat16.
        device_memory: read and written.
        link: sent by a device to others of its host.
        network: sent by a device to other hosts.
        host: between host memory and device, one way.
        attention: forward and backward, by kernel.
        fit: what a step reaches of these.
        stand_in: the device whose rates these are, where the table has none of this one; else empty.
    """

    name: str
    memory: float
    products: float
    device_memory: float
    link: float
    network: float
    host: float
    attention: Mapping[str, tuple[float, float]]
    fit: Fit = FITTED
    stand_in: str = ""

    @property
    def known(self) -> bool:
        """Whether the table has the device."""
        return not self.stand_in

    def attention_rates(self, kernel: str) -> tuple[float, float]:
        """Forward and backward of ``kernel``; of the fastest where it is ``"auto"`` or has no rates."""
        name = kernel if kernel in self.attention else ALIKE.get(kernel, kernel)
        if name in self.attention:
            return self.attention[name]
        return max(self.attention.values())


@cache
def known_devices() -> tuple[str, ...]:
    """The names that ``--device`` takes."""
    return tuple(json.loads(TABLE.read_text()))


def rates_of(device: str) -> Rates:
    """The rates of a device of the table.

    Args:
        device: a name of :func:`known_devices`, or as CUDA spells it. The rates of another one, marked so, where the
            table has none.
    """
    table: dict[str, dict[str, Any]] = json.loads(TABLE.read_text())
    for name, entry in table.items():
        if device.lower() == name or any(part in device for part in entry["names"]):
            return _rates(name, entry)
    return replace(_rates(UNKNOWN, table[UNKNOWN]), name=device, stand_in=UNKNOWN)


def _rates(name: str, entry: dict[str, Any]) -> Rates:
    bandwidths = {key: SUSTAINED * entry[key] for key in ("device_memory", "link", "network", "host")}
    attention = {kernel: (forward, backward) for kernel, (forward, backward) in entry["attention"].items()}
    return Rates(name, entry["memory"], entry["products"], **bandwidths, attention=attention)


def measured_rates(path: Path, base: Rates) -> Rates:
    """``base`` with what the lines of ``python -m benchmarks.gpu`` say: attention, products, copies.

    Of each attention kernel the longest sequence counts, of products the fastest.

    Raises:
        ValueError: no such file, or nothing of that in it.
    """
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"--rates {path} cannot be read ({error}); name a file of `python -m benchmarks.gpu`."
        ) from error
    lines = [line for line in lines if isinstance(line, dict) and line.get("status", "ok") == "ok"]
    attention: dict[str, tuple[float, float]] = {}
    timed = [line for line in lines if "forward_tflops" in line]
    for line in sorted(timed, key=lambda line: line["tokens"]):
        attention[line["kernel"]] = 1e12 * line["forward_tflops"], 1e12 * line["backward_tflops"]
    products = [1e12 * line["tflops"] for line in lines if "tflops" in line]
    copies = {line["key"]: line["bytes_per_second"] for line in lines if "bytes_per_second" in line}
    if not timed and not products and not copies:
        raise ValueError(f"--rates {path} holds no rates; name a file of `python -m benchmarks.gpu`.")
    to_host = [rate for key, rate in copies.items() if "device to host" in key or "host to device" in key]
    within = [rate for key, rate in copies.items() if "within the device" in key]
    fit = replace(base.fit, attention=1.0 if timed else base.fit.attention)
    return replace(
        base,
        attention=attention or base.attention,
        products=max(products, default=base.products),
        host=min(to_host, default=base.host),
        device_memory=max(within, default=base.device_memory),
        fit=replace(fit, products=1.0 if products else fit.products),
    )
