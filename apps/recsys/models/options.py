"""Typed options from plain mappings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from kdcore.config import UserError, nearest


def at_least(options: Any, **lowest: float) -> None:
    """Raise ValueError, naming the option, if one is below its lowest value (or NaN)."""
    for name, low in lowest.items():
        if not getattr(options, name) >= low:
            raise ValueError(f"{name}: got {getattr(options, name)}, wanted at least {low}")


def above_zero(options: Any, *names: str) -> None:
    """Raise ValueError, naming the option, if one is not above zero."""
    for name in names:
        if not getattr(options, name) > 0:
            raise ValueError(f"{name}: got {getattr(options, name)}, wanted more than 0")


def build_options(what: str, options_type: type, options: Mapping[str, Any]) -> Any:
    """Return a frozen options dataclass from a mapping; an unknown key or a value of the wrong type is a UserError."""
    known = {field.name for field in fields(options_type)}
    hints = get_type_hints(options_type)
    values = {}
    for name, value in options.items():
        if name not in known:
            raise UserError(f"{what}: unknown option {name!r}, {nearest(name, known)}")
        wanted = hints[name]
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if isinstance(wanted, type) and type(value) is not wanted:
            raise UserError(f"{what}.{name}: got {value!r}, wanted {wanted.__name__}")
        values[name] = value
    try:
        return options_type(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what}: {error}") from None
