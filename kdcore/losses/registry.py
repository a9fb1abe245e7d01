"""The one registry of losses, and the catalogue made from it.

A row also says how the contract suite calls the loss and which laws the loss claims, so that registering a loss is
what puts it under test.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

Law = Literal[
    "zero_at_equality",  # student == teacher gives 0
    "stationary_at_equality",  # student == teacher gives a zero gradient
    "nonnegative",
    "student_shift",  # a constant a row added to all student inputs changes nothing
    "teacher_shift",  # a constant a row added to all teacher inputs changes nothing
    "symmetric",  # student and teacher may be swapped
    "permutation",  # permuting the last axis of all inputs together changes nothing
    "element_mask",  # takes a mask [B, K] of elements, with the shape of the first input
    "chunked",  # takes chunk_size
]
Examples = Callable[[int, torch.Generator], dict[str, Tensor]]
AtEquality = Callable[[dict[str, Tensor], Mapping[str, Any]], dict[str, Tensor]]
F = TypeVar("F", bound=Callable[..., Any])


def _student_is_teacher(inputs: dict[str, Tensor], options: Mapping[str, Any]) -> dict[str, Tensor]:
    return {**inputs, "student": inputs["teacher"].clone()}


@dataclass(frozen=True)
class LossEntry:
    """One row of the registry.

    ``examples(B, generator)`` builds inputs by argument name, first axis B, floating ones float64. The arguments
    named in ``teacher`` get no gradient; the other floating ones do. ``variants`` are the sets of options under
    which every law holds. ``at_equality(inputs, options)`` makes the student equal to the teacher. ``build`` returns
    the callable to test: the function itself, or an instance of the class.
    """

    name: str
    function: Callable[..., Any]
    family: str
    reference: str
    examples: Examples
    teacher: tuple[str, ...]
    laws: frozenset[str]
    variants: tuple[Mapping[str, Any], ...]
    at_equality: AtEquality
    build: Callable[[], Callable[..., Tensor]]

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]


_ENTRIES: dict[str, LossEntry] = {}


def register(
    name: str,
    family: str,
    reference: str,
    *,
    examples: Examples,
    teacher: tuple[str, ...] = ("teacher",),
    laws: tuple[Law, ...] = (),
    variants: tuple[Mapping[str, Any], ...] = ({},),
    at_equality: AtEquality = _student_is_teacher,
    build: Callable[[], Callable[..., Tensor]] | None = None,
) -> Callable[[F], F]:
    """Return a decorator that enters a loss under ``name``; see LossEntry for the options.

    Raises:
        ValueError: the name is taken, or a law does not exist.
    """

    def enter(function: F) -> F:
        if name in _ENTRIES:
            raise ValueError(f"name: the loss {name!r} is registered already, by {_ENTRIES[name].function.__module__}")
        unknown = set(laws) - set(get_args(Law))
        if unknown:
            raise ValueError(f"laws: wanted some of {', '.join(get_args(Law))}, got {', '.join(sorted(unknown))}")
        _ENTRIES[name] = LossEntry(
            name=name,
            function=function,
            family=family,
            reference=reference,
            examples=examples,
            teacher=teacher,
            laws=frozenset(laws),
            variants=variants,
            at_equality=at_equality,
            build=build or (lambda: function),
        )
        return function

    return enter


def entry(name: str) -> LossEntry:
    """Return the row of the loss called ``name``.

    Raises:
        ValueError: there is none; the message names the nearest ones.
    """
    if name not in _ENTRIES:
        near = difflib.get_close_matches(name, _ENTRIES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(_ENTRIES))}"
        raise ValueError(f"loss: got the unknown name {name!r}; {hint}")
    return _ENTRIES[name]


def get(name: str) -> Callable[..., Any]:
    """Return the loss called ``name``: a function, or a class where the loss has parameters.

    Raises:
        ValueError: there is none; the message names the nearest ones.
    """
    return entry(name).function


def entries(family: str | None = None) -> tuple[LossEntry, ...]:
    """Return all rows, or those of one family, in the order of registration."""
    return tuple(e for e in _ENTRIES.values() if family in (None, e.family))


def catalogue() -> str:
    """Return the catalogue of all registered losses as Markdown."""
    lines = [
        "# Losses",
        "",
        "Generated from the registry by `python -m kdcore.losses > docs/losses.md`.",
        "What all of them share: keyword-only options, `mask`, `reduction` none, mean or sum over the valid rows, a",
        "teacher without gradient, float32 inside.",
    ]
    for family in dict.fromkeys(e.family for e in _ENTRIES.values()):
        lines += ["", f"## {family.capitalize()}", "", "| loss | what it computes | 0 at equality | reference |"]
        lines += ["|---|---|---|---|"]
        for row in entries(family):
            zero = "yes" if "zero_at_equality" in row.laws else "no"
            summary = row.summary.replace("|", "\\|")
            lines.append(f"| `{row.function.__name__}` | {summary} | {zero} | {row.reference} |")
    return "\n".join(lines) + "\n"
