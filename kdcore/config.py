"""Typed configuration: frozen dataclasses from YAML and command-line overrides, and the error a user's mistake raises.

Types are checked by jsonargparse; unknown keys are errors. No value in a file can name code to import or run.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

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
    # here, since a recogniser on a device reads no YAML and does not have the package
    from yaml import YAMLError

    from kdcore.yaml_text import load

    file = Path(path)
    try:
        value = load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or _one_line(error)
        raise UserError(f"{file}{where}: {problem}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: wanted a mapping of settings, got {type(value).__name__}")
    return value


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return ``values`` with ``("a.b", "text")`` overrides set; texts are read as YAML (``1e-3`` is a number).

    A number names a place of a list that is there: ``views.0.student``.

    Raises:
        UserError: a list has no such place.
    """
    result: dict[str, Any] = _copy(values)
    for path, text in overrides:
        *parents, last = path.split(".")
        target: Any = result
        for name in parents:
            place = _place(target, name, path)
            known = target[place] if isinstance(target, list) else target.get(name)
            if not isinstance(known, dict | list):
                known = target[place] = {}
            target = known
        target[_place(target, last, path)] = parse_value(text)
    return result


def _place(target: dict[str, Any] | list[Any], name: str, path: str) -> Any:
    """Return the key or the index that a name of an override stands for."""
    if isinstance(target, dict):
        return name
    if not name.isdecimal() or len(name) > 9 or int(name) >= len(target):
        raise UserError(f"--{path}: got {name!r}, wanted a place of the list, 0 to {len(target) - 1}")
    return int(name)


def parse_value(text: str) -> Any:
    """Return a command-line text as a configuration file would read it; what is no YAML is the text itself."""
    from yaml import YAMLError

    from kdcore.yaml_text import load

    try:
        return load(text)
    except YAMLError:
        return text


def dump_yaml(value: Mapping[str, Any]) -> str:
    """Return a mapping as YAML that ``read_yaml`` reads back as it was."""
    from kdcore.yaml_text import dump

    return dump(dict(value))


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

    plain = _checked(cls, values, source)  # a copy: jsonargparse writes into nested values
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, None)
    try:
        namespace = parser.parse_object(plain)
        return cls(**vars(parser.instantiate(namespace)))
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        said = None if isinstance(error, jsonargparse.ArgumentError) else _of_part(cls, _checked(cls, values, source))
        raise UserError(f"{source}: {said or _one_line(error)}") from None


def _of_part(cls: Any, plain: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a dataclass that ``cls`` has in it, and which it is: it does not know that itself."""
    hints = get_type_hints(cls)
    for name, value in plain.items():
        args = get_args(hints[name])
        parts: list[tuple[str, Any, Any]] = [(name, hints[name], value)]
        if get_origin(hints[name]) is list and isinstance(value, list):
            parts = [(f"{name}.{number}", args[0], each) for number, each in enumerate(value)]
        elif get_origin(hints[name]) is dict and isinstance(value, dict):
            parts = [(f"{name}.{key}", args[1], each) for key, each in value.items()]
        for where, kind, each in parts:
            if not (isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(each, Mapping)):
                continue
            try:
                build(kind, each, "")
            except UserError as error:
                said = str(error).removeprefix(": ")
                # some name themselves
                return said if said.startswith((f"{where}.", f"{where}:")) else f"{where}: {said}"
    return None


def _checked(expected: Any, value: Any, source: str, path: str = "") -> Any:
    """Return a copy of ``value``; refuse a name that a dataclass, at any depth, does not have, and say which come near.

    This is also what keeps code out of configurations: jsonargparse would import what a ``class_path`` names, and read
    the file that a text in a dataclass's place names.
    """
    inner, where = get_args(expected), path.rstrip(".")
    if dataclasses.is_dataclass(expected):
        if not isinstance(value, Mapping):
            raise UserError(f"{source}: '{where}': wanted settings (name: value), got {value!r}")
        hints = get_type_hints(expected)
        known = {field.name: hints[field.name] for field in dataclasses.fields(expected)}
        for name in value:
            if name not in known:
                raise UserError(f"{source}: unknown setting '{path}{name}', {nearest(str(name), known)}")
        if path and not value and isinstance(expected, type) and not _required(expected):
            return dataclasses.asdict(expected())  # jsonargparse takes {} in a list for no dataclass at all
        return {name: _checked(known[name], each, source, f"{path}{name}.") for name, each in value.items()}
    if get_origin(expected) is list:
        if not isinstance(value, list | tuple):
            raise UserError(f"{source}: '{where}': wanted a list, got {value!r}")
        return [_checked(inner[0], each, source, f"{path}{number}.") for number, each in enumerate(value)]
    if get_origin(expected) is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{source}: '{where}': wanted settings (name: value), got {value!r}")
        for name in value:
            _check_plain(name, source, where)
        return {name: _checked(inner[1], each, source, f"{path}{name}.") for name, each in value.items()}
    if value is None and expected is not Any and not {None, type(None)} & {expected, *inner}:
        raise UserError(f"{source}: '{where}': got nothing, wanted a value")
    _check_plain(value, source, where)
    return _copy(value)


def _required(cls: type) -> bool:
    """Return whether a dataclass has a field without a default."""
    missing = dataclasses.MISSING
    return any(each.default is missing and each.default_factory is missing for each in dataclasses.fields(cls))


def _check_plain(value: Any, source: str, path: str) -> None:
    """Refuse what jsonargparse would import wherever anything goes, also inside text, which it reads as YAML."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            _check_plain(name, source, path)
            _check_plain(each, source, f"{path}.{name}")
    elif isinstance(value, list | tuple):
        for each in value:
            _check_plain(each, source, path)
    elif isinstance(value, str) and "class_path" in value:
        raise UserError(f"{source}: '{path}': got {value!r}; a configuration cannot name code")


_WORDS = {
    **{"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list"},
    **{"NoneType": "null", "dict": "settings (name: value)"},
}


def _one_line(error: Exception) -> str:
    """Return what is wrong in a line; types are told in words, not as jsonargparse shows them."""
    text = " ".join(str(getattr(error, "message", None) or error).split())
    keys = re.findall(r'Parser key "([^"]+)":', text)
    value = re.search(r"Given value: (.*)", text) or re.search(r"Got value: (.*)", text)
    kinds = [_WORDS[kind] for kind in re.findall(r"Expected a <class '(\w+)'>", text) if kind in _WORDS]
    choices = re.findall(r"Expected a typing\.Literal\[(.*?)\]", text)
    kinds += [f"one of {choice.replace(chr(39), '')}" for choice in choices]
    if not keys or value is None or not kinds:
        return text
    # of a list it is not said which
    return f"{', '.join(keys)}: got {value[1]}, wanted {' or '.join(dict.fromkeys(kinds))}"


def resolved(config: Any) -> dict[str, Any]:
    """Return a dataclass as plain mappings, for ``config.yaml``."""
    return dataclasses.asdict(config)


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Return the dotted names at which two nested settings differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            name
            for key in {**a, **b}
            for name in differences(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [] if a == b else [path]
