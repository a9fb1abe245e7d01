"""Clients that exchange predictions: what each learns from, what is sent to the byte, and the average of weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdcore.teaching import DistillationStep, FederatedResult, federated, federated_average
from kdcore.teaching.federated import predictions, weight_bytes
from kdcore.trainer import TeachingStep
from tests.kdcore.teaching.problems import FAST, accuracy, blobs, fit, flat, network, score

PUBLIC, HELD = blobs(60, seed=2)["inputs"], blobs(90, seed=1)


def private() -> list[dict[str, Tensor]]:
    """Each client lacks a class: alone none of them can be good."""
    parts = []
    for client in range(2):
        data = blobs(90, seed=10 + client)
        kept = data["labels"] != client
        parts.append({name: rows[kept] for name, rows in data.items()})
    return parts


def run(**options: Any) -> tuple[FederatedResult, list[tuple[str, TeachingStep]]]:
    steps = []

    def train(step: TeachingStep, text: str) -> None:
        steps.append((text, step))
        fit(step, 3)

    models = options.pop("models", None) or [network(), network(12, seed=1, norm=True)]
    settings = {"rounds": 2, "validate": accuracy(HELD), "learning": FAST, **options}
    return federated(models, private(), PUBLIC, train, **settings), steps


@pytest.fixture(scope="module")
def both() -> tuple[FederatedResult, list[tuple[str, TeachingStep]]]:
    return run()


def test_clients_learn_from_each_other_what_they_never_saw(both: Any) -> None:
    result, _ = both
    for client, (rows, model) in enumerate(zip(private(), result.models, strict=True)):
        alone = network()
        fit(DistillationStep(alone, rows, both[1][0][1].terms.terms, validate=accuracy(HELD), learning=FAST), 6)
        missing = HELD["labels"] == client
        unseen = {name: values[missing] for name, values in HELD.items()}
        assert score(alone, unseen) == 0.0, "no row of that class was there"
        assert score(model, unseen) > 0.5
        assert score(model, HELD) > 0.75


def test_every_round_is_private_then_public(both: Any) -> None:
    _, steps = both
    wanted = [f"client {c}, round {r}, {part}" for r in range(2) for part in ("private", "public") for c in range(2)]
    assert [text for text, _ in steps] == wanted
    for text, step in steps:
        assert set(step.data) == ({"inputs", "labels"} if "private" in text else {"inputs", "teacher"})


def test_what_is_learned_is_the_mean_of_the_answers() -> None:
    seen: list[Tensor] = []
    answers: list[Tensor] = []

    def train(step: Any, text: str) -> None:
        if "private" in text:
            with torch.no_grad():
                answers.append(step.student.eval()(PUBLIC))
        else:
            seen.append(step.data["teacher"])

    models = [network(), network(seed=1)]
    federated(models, private(), PUBLIC, train, validate=accuracy(HELD), rounds=1, answers="float32")
    torch.testing.assert_close(seen[0], (answers[0] + answers[1]) / 2)
    assert torch.equal(*seen)
    federated(models, private(), PUBLIC, train, validate=accuracy(HELD), rounds=1, answers="float16")
    assert torch.equal(seen[2], seen[2].half().float()), "rounded as it was sent"
    torch.testing.assert_close(seen[2], seen[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("answers", "size"), [("float16", 2), ("float32", 4)])
def test_bytes_are_counted_exactly(answers: Any, size: int) -> None:
    models = [network(), network(12, norm=True)]
    settings = {"validate": accuracy(HELD), "rounds": 3, "answers": answers}
    result = federated(models, private(), PUBLIC, lambda step, text: None, **settings)
    assert result.traffic.predictions == 3 * 2 * 2 * (60 * 3) * size, "rounds, up and down, clients, logits"
    plain = 4 * (4 * 8 + 8 + 8 * 3 + 3)
    normed = 4 * (4 * 12 + 12 + 4 * 12 + 12 * 3 + 3) + 8
    assert (weight_bytes(models[0]), weight_bytes(models[1])) == (plain, normed)
    assert result.traffic.weights == 3 * 2 * (plain + normed)


def test_the_models_given_are_left_alone_and_the_returned_ones_moved(both: Any) -> None:
    models = [network(), network(12, seed=1, norm=True)]
    before = [flat(model) for model in models]
    result, _ = run(models=models, rounds=1)
    for model, state, moved in zip(models, before, result.models, strict=True):
        assert torch.equal(flat(model), state) and not torch.equal(flat(moved), state)


def test_validated_in_evaluation_mode_after_every_round() -> None:
    modes = []

    def validate(model: nn.Module) -> dict[str, float]:
        modes.append((model.training, torch.is_grad_enabled()))
        return accuracy(HELD)(model)

    models = [network(norm=True), network(norm=True, seed=1)]
    result = federated(models, private(), PUBLIC, lambda step, text: None, validate=validate, rounds=2)
    assert modes == [(False, False)] * 4
    assert [[set(each) for each in clients] for clients in result.rounds] == [[{"accuracy"}] * 2] * 2
    assert all(model.training for model in result.models), "the mode they were in"


def test_predictions_leave_every_module_in_its_mode() -> None:
    model = network(norm=True, dropout=0.5)
    model[1].eval()
    before = flat(model)
    found = predictions(model, PUBLIC, batch_size=7)
    assert [module.training for module in model] == [True, False, True, True, True]
    assert torch.equal(flat(model), before) and not found.requires_grad
    torch.testing.assert_close(found, copy.deepcopy(model).eval()(PUBLIC).detach())


def test_the_average_of_weights() -> None:
    models = [network(norm=True, seed=seed) for seed in range(3)]
    for model in models:
        model[1].num_batches_tracked.fill_(5)
    average = federated_average(models, [1, 2, 0])
    for name, found in average.items():
        a, b, _ = (model.state_dict()[name] for model in models)
        wanted = (a.double() + 2 * b.double()) / 3
        assert found.dtype == a.dtype
        torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-6)
    for rows in ([1, 2, 3], [7, 11, 13], [49, 49, 49]):
        assert int(federated_average(models, rows)["1.num_batches_tracked"]) == 5, "no rounding down of 4.999"
    models[0].load_state_dict(average)


def test_what_does_not_fit_is_named() -> None:
    models, rows, check = [network(), network()], private(), accuracy(HELD)

    def nothing(step: TeachingStep, text: str) -> None:
        raise AssertionError

    for some, parts in ((models[:1], rows[:1]), (models, rows[:1])):
        with pytest.raises(ValueError, match=rf"private: wanted one set .* got {len(parts)} for {len(some)}"):
            federated(some, parts, PUBLIC, nothing, validate=check, rounds=1)
    with pytest.raises(ValueError, match=r"rounds, public: wanted at least 1 of each, got 0 and 60"):
        federated(models, rows, PUBLIC, nothing, validate=check, rounds=0)
    with pytest.raises(ValueError, match=r"rounds, public: wanted at least 1 of each, got 1 and 0"):
        federated(models, rows, PUBLIC[:0], nothing, validate=check, rounds=1)
    with pytest.raises(ValueError, match=r"answers: wanted one of float32, float16, got 'int8'"):
        federated(models, rows, PUBLIC, nothing, validate=check, rounds=1, answers="int8")  # type: ignore[arg-type]
    for numbers in ([1], [0, 0], [3, -1]):
        with pytest.raises(ValueError, match=r"rows: wanted one number >= 0 a model, some > 0, got \["):
            federated_average(models, numbers)
    with pytest.raises(ValueError, match="models: wanted one architecture"):
        federated_average([network(), network(9)], [1, 1])
