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

    The epoch is a buffer: a run resumed inside it goes on with its weights. A loss with a method ``update`` (a memory)
    is told the valid rows of every batch it was trained on; ``inputs`` may name what else that method takes.

    Raises:
        ValueError: no term, a name twice or with a dot, or a loss that is given no tensor.
    """

    epoch: Tensor

    def __init__(self, terms: Sequence[Term]) -> None:
        super().__init__()
        names = [term.name for term in terms]
        if not terms or len(set(names)) != len(names) or any("." in name for name in names):
            raise ValueError(f"terms: wanted at least one, each with a name of its own and no dot, got {names}")
        self.terms = tuple(terms)
        self.losses = {term.name: term.resolved() for term in terms}
        self.schedules = {term.name: term.schedule for term in terms}
        self.modules_of_terms = nn.ModuleDict(
            {name: loss for name, loss in self.losses.items() if isinstance(loss, nn.Module)}
        )
        self.arguments = {term.name: _arguments(term, self.losses[term.name]) for term in terms}
        self.updates = {term.name: _update_arguments(term, self.losses[term.name]) for term in terms}
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))
        # the weights, and the buffer they were read from: to read it costs a wait for the device
        self._read: tuple[tuple[int, int], dict[str, float]] = ((0, -1), {})

    def begin_epoch(self, epoch: int) -> None:
        """Set the weights of an epoch."""
        self.epoch.fill_(epoch)

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the epoch by name."""
        seen = (id(self.epoch), self.epoch._version)
        if self._read[0] != seen:
            epoch = int(self.epoch)
            self._read = (seen, {name: schedule.at(epoch) for name, schedule in self.schedules.items()})
        return self._read[1]

    def forward(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the *sum* over rows of every term; a term of weight 0 is not computed, it is 0.

        Raises:
            ValueError: a value a term needs is missing, or a loss refuses what it is given; the term is named.
        """
        weights = self.weights
        return {term.name: self._value(term, values, weights[term.name]) for term in self.terms}

    def _value(self, term: Term, values: Mapping[str, Tensor], weight: float) -> Tensor:
        loss = self.losses[term.name]
        arguments = self.arguments[term.name]
        if weight == 0:
            parameters = list(loss.parameters()) if isinstance(loss, nn.Module) else []
            return _nothing([*parameters, *(values[key] for key in arguments.values() if key in values)], self.epoch)
        given = {argument: _pick(values, key, term.name) for argument, key in arguments.items()}
        try:
            value = loss(**given, **term.options, reduction="sum")
        except (ValueError, TypeError) as error:
            raise type(error)(f"{term.name}: {error}") from error
        if self.training and self.updates[term.name]:
            told = {argument: _pick(values, key, term.name) for argument, key in self.updates[term.name].items()}
            rows = given["mask"].reshape(len(given["mask"]), -1).any(1) if "mask" in given else slice(None)
            loss.update(**{name: tensor.detach()[rows] for name, tensor in told.items()})  # type: ignore[attr-defined]
        return value

    def counts(self, batch: Mapping[str, Tensor], rows: int) -> dict[str, int]:
        """Return how many rows each term sums over: all ``rows``, or those its mask leaves.

        Raises:
            ValueError: a mask is not in the batch, where it can be counted.
        """
        counts = dict.fromkeys(self.losses, rows)
        for name, arguments in self.arguments.items():
            if "mask" in arguments:
                mask = _pick(batch, arguments["mask"], name)
                counts[name] = int(mask.reshape(len(mask), -1).any(1).sum())
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
        and name != "reduction"
        and name not in term.options
    ]
    # a loss of any tensors takes those the term names
    anything = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    unknown = set(term.inputs) - set(parameters) - set(_update_arguments(term, loss))
    if unknown and not anything:
        raise ValueError(
            f"{term.name}: the loss takes no {', '.join(sorted(unknown))}; it takes {', '.join(parameters)}"
        )
    given = {name: key for name, key in term.inputs.items() if anything or name in parameters}
    if not required and not given:
        raise ValueError(f"{term.name}: the loss is given no tensor")
    return {**{name: name for name in required}, **given}


def _update_arguments(term: Term, loss: Callable[..., Tensor]) -> dict[str, str]:
    """Return the key of the value that each argument of a loss's ``update`` is given; none if there is no update."""
    update = getattr(loss, "update", None)
    if not isinstance(loss, nn.Module) or not callable(update):
        return {}
    return {name: term.inputs.get(name, name) for name in inspect.signature(update).parameters}


def _nothing(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return a zero with all the tensors in its graph, whatever they hold: processes that share gradients expect them.

    A sum of no values of each, and not 0 times each, which is NaN where one is infinite.
    """
    zero = like.new_zeros((), dtype=torch.float32)
    return sum((tensor.flatten()[:0].float().sum() for tensor in tensors if tensor.requires_grad), zero)


def _pick(values: Mapping[str, Tensor], key: str, term: str) -> Tensor:
    if key not in values:
        raise ValueError(f"{term}: wants the value {key!r}, got {', '.join(sorted(values))}")
    return values[key]
