"""Clients that send each other predictions, never weights nor data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from kdcore.teaching.registry import teaching
from kdcore.teaching.step import DistillationStep, Learning, Validate, in_mode, labels_term
from kdcore.teaching.terms import Term
from kdcore.trainer import TeachingStep

Answers = Literal["float32", "float16"]
# trains a step with the one trainer; the text names it (client 2, round 3, private), for its folder and progress bar
Run = Callable[[TeachingStep, str], object]


@dataclass
class Traffic:
    """What a round of clients sent, in bytes, up and down, and what averaging weights would have sent."""

    predictions: int = 0
    weights: int = 0


@dataclass
class FederatedResult:
    """The clients' models after the last round, and what it took."""

    models: list[nn.Module]
    traffic: Traffic = field(default_factory=Traffic)
    # validation metrics of every client after every round
    rounds: list[list[dict[str, float]]] = field(default_factory=list)


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


@torch.no_grad()
def predictions(model: nn.Module, inputs: Tensor, batch_size: int = 1024) -> Tensor:
    """Return a model's logits of all inputs, float32 [N, C], in evaluation mode; its mode is put back."""
    with in_mode(model, False):
        return torch.cat([model(part).float() for part in inputs.split(batch_size)])


@torch.no_grad()
def _validated(model: nn.Module, validate: Validate) -> dict[str, float]:
    with in_mode(model, False):
        return validate(model)


@teaching(
    "federated",
    "fits",
    "clients' models (of any architectures), their private rows, unlabelled public inputs",
    "Li & Wang, FedMD, 2019; Lin et al., Ensemble Distillation for Robust Model Fusion, NeurIPS 2020",
)
def federated(
    models: Sequence[nn.Module],
    private: Sequence[Mapping[str, Tensor]],
    public: Tensor,
    run: Run,
    *,
    validate: Validate,
    rounds: int,
    temperature: float = 2.0,
    answers: Answers = "float16",
    learning: Learning | None = None,
) -> FederatedResult:
    """Train clients on their own rows, then on the mean of what all answer to public inputs, round by round.

    In a round every client (1) learns from its private ``inputs`` and ``labels``, (2) sends its logits of ``public``,
    (3) gets their mean and learns from it. Bytes are counted per direction and client, and beside them what federated
    averaging would send: the weights of each model, which must then all be alike.

    Raises:
        ValueError: not one private set a client, fewer than two clients, no public input, or rounds < 1.
    """
    if len(models) < 2 or len(models) != len(private):
        raise ValueError(f"private: wanted one set a client and at least 2, got {len(private)} for {len(models)}")
    if rounds < 1 or not len(public):
        raise ValueError(f"rounds, public: wanted at least 1 of each, got {rounds} and {len(public)}")
    if answers not in get_args(Answers):
        raise ValueError(f"answers: wanted one of {', '.join(get_args(Answers))}, got {answers!r}")
    result = FederatedResult([copy.deepcopy(model) for model in models])
    sent = torch.float16 if answers == "float16" else torch.float32
    for number in range(rounds):
        for client, (model, rows) in enumerate(zip(result.models, private, strict=True)):
            step = DistillationStep(model, rows, [labels_term()], validate=validate, learning=learning)
            run(step, f"client {client}, round {number}, private")
        said = [predictions(model, public).to(sent) for model in result.models]
        mean = torch.stack([each.float() for each in said]).mean(0)
        result.traffic.predictions += 2 * sum(each.numel() * each.element_size() for each in said)
        result.traffic.weights += 2 * sum(weight_bytes(model) for model in result.models)
        for client, model in enumerate(result.models):
            term = Term("soft_targets", "soft_targets", options={"temperature": temperature})
            data = {"inputs": public, "teacher": mean.to(sent).float()}
            run(
                DistillationStep(model, data, [term], validate=validate, learning=learning),
                f"client {client}, round {number}, public",
            )
        result.rounds.append([_validated(model, validate) for model in result.models])
    return result


def federated_average(models: Sequence[nn.Module], rows: Sequence[int]) -> dict[str, Tensor]:
    """Return the weights of models of one architecture, averaged by their numbers of rows: the usual way, to compare.

    Reference: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017.
    """
    total = sum(rows)
    if len(models) != len(rows) or total <= 0 or min(rows) < 0:
        raise ValueError(f"rows: wanted one number >= 0 a model, some > 0, got {list(rows)}")
    states = [model.state_dict() for model in models]
    shapes = [{name: tuple(value.shape) for name, value in state.items()} for state in states]
    if any(each != shapes[0] for each in shapes):
        raise ValueError("models: wanted one architecture, got weights of different names or shapes")
    average = {}
    for name, value in states[0].items():
        mean = sum(state[name].double() * n for state, n in zip(states, rows, strict=True)) / total
        average[name] = (mean if value.is_floating_point() else mean.round()).to(value.dtype)
    return average
