"""The registry of teaching ways: who teaches whom."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from kdcore.losses.registry import Registry

Form = Literal["step", "fits", "function"]
T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True)
class TeachingEntry:
    """One row: a step the trainer runs, a sequence of its fits, or a function that makes targets or models."""

    name: str
    target: Callable[..., Any]
    form: str
    needs: str
    reference: str

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.target) or "").split("\n", 1)[0]

    def describe(self) -> dict[str, Any]:
        """Return what a catalogue shows of it, as JSON would hold it."""
        module = self.target.__module__
        return {
            "name": self.name,
            "form": self.form,
            "summary": self.summary,
            "needs": self.needs,
            "reference": self.reference,
            "where": f"{module}.{self.target.__qualname__}",
        }


_WAYS: Registry[TeachingEntry] = Registry("teaching")


def teaching(name: str, form: Form, needs: str, reference: str) -> Callable[[T], T]:
    """Return a decorator that enters a way of teaching under ``name``.

    Raises:
        ValueError: the name is taken, or the form does not exist.
    """
    if form not in get_args(Form):
        raise ValueError(f"form: wanted one of {', '.join(get_args(Form))}, got {form!r}")

    def enter(target: T) -> T:
        _WAYS.add(name, TeachingEntry(name, target, form, needs, reference))
        return target

    return enter


def teaching_entry(name: str) -> TeachingEntry:
    """Return the way called ``name``; raise ValueError with the nearest three if there is none."""
    return _WAYS[name]


def teaching_entries() -> tuple[TeachingEntry, ...]:
    """Return all ways in the order of registration."""
    return tuple(_WAYS)
