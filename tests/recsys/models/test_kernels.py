"""The CPU forms of dropout and of the softmax over all items do what torch's own do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from apps.recsys.models.kernels import Dropout, dropout, linear_cross_entropy


@pytest.mark.parametrize(
    ("rows", "classes", "scale"), [(1, 2, 1.0), (9, 5, 1.0), (40, 70_000, 1.0), (300, 1_682, 60.0)]
)
def test_cross_entropy_and_its_gradients_equal_the_plain_ones(rows, classes, scale):
    generator = torch.Generator().manual_seed(rows)
    targets = torch.randint(classes, (rows,), generator=generator)
    results = []
    for fused in (True, False):
        generator.manual_seed(1)
        hidden = torch.randn(rows, 6, generator=generator, dtype=torch.float64).requires_grad_()
        weight = (torch.randn(classes, 6, generator=generator, dtype=torch.float64) * scale).requires_grad_()
        plain = functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
        loss = linear_cross_entropy(hidden, weight, targets) if fused else plain
        results.append((loss.detach(), *torch.autograd.grad(loss / 7, (hidden, weight))))
    torch.testing.assert_close(results[0], results[1])


def test_cross_entropy_without_gradients_and_without_rows():
    weight = torch.randn(5, 3)
    with torch.no_grad():
        assert linear_cross_entropy(torch.zeros(4, 3), weight, torch.zeros(4, dtype=torch.int64)).item() == (
            pytest.approx(4 * torch.tensor(5.0).log().item())
        )
    empty = linear_cross_entropy(torch.empty(0, 3, requires_grad=True), weight, torch.empty(0, dtype=torch.int64))
    assert empty.item() == 0.0


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 0.97), st.sampled_from([torch.float32, torch.float64]))
def test_dropout_zeroes_at_its_rate_keeps_the_mean_and_passes_the_same_gradient(rate, dtype):
    torch.manual_seed(0)
    x = torch.ones(201, 199, dtype=dtype, requires_grad=True)
    y = dropout(x, rate, True)
    # five standard deviations of the share of zeros
    assert abs((y == 0).double().mean().item() - rate) < 5 * (rate * (1 - rate) / x.numel()) ** 0.5 + 2**-16
    assert y.max().item() == pytest.approx(1 / (1 - rate), rel=1e-3)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_dropped_values_are_independent_of_their_neighbours():
    torch.manual_seed(3)
    dropped = (dropout(torch.ones(400_000), 0.3, True) == 0).double()
    for distance in (1, 2, 3, 4):  # four values share one draw
        together = (dropped[distance:] * dropped[:-distance]).mean().item()
        assert together == pytest.approx(0.09, abs=0.003)


def test_dropout_follows_the_seed_and_rests_outside_training():
    layer, x = Dropout(0.5), torch.randn(7, 5)
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(layer(x), first)
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(dropout(x, 0.0, True), x)
