"""Write a job file: sections, strings, numbers, booleans and lists of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def job_text(values: Mapping[str, Any]) -> str:
    """``values``, as ``tomllib`` reads them, as the text of a TOML file."""
    return "\n".join(_lines(values)) + "\n"


def _lines(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    if prefix:
        yield f"\n[{prefix}]"
    for name, value in values.items():
        if not isinstance(value, dict):
            yield f"{name} = {_literal(value)}"
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _lines(value, f"{prefix}.{name}" if prefix else name)


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    return repr(value)
