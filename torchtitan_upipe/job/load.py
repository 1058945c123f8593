"""Read a job: TOML file and command line, checked field by field before TorchTitan merges them."""

from __future__ import annotations

import contextlib
import difflib
import io
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import typeguard
from torchtitan.config import ConfigManager, JobConfig

JOB_CONFIG_MODULE = "torchtitan_upipe.job_config"
CONFIG_FILE = "job.config_file"


def load_config(args: Sequence[str]) -> JobConfig:
    """Read the job that ``args`` (the command line without the program) describe.

    Precedence is TorchTitan's: command line, then the TOML file of ``--job.config_file``, then defaults. The plugin's
    own sections are always known, also where the file does not name ``custom_config_module``.

    Raises:
        ValueError: a file that cannot be read, an unknown section or field, a value of the wrong type.
        SystemExit: with code 0 after ``--help``.
    """
    manager = ConfigManager()
    path = config_file(args)
    values = read_toml(path) if path else {}
    arguments = _one_config_file(args, path)
    if not any(_option_name(a) == "job.custom_config_module" for a in args):
        module = values.get("job", {}).get("custom_config_module") if isinstance(values.get("job"), dict) else None
        arguments += ["--job.custom_config_module", module if module and isinstance(module, str) else JOB_CONFIG_MODULE]
    config_class = _config_class(manager, arguments, values)
    if "context_parallel" not in {f.name for f in fields(config_class)}:
        raise ValueError(f'job.custom_config_module must be "{JOB_CONFIG_MODULE}" or extend it.')
    if path:
        _check_fields(config_class, values, path)
    _check_options(config_class, args)
    with _tyro_errors_as_value_errors():
        try:
            return manager.parse_args(arguments)
        except AssertionError as error:  # TorchTitan's sections check some of their fields as they are made
            raise ValueError(f"the job file or the command line: {error}.") from error


def config_file(args: Sequence[str]) -> str | None:
    """The path after the last ``--job.config_file``, if it is there.

    Raises:
        ValueError: no path follows.
    """
    path = None
    for i, arg in enumerate(args):
        if _option_name(arg) == CONFIG_FILE:
            if "=" not in arg and i + 1 == len(args):
                raise ValueError("--job.config_file needs a path.")
            path = arg.split("=", 1)[1] if "=" in arg else args[i + 1]
            if not path:
                raise ValueError("--job.config_file needs a path.")
    return path


def split_options(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command's own options and the job's, which have a section in their names: ``--section.field``."""
    own: list[str] = []
    job: list[str] = []
    target = own
    for arg in args:
        if arg.startswith("--"):
            target = job if "." in arg.split("=", 1)[0] else own
        target.append(arg)
    return own, job


def _one_config_file(args: Sequence[str], path: str | None) -> list[str]:
    """``args`` with no other ``--job.config_file`` than ``path``: TorchTitan would read the first one."""
    others, skip = [], False
    for arg in args:
        named = _option_name(arg) == CONFIG_FILE
        if not (named or skip):
            others.append(arg)
        skip = named and "=" not in arg
    return others if path is None else [*others, f"--{CONFIG_FILE}", path]


def _config_class(manager: ConfigManager, args: list[str], values: dict[str, Any]) -> type[JobConfig]:
    try:
        return manager._maybe_add_custom_config(args, values)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"job.custom_config_module cannot be used ({error}); it names a module that can be imported and has a "
            f'class JobConfig, e.g. "{JOB_CONFIG_MODULE}".'
        ) from error


def _option_name(arg: str) -> str | None:
    return arg.removeprefix("--").split("=", 1)[0].replace("-", "_") if arg.startswith("--") else None


def read_toml(path: str) -> dict[str, Any]:
    """The tables of a file.

    Raises:
        ValueError: it cannot be read, or is no TOML.
    """
    try:
        with Path(path).open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ValueError(f"cannot read the job file {path!r}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the job file {path!r} is not valid TOML: {error}.") from error


def _check_fields(section: type, values: Mapping[str, Any], path: str, prefix: str = "") -> None:
    known = typing.get_type_hints(section)
    for name, value in values.items():
        full_name = prefix + name
        if name not in known:
            raise ValueError(f"{path}: {_unknown_field(full_name, [prefix + k for k in known])}")
        expected = known[name]
        if is_dataclass(expected):
            if not isinstance(value, dict):
                raise ValueError(f"{path}: {full_name} is a section and cannot be set to {value!r}.")
            _check_fields(expected, value, path, f"{full_name}.")  # type: ignore[arg-type]
        elif not _fits(value, expected):
            raise ValueError(f"{path}: {full_name} = {value!r} is not {_describe(expected)}.")


def _check_options(config_class: type, args: Sequence[str]) -> None:
    known = list(_field_names(config_class))
    for arg in args:
        name = _option_name(arg)
        if name is None or "." not in name:
            continue
        section, _, last = name.rpartition(".")
        spellings = {name, f"{section}.{last.removeprefix('no_')}"}  # tyro's --section.no-flag
        if not spellings & set(known):
            raise ValueError(f"command line: {_unknown_field(name, known)}")


def _field_names(section: type, prefix: str = "") -> Iterator[str]:
    for name, kind in typing.get_type_hints(section).items():
        if is_dataclass(kind):
            yield from _field_names(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield prefix + name


def _unknown_field(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"unknown field {name}" + (f"; the nearest known one is {near[0]}." if near else ".")


def _fits(value: object, expected: object) -> bool:
    if isinstance(value, bool) and expected is not bool and bool not in typing.get_args(expected):
        return False  # Python counts true among the integers; a job file should not
    try:
        typeguard.check_type(value, expected)
    except typeguard.TypeCheckError:
        return False
    return True


def _describe(expected: Any) -> str:
    if typing.get_origin(expected) is typing.Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(expected))
    return f"of type {getattr(expected, '__name__', None) or expected}" if isinstance(expected, type) else str(expected)


@contextlib.contextmanager
def _tyro_errors_as_value_errors() -> Iterator[None]:
    """tyro prints its complaint and exits with code 2; turn that into one sentence for one report."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            yield
    except SystemExit as error:
        if error.code in (None, 0):
            raise
        lines = [line.strip("│╭╮╰╯─ ") for line in complaint.getvalue().splitlines()]
        raise ValueError("command line: " + " ".join(line for line in lines if line)) from None
