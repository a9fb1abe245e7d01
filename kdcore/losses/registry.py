"""The registry of losses, and the catalogue made from it.

A row also says how the contract suite calls the loss and which laws the loss claims, so that registering a loss is
what puts it under test.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

Law = Literal[
    "zero_at_equality",  # student == teacher gives 0
    "stationary_at_equality",  # student == teacher gives a zero gradient
    "nonnegative",
    "student_shift",  # a constant a row added to all student inputs changes nothing
    "teacher_shift",  # a constant a row added to all teacher inputs changes nothing
    "student_scale",  # one positive factor on ``student`` changes nothing
    "translation",  # one vector added to all rows of ``student`` changes nothing
    "rotation",  # an orthogonal matrix on the last axis of ``student`` changes nothing
    "symmetric",  # student and teacher may be swapped
    "permutation",  # permuting the last axis of all inputs together changes nothing
    "element_mask",  # takes a mask [B, K] of elements, with the shape of the first input
    "chunked",  # takes chunk_size
    "padding",  # what stands beyond ``lengths`` (and ``teacher_lengths``) in axis 1 changes nothing
]
Family = Literal["response", "feature", "relation", "structure", "ranking", "sequence", "trees"]
Examples = Callable[[int, torch.Generator], dict[str, Tensor]]
AtEquality = Callable[[dict[str, Tensor], Mapping[str, Any]], dict[str, Tensor]]
Row = TypeVar("Row")
F = TypeVar("F", bound=Callable[..., Any])


class Registry(Generic[Row]):
    """Rows by name: a name is given once, and a misspelt one is answered with the nearest."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._rows: dict[str, Row] = {}

    def add(self, name: str, row: Row) -> None:
        """Enter a row; raise ValueError if the name is taken."""
        if name in self._rows:
            raise ValueError(f"name: the {self.what} {name!r} is registered already")
        self._rows[name] = row

    def __getitem__(self, name: str) -> Row:
        """Return the row called ``name``; raise ValueError with the three nearest names if there is none."""
        if name not in self._rows:
            near = difflib.get_close_matches(name, self._rows, n=3, cutoff=0.0)
            raise ValueError(f"{self.what}: got the unknown name {name!r}; the nearest are {', '.join(near)}")
        return self._rows[name]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())


def _student_is_teacher(inputs: dict[str, Tensor], options: Mapping[str, Any]) -> dict[str, Tensor]:
    return {**inputs, "student": inputs["teacher"].clone()}


@dataclass(frozen=True)
class LossEntry:
    """One row of the registry.

    ``examples(B, generator)`` builds inputs by argument name, first axis B, floating ones float64. The arguments
    named in ``teacher`` get no gradient; the other floating ones do. Those in ``fixed`` (weights, probabilities) are
    not scaled when the suite makes logits large. ``batchwise`` says that the loss of a row depends on the other rows.
    ``variants`` are the sets of options under which every law holds. ``at_equality(inputs, options)`` makes the
    student equal to the teacher. ``build`` returns the callable to test: the function itself, or an instance of the
    class.
    """

    name: str
    function: Callable[..., Any]
    family: str
    reference: str
    examples: Examples
    teacher: tuple[str, ...]
    fixed: tuple[str, ...]
    batchwise: bool
    laws: frozenset[str]
    variants: tuple[Mapping[str, Any], ...]
    at_equality: AtEquality
    build: Callable[[], Callable[..., Tensor]]

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    @property
    def form(self) -> str:
        """``function``, or ``module`` where the loss has parameters or a memory of its own."""
        return "module" if inspect.isclass(self.function) and issubclass(self.function, nn.Module) else "function"

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of the tensors the loss is given, in order."""
        return tuple(self.examples(2, torch.Generator().manual_seed(0)))

    def describe(self) -> dict[str, Any]:
        """Return what a catalogue shows of the loss, as JSON would hold it."""
        return {
            "name": self.name,
            "family": self.family,
            "form": self.form,
            "summary": self.summary,
            "needs": list(self.needs),
            "batchwise": self.batchwise,
            "zero_at_equality": "zero_at_equality" in self.laws,
            "reference": self.reference,
        }


_LOSSES: Registry[LossEntry] = Registry("loss")


def register(
    name: str,
    family: Family,
    reference: str,
    *,
    examples: Examples,
    teacher: tuple[str, ...] = ("teacher",),
    fixed: tuple[str, ...] = (),
    batchwise: bool = False,
    laws: tuple[Law, ...] = (),
    variants: tuple[Mapping[str, Any], ...] = ({},),
    at_equality: AtEquality = _student_is_teacher,
    build: Callable[[], Callable[..., Tensor]] | None = None,
) -> Callable[[F], F]:
    """Return a decorator that enters a loss under ``name``; see LossEntry for the options.

    Raises:
        ValueError: the name is taken, or a family or law does not exist.
    """

    def enter(function: F) -> F:
        for argument, given, known in (("laws", set(laws), get_args(Law)), ("family", {family}, get_args(Family))):
            if unknown := given - set(known):
                raise ValueError(f"{argument}: wanted some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
        row = LossEntry(
            name=name,
            function=function,
            family=family,
            reference=reference,
            examples=examples,
            teacher=teacher,
            fixed=fixed,
            batchwise=batchwise,
            laws=frozenset(laws),
            variants=variants,
            at_equality=at_equality,
            build=build or (lambda: function),
        )
        _LOSSES.add(name, row)
        return function

    return enter


def entry(name: str) -> LossEntry:
    """Return the row of the loss called ``name``.

    Raises:
        ValueError: there is none; the message names the nearest three.
    """
    return _LOSSES[name]


def get(name: str) -> Callable[..., Any]:
    """Return the loss called ``name``: a function, or a class where the loss has parameters.

    Raises:
        ValueError: there is none; the message names the nearest three.
    """
    return entry(name).function


def entries(family: str | None = None) -> tuple[LossEntry, ...]:
    """Return all rows, or those of one family, in the order of registration."""
    return tuple(e for e in _LOSSES if family in (None, e.family))


def catalogue() -> str:
    """Return the catalogue of all registered losses as Markdown."""
    lines = [
        "# Losses",
        "",
        "Generated from the registry by `python -m kdcore.losses > docs/losses.md`.",
        "What all of them share: keyword-only options, `mask`, `reduction` none, mean or sum over the valid rows, a",
        "teacher without gradient, float32 inside.",
    ]
    for family in get_args(Family):
        lines += [
            "",
            f"## {family.capitalize()}",
            "",
            "| loss | what it computes | needs | 0 at equality | reference |",
        ]
        lines += ["|---|---|---|---|---|"]
        for row in entries(family):
            zero = "yes" if "zero_at_equality" in row.laws else "no"
            summary = row.summary.replace("|", "\\|")
            needs = ", ".join(row.needs)
            lines.append(f"| `{row.function.__name__}` | {summary} | {needs} | {zero} | {row.reference} |")
    return "\n".join(lines) + "\n"
