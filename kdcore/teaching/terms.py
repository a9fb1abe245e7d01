"""A weighted sum of named loss terms: what each is given, how its weight moves, what is logged."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdcore.losses import get
from kdcore.teaching.schedules import Schedule


@dataclass(frozen=True)
class Term:
    """One loss in the sum.

    ``loss`` is a function, a module, or the name of a loss without parameters. ``inputs`` names, for each of its
    tensors, the value it is given: ``{"student": "student.middle"}``; a tensor left out is given the value of its own
    name. ``weight`` is a number or a Schedule.
    """

    name: str
    loss: Callable[..., Tensor] | str
    inputs: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    weight: float | Schedule = 1.0

    def resolved(self) -> Callable[..., Tensor]:
        """Return the loss itself; raise ValueError if it is a name of a class, which has to be built by the user."""
        if not isinstance(self.loss, str):
            return self.loss
        loss = get(self.loss)
        if inspect.isclass(loss):
            raise ValueError(f"{self.name}: {self.loss!r} has parameters of its own; give an instance of it")
        return loss

    @property
    def schedule(self) -> Schedule:
        """The weight as a schedule."""
        return self.weight if isinstance(self.weight, Schedule) else Schedule(float(self.weight))


class Terms(nn.Module):
    """Terms evaluated on named values; losses with parameters or memory are submodules, so they are trained and saved.

    The weights of the epoch are a buffer: a run resumed inside an epoch goes on with them.

    Raises:
        ValueError: no term, a name twice, or a loss that is given no tensor.
    """

    weight_values: Tensor

    def __init__(self, terms: Sequence[Term]) -> None:
        super().__init__()
        names = [term.name for term in terms]
        if not terms or len(set(names)) != len(names):
            raise ValueError(f"terms: wanted at least one, each with a name of its own, got {names}")
        self.terms = tuple(terms)
        self.losses = {term.name: term.resolved() for term in terms}
        self.modules_of_terms = nn.ModuleDict(
            {name: loss for name, loss in self.losses.items() if isinstance(loss, nn.Module)}
        )
        self.arguments = {term.name: _arguments(term, self.losses[term.name]) for term in terms}
        self.register_buffer("weight_values", torch.zeros(len(terms), dtype=torch.float64))
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        """Set the weights of an epoch."""
        self.weight_values.copy_(torch.tensor([term.schedule.at(epoch) for term in self.terms]))

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the epoch by name."""
        return dict(zip(self.losses, self.weight_values.tolist(), strict=True))

    def forward(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the *sum* over rows of every term; a term of weight 0 is not computed, it is 0.

        Raises:
            ValueError: a value a term needs is missing, or a loss refuses what it is given; the term is named.
        """
        weights = self.weights
        return {term.name: self._value(term, values, weights[term.name]) for term in self.terms}

    def _value(self, term: Term, values: Mapping[str, Tensor], weight: float) -> Tensor:
        loss = self.losses[term.name]
        if weight == 0:
            zero = self.weight_values.new_zeros((), dtype=torch.float32)
            # its parameters stay in the graph: processes that share gradients expect one of each
            parameters = list(loss.parameters()) if isinstance(loss, nn.Module) else []
            return sum((p.sum() * 0 for p in parameters), zero)
        given = {argument: _pick(values, key, term.name) for argument, key in self.arguments[term.name].items()}
        try:
            value = loss(**given, **term.options, reduction="sum")
        except (ValueError, TypeError) as error:
            raise type(error)(f"{term.name}: {error}") from error
        if self.training and callable(update := getattr(loss, "update", None)):
            wanted = inspect.signature(update).parameters
            update(**{argument: tensor.detach() for argument, tensor in given.items() if argument in wanted})
        return value

    def counts(self, batch: Mapping[str, Tensor], rows: int) -> dict[str, int]:
        """Return how many rows each term sums over: all ``rows``, or those its mask leaves."""
        counts = {}
        for name, arguments in self.arguments.items():
            mask = batch.get(arguments["mask"]) if "mask" in arguments else None
            counts[name] = rows if mask is None else int(mask.reshape(len(mask), -1).any(1).sum())
        return counts


def _arguments(term: Term, loss: Callable[..., Tensor]) -> dict[str, str]:
    """Return the key of the value that each tensor of a loss is given."""
    function = loss.forward if isinstance(loss, nn.Module) else loss
    parameters = inspect.signature(function).parameters
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind is not inspect.Parameter.VAR_KEYWORD
        and name not in term.options
    ]
    if unknown := set(term.inputs) - set(parameters):
        raise ValueError(
            f"{term.name}: the loss takes no {', '.join(sorted(unknown))}; it takes {', '.join(parameters)}"
        )
    if not required and not term.inputs:
        raise ValueError(f"{term.name}: the loss is given no tensor")
    return {**{name: name for name in required}, **term.inputs}


def _pick(values: Mapping[str, Tensor], key: str, term: str) -> Tensor:
    if key not in values:
        raise ValueError(f"{term}: wants the value {key!r}, got {', '.join(sorted(values))}")
    return values[key]
