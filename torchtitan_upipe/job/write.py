"""Write a job file: sections, strings, numbers, booleans and lists of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def job_text(values: Mapping[str, Any]) -> str:
    """``values``, as ``tomllib`` reads them, as the text of a TOML file."""
    return "\n".join(_lines(values)) + "\n"


def command_line_fields(job_args: Sequence[str]) -> Iterator[str]:
    """The fields that a command line names, as ``section.field``."""
    for word in job_args:
        if word.startswith("--"):
            section, _, name = word[2:].partition("=")[0].replace("-", "_").rpartition(".")
            yield f"{section}.{name.removeprefix('no_')}"


def put(values: dict[str, Any], name: str, config: Any) -> None:
    """The value that ``config`` has at ``name`` to the same place of ``values``."""
    *sections, field = name.split(".")
    for section in sections:
        config, values = getattr(config, section), values.setdefault(section, {})
    values[field] = getattr(config, field)


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
