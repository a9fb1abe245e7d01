"""Feature taps: they see what a layer sees and gives, and leave no hook and no tensor behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdcore.teaching import DistillationStep, Taps, labels_term
from tests.kdcore.teaching.problems import accuracy, batch_of, blobs, network


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_outputs_and_inputs_by_name() -> None:
    model = network()
    inputs = blobs(5)["inputs"]
    paths = {"hidden": "0", "active": "1", "before": "1:in", "feature": "2:in", "whole": "", "given": ":in"}
    with Taps(model, paths) as taps:
        answer = model(inputs)
        kept = taps.take()
    hidden = nn.functional.linear(inputs, model[0].weight, model[0].bias)
    torch.testing.assert_close(kept["hidden"], hidden)
    assert torch.equal(kept["before"], kept["hidden"])
    assert torch.equal(kept["active"], kept["feature"]) and torch.equal(kept["active"], kept["hidden"].relu())
    assert torch.equal(kept["whole"], answer) and torch.equal(kept["given"], inputs)
    kept["feature"].sum().backward()
    assert model[0].weight.grad is not None, "a tap is part of the graph"
    assert hooks(model) == 0


def test_nested_layers_go_by_their_path() -> None:
    model = nn.ModuleDict({"body": network(), "head": nn.Linear(3, 2)})
    with Taps(model, {"middle": "body.1"}) as taps:
        out = model["body"](blobs(5)["inputs"])
        assert taps.take()["middle"].shape == (5, 8)
        assert out.shape == (5, 3)


def test_take_lets_go_and_asks_for_a_new_pass() -> None:
    model = network()
    with Taps(model, {"hidden": "0"}) as taps:
        with pytest.raises(ValueError, match="taps: hidden did not run in the last forward pass"):
            taps.take()
        model(blobs(5)["inputs"])
        taps.take()
        with pytest.raises(ValueError, match="taps: hidden did not run"):
            taps.take()


def test_released_after_an_error() -> None:
    model = network()
    with pytest.raises(RuntimeError), Taps(model, {"hidden": "0", "answer": "2"}) as taps:
        assert hooks(model) == 2
        model[0](blobs(5)["inputs"])
        model(torch.zeros(2, 99))
    assert hooks(model) == 0
    assert taps._kept == {}


def test_a_layer_of_many_tensors_is_refused_and_the_hooks_released() -> None:
    model = nn.Sequential(nn.LSTM(4, 3))
    with pytest.raises(TypeError, match=r"taps: '0' gives tuple, wanted a layer of a tensor"), Taps(model, {"a": "0"}):
        model(torch.zeros(2, 5, 4))
    assert hooks(model) == 0


def test_an_unknown_layer_is_answered_with_the_nearest() -> None:
    model = nn.ModuleDict({"encoder": network(), "decoder": nn.Linear(3, 3)})
    with pytest.raises(ValueError, match=r"taps: got the unknown layer 'encodr.1'; the nearest are encoder.1, encoder"):
        Taps(model, {"a": "encodr.1"})
    data = blobs(20)
    for role in ("student_taps", "teacher_taps"):
        with pytest.raises(ValueError, match=r"taps: got the unknown layer 'hidden'"):
            DistillationStep(
                network(),
                data,
                [labels_term()],
                validate=accuracy(data),
                teachers=[network().eval()],
                **{role: {"a": "hidden"}},  # type: ignore[arg-type]
            )


def test_a_compiled_model_is_refused() -> None:
    with pytest.raises(ValueError, match="taps: wanted a model that is not compiled"):
        Taps(torch.compile(network()), {"a": "0"})  # type: ignore[arg-type]


def test_a_step_leaves_no_hooks_between_batches() -> None:
    data, teacher = blobs(20), network(seed=3).eval()
    step = DistillationStep(
        network(),
        data,
        [labels_term()],
        validate=accuracy(data),
        teachers=[teacher],
        student_taps={"feature": "2:in"},
        teacher_taps={"hidden": "0"},
    )
    found = step.values(batch_of(step))
    assert found["student.feature"].requires_grad and not found["teacher.hidden"].requires_grad
    assert hooks(step.student) == hooks(teacher) == 0
