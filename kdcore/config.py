"""Typed configuration: frozen dataclasses from YAML and command-line overrides, and the error a user's mistake raises.

Types are checked by jsonargparse; unknown keys are errors. No value in a file can name code to import or run.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")


class UserError(ValueError):
    """A mistake in what the user gave: a file, a row, an option. Its message is one line and says where."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: the nearest known ones, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"wanted one of {', '.join(known)}"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; a missing file or anything but a mapping is a UserError with the line."""
    file = Path(path)
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not UTF-8 text"
        raise UserError(f"{file}{where}: {problem}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: wanted a mapping of settings, got {type(value).__name__}")
    return value


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return ``values`` with ``("a.b", "text")`` overrides set; texts are read as YAML (``1e-3`` is a number)."""
    result = _copy(values)
    for path, text in overrides:
        *parents, last = path.split(".")
        target = result
        for name in parents:
            if not isinstance(target.get(name), dict):
                target[name] = {}
            target = target[name]
        target[last] = parse_value(text)
    return result


def parse_value(text: str) -> Any:
    """Return a command-line text as YAML reads it, with ``1e-3`` a number (YAML 1.1 wants a dot)."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def build(cls: type[T], values: Mapping[str, Any], source: str = "configuration") -> T:
    """Return the dataclass ``cls`` from plain values, nested ones included; types are checked.

    Raises:
        UserError: an unknown key, a value of the wrong type or out of range; the message names the key.
    """
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, None)
    try:
        namespace = parser.parse_object(_copy(values))  # a copy: jsonargparse writes into nested values
        return cls(**vars(parser.instantiate(namespace)))
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise UserError(f"{source}: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    text = getattr(error, "message", None) or str(error)
    return " ".join(str(text).split())


def resolved(config: Any) -> dict[str, Any]:
    """Return a dataclass as plain mappings, for ``config.yaml``."""
    return dataclasses.asdict(config)
