"""Students that compute with int8 weights while they learn: what is rounded, what learns, and what stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from kdcore.teaching import keep_rounded, round_weights, set_rounding


class Listener(nn.Module):
    """Layers of every kind that is rounded, and two that are not."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU] = nn.LSTM) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(5, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.recurrent = cell(6, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        frames = self.norm(self.convolution(inputs.transpose(1, 2)).transpose(1, 2))
        answer: Tensor = self.head(self.recurrent(frames)[0])
        return answer


MATRICES = ("convolution.weight", "recurrent.weight_ih_l0", "recurrent.weight_hh_l0", "head.weight")


def by_hand(weight: Tensor) -> Tensor:
    """Return the nearest multiples of the row's largest / 127, in float64, a row at a time."""
    rows = []
    for row in weight.double().flatten(1):
        step = row.abs().max() / 127
        rows.append((row / step).round() * step)
    return torch.stack(rows).reshape(weight.shape).float()


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_evaluation_and_what_is_kept_are_those_of_int8_weights(cell: type[nn.LSTM]) -> None:
    torch.manual_seed(0)
    student, inputs = Listener(cell), torch.randn(2, 7, 5)
    expected = copy.deepcopy(student)
    for name in MATRICES:
        weight = expected.get_parameter(name)
        weight.data = by_hand(weight.data)
    names = list(student.state_dict())
    plain = student(inputs)
    assert round_weights(student, active=False) == len(MATRICES) and round_weights(student) == 0
    torch.testing.assert_close(student.train()(inputs), plain)
    wanted = expected(inputs)
    assert not torch.allclose(wanted, plain, atol=1e-5)
    torch.testing.assert_close(student.eval()(inputs), wanted)
    set_rounding(student.train(), True)
    torch.testing.assert_close(student(inputs), wanted)
    keep_rounded(student)
    assert sorted(student.state_dict()) == sorted(names)
    torch.testing.assert_close(student(inputs), wanted)
    for name in MATRICES:
        torch.testing.assert_close(student.get_parameter(name).data, expected.get_parameter(name).data)
    for name in ("norm.weight", "head.bias"):
        assert torch.equal(student.get_parameter(name), expected.get_parameter(name))
    other = Listener(cell)
    other.load_state_dict(student.state_dict())
    torch.testing.assert_close(other(inputs), wanted)


def test_gradients_pass_straight_through_and_the_weights_move() -> None:
    torch.manual_seed(0)
    student, inputs = Listener(), torch.randn(2, 7, 5)
    expected = copy.deepcopy(student)
    for name in MATRICES:
        weight = expected.get_parameter(name)
        weight.data = by_hand(weight.data)
    round_weights(student)
    for each in (student, expected):
        each(inputs).square().sum().backward()
    for name in MATRICES:
        module, _, parameter = name.rpartition(".")
        original = getattr(student.get_submodule(module).parametrizations, parameter).original
        torch.testing.assert_close(original.grad, expected.get_parameter(name).grad)
    before = student(inputs).detach()
    torch.optim.SGD(student.parameters(), lr=0.05).step()
    assert (student(inputs) - before).abs().max() > 1e-3


def test_a_checkpoint_holds_whether_training_rounds_and_zeros_stay_zeros() -> None:
    student, other = Listener(), Listener()
    student.head.weight.data[1] = 0.0
    for each in (student, other):
        round_weights(each, active=False)
    set_rounding(student, True)
    other.load_state_dict(student.state_dict())
    inputs = torch.randn(1, 4, 5)
    torch.testing.assert_close(other.train()(inputs), student.eval()(inputs))
    keep_rounded(other)
    assert torch.equal(other.head.weight[1], torch.zeros(4)) and torch.isfinite(other(inputs)).all()
