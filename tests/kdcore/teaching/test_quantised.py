"""Quantisation-aware teaching: a prepared student learns, and its int8 form says nearly the same in fewer bytes."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdcore.checkpoint import load_state
from kdcore.config import UserError
from kdcore.teaching import (
    DistillationStep,
    Learning,
    Term,
    convert_quantised,
    frozen,
    labels_term,
    prepare_quantised,
    stored_bytes,
)
from tests.kdcore.teaching.problems import accuracy, blobs, fit, network, score, trained

pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore")

DATA, HELD = blobs(120), blobs(90, seed=1)
EXAMPLE = DATA["inputs"][:4]


def step_of(prepared: nn.Module) -> DistillationStep:
    terms = [labels_term(0.5), Term("soft", "soft_targets", options={"temperature": 2.0})]
    return DistillationStep(
        prepared,
        DATA,
        terms,
        teachers=[trained()],
        validate=accuracy(HELD),
        learning=Learning(batch_size=32, learning_rate=0.02),
    )


@pytest.fixture(scope="module")
def taught() -> Any:
    """A prepared student after training, what it could do before, and its int8 form."""
    prepared = prepare_quantised(network(32), EXAMPLE)
    before = score(prepared, HELD)
    fit(step_of(prepared), 5)
    return prepared, before, convert_quantised(prepared)


def test_the_prepared_student_rounds_as_int8_does() -> None:
    student = network(32)
    prepared = prepare_quantised(student, DATA["inputs"]).eval()
    assert any("fake_quant" in name for name, _ in prepared.named_buffers())
    inputs = DATA["inputs"]
    exact, rounded = student(inputs), prepared(inputs)
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0, atol=0.03 * float(exact.detach().abs().max()))
    assert prepared(inputs[:7]).shape == (7, 3) and prepared(inputs[:1]).shape == (1, 3), "any batch size"
    # rounded to the nearest of 256 steps around zero, a scale a channel; torch shifts channels of one sign
    weight = student[0].weight.detach()
    scale = torch.maximum(-weight.amin(1, keepdim=True) / 128, weight.amax(1, keepdim=True) / 127)
    wanted = (weight / scale).round().clamp(-128, 127) * scale
    found = dict(prepared.graph.named_children())["activation_post_process_1"](weight)
    both = (weight.amin(1) < 0) & (weight.amax(1) > 0)
    assert int(both.sum()) > 20
    torch.testing.assert_close(found[both], wanted[both])


def test_preparing_copies_and_leaves_the_student_as_it_was() -> None:
    student = network(8).eval()
    before = copy.deepcopy(student.state_dict())
    prepared = prepare_quantised(student, EXAMPLE)
    prepared(HELD["inputs"]).sum().backward()
    with torch.no_grad():
        for parameter in prepared.parameters():
            parameter.add_(1.0)
    assert not student.training and prepared.training
    assert all(parameter.grad is None for parameter in student.parameters())
    torch.testing.assert_close(dict(student.state_dict()), dict(before), rtol=0, atol=0)


def test_it_learns_through_the_trainer(taught: Any) -> None:
    prepared, before, _ = taught
    assert score(prepared, HELD) > max(0.85, before)


def test_the_int8_form_is_close_and_smaller(taught: Any) -> None:
    prepared, _, converted = taught
    wanted, found = prepared.eval()(HELD["inputs"]).detach(), converted(HELD["inputs"])
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.03 * float(wanted.abs().max()))
    assert float((found.argmax(1) == wanted.argmax(1)).float().mean()) > 0.95
    assert score(converted, HELD) > 0.85
    whole = [value for value in converted.state_dict().values() if value.dtype == torch.int8]
    assert sum(each.numel() for each in whole) == 4 * 32 + 32 * 3, "both weights are int8"
    # int8 weights, float32 biases, and a scale (float32) and a zero point (int64) a channel
    weights, channels = 4 * 32 + 32 * 3, 35
    assert stored_bytes(converted) == weights + 4 * channels + (4 + 8) * channels
    assert stored_bytes(network(32)) == 4 * (weights + channels)
    assert stored_bytes(network(32, norm=True)) == 4 * (weights + channels + 4 * 32) + 8


def test_converting_leaves_the_prepared_student_to_learn_on(taught: Any) -> None:
    prepared, _, _ = taught
    prepared.train()
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    convert_quantised(prepared)
    torch.testing.assert_close(dict(prepared.state_dict()), before, rtol=0, atol=0)
    assert prepared.training
    prepared(DATA["inputs"]).sum().backward()
    assert all(parameter.grad is not None for parameter in prepared.parameters())


def test_wide_layers_take_nearly_a_quarter() -> None:
    wide = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    converted = convert_quantised(prepare_quantised(wide, torch.randn(4, 256)))
    assert 0.25 < stored_bytes(converted) / stored_bytes(wide) < 0.32


@pytest.fixture(scope="module")
def normed() -> Any:
    student = network(8, norm=True, dropout=0.3)
    student[1].eps, student[1].momentum = 0.5, 0.01
    with torch.no_grad():
        student[1].running_mean.fill_(0.25)
    return student, prepare_quantised(student, DATA["inputs"])


def test_modes_keep_what_the_layers_were_made_with(normed: Any) -> None:
    """The rate of dropout, eps and momentum; torchao's own change of modes puts defaults there."""
    student, prepared = (copy.deepcopy(each) for each in normed)
    step = step_of(prepared)
    for _ in range(2):
        step.train()
        assert not torch.equal(prepared(HELD["inputs"]), prepared(HELD["inputs"])), "dropout in training"
        step.eval()
    dropouts = [node for node in prepared.graph.graph.nodes if "dropout" in str(node.target)]
    assert [node.args[1:] for node in dropouts] == [(0.3, False)]
    student, prepared = (copy.deepcopy(each).eval() for each in normed)
    wanted, found = student(DATA["inputs"]).detach(), prepared(DATA["inputs"]).detach()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.05 * float(wanted.abs().max()))
    torch.testing.assert_close(prepared.train().state_dict()["graph.1.running_mean"], torch.full((8,), 0.25))
    prepared(DATA["inputs"])
    student.train()(DATA["inputs"])
    moved = prepared.state_dict()["graph.1.running_mean"]
    torch.testing.assert_close(moved, student[1].running_mean, rtol=0, atol=0.002)
    assert not torch.equal(moved, torch.full((8,), 0.25))


def test_evaluation_moves_no_range(normed: Any) -> None:
    prepared = copy.deepcopy(normed[1]).eval()
    ranges = {name: value.clone() for name, value in prepared.named_buffers() if "post_process" in name}
    before = prepared(HELD["inputs"])
    prepared(100 * HELD["inputs"])
    torch.testing.assert_close(prepared(HELD["inputs"]), before, rtol=0, atol=0)
    torch.testing.assert_close({name: prepared.get_buffer(name) for name in ranges}, ranges, rtol=0, atol=0)
    prepared.train()(100 * HELD["inputs"])
    assert any(not torch.equal(prepared.get_buffer(name), value) for name, value in ranges.items())


def test_resumed_in_a_new_process_to_the_bit(normed: Any, tmp_path: Path) -> None:
    def fresh() -> DistillationStep:
        return step_of(copy.deepcopy(normed[1]).train())

    fit(fresh(), 2, folder=tmp_path / "whole", checkpoint_seconds=1e9)
    broken, validate, calls = fresh(), accuracy(HELD), []

    def fails(model: nn.Module) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2:
            raise InterruptedError
        return validate(model)

    broken.validator = fails
    with pytest.raises(InterruptedError):
        fit(broken, 2, folder=tmp_path / "broken", checkpoint_seconds=0)
    fit(fresh(), 2, folder=tmp_path / "broken", checkpoint_seconds=1e9)
    whole, again = (load_state(tmp_path / name / "last.safetensors") for name in ("whole", "broken"))
    for part in ("module", "optimizer"):
        torch.testing.assert_close(whole[part], again[part], rtol=0, atol=0)


def test_a_prepared_student_may_teach(normed: Any) -> None:
    prepared = copy.deepcopy(normed[1]).train()
    with pytest.warns(UserWarning, match="teacher was in training mode"):
        assert frozen(prepared) is prepared
    assert not prepared.training and not any(parameter.requires_grad for parameter in prepared.parameters())


def test_what_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"example: wanted at least 2 rows, got 1"):
        prepare_quantised(network(), EXAMPLE[:1])
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e", None)
    with pytest.raises(UserError, match=r"needs torchao: pip install 'kdsuite\[quantise\]'"):
        prepare_quantised(network(), EXAMPLE)
