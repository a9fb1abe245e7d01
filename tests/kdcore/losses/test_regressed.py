"""Losses with networks of their own: what trains what, the vector forms, and a comparison with torchdistill."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcore.losses import FactorTransfer, Hint, VariationalInformation, hint


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def seeded() -> Any:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        yield


# Hints.


def test_regressed_hint_is_the_hint_of_the_regressor() -> None:
    maps, vectors = Hint(3, 2), Hint(3, 2, spatial=False)
    student, teacher = normal(4, 3, 5, 5), normal(4, 2, 5, 5, seed=1)
    torch.testing.assert_close(maps(student, teacher), hint(maps.regressor(student), teacher))
    student, teacher = normal(4, 3), normal(4, 2, seed=1)
    torch.testing.assert_close(vectors(student, teacher), hint(vectors.regressor(student), teacher))


def test_pooling_before_the_regressor_is_pooling_after_it() -> None:
    module = Hint(3, 2)
    student, teacher = normal(2, 3, 4, 4), normal(2, 2, 2, 2, seed=1)
    after = torch.nn.functional.avg_pool2d(module.regressor(student), 2)
    torch.testing.assert_close(module(student, teacher), hint(after, teacher))


# Factor transfer.


def test_forward_trains_the_translator_and_reconstruction_the_paraphraser() -> None:
    module = FactorTransfer(3, 4)
    student, teacher = normal(2, 3, 4, 4).requires_grad_(), normal(2, 4, 4, 4, seed=1).requires_grad_()
    module(student, teacher).backward()
    assert student.grad is not None and teacher.grad is None
    trained = {name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None}
    assert trained == {"translator"}
    module.zero_grad(set_to_none=True)
    module.reconstruction_loss(teacher).backward()
    trained = {name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None}
    assert trained == {"encoder", "decoder"} and teacher.grad is None


def test_the_paraphraser_learns_to_rebuild() -> None:
    module = FactorTransfer(3, 4, rate=1.0)
    teacher = normal(8, 4, 4, 4)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    first = module.reconstruction_loss(teacher).item()
    for _ in range(60):
        optimizer.zero_grad()
        module.reconstruction_loss(teacher).backward()
        optimizer.step()
    assert module.reconstruction_loss(teacher).item() < first / 2


def test_reconstruction_keeps_the_contract() -> None:
    module = FactorTransfer(3, 4)
    teacher = normal(3, 4, 2, 2)
    mask = torch.tensor([True, False, True])
    poisoned = teacher.masked_fill(~mask[:, None, None, None], torch.nan)
    each = module.reconstruction_loss(poisoned, mask=mask, reduction="none")
    assert each.shape == (3,) and each[1] == 0
    torch.testing.assert_close(
        module.reconstruction_loss(poisoned, mask=mask), module.reconstruction_loss(teacher[mask])
    )
    nothing = module.reconstruction_loss(teacher[:0])
    assert nothing.item() == 0
    nothing.backward()
    with pytest.raises(ValueError, match=r"teacher: wanted shape \(3, 4, 2, 2\), got \(3, 3, 2, 2\)"):
        module.reconstruction_loss(teacher[:, :3])


def test_factors_have_the_rate_and_their_scale_does_not_count() -> None:
    module = FactorTransfer(3, 8, rate=0.5)
    assert module.encoder(normal(1, 8, 2, 2)).shape == (1, 4, 2, 2)
    assert FactorTransfer(3, 2, rate=0.1).factor_channels == 1
    student, teacher = normal(2, 3, 2, 2), normal(2, 8, 2, 2, seed=1)
    want = module(student, teacher, norm=2)
    last = module.translator[-1]
    with torch.no_grad():
        last.weight.mul_(5)
        last.bias.mul_(5)
    torch.testing.assert_close(module(student, teacher, norm=2), want)


def test_factor_transfer_agrees_with_torchdistill() -> None:
    # Its 1-norm is averaged over the elements of a factor as well, which the paper does not do.
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    module = FactorTransfer(3, 4)
    student, teacher = normal(5, 3, 2, 2), normal(5, 4, 2, 2, seed=1)
    given = (
        {"translator": {"output": module.translator(student)}},
        {"paraphraser": {"output": module.encoder(teacher)}},
    )
    one, two = (mid_level.FTLoss(p=p)(*given).item() for p in (1, 2))
    assert module(student, teacher, norm=1).item() / (2 * 2 * 2) == pytest.approx(one, rel=1e-5)
    assert module(student, teacher, norm=2).item() == pytest.approx(two, rel=1e-5)


# Variational information.


def test_variational_information_agrees_with_torchdistill() -> None:
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    module = VariationalInformation(3, 4)
    torch.nn.init.normal_(module.raw_variance)
    student, teacher = normal(5, 3, 2, 2), normal(5, 4, 2, 2, seed=1)
    where = {"path": "layer", "io": "output"}
    loss = mid_level.VIDLoss({"pair": {"student": where, "teacher": where, "weight": 1}})
    predicted = module.mean(student), module.variance()[:, None, None]
    want = loss({"layer": {"output": predicted}}, {"layer": {"output": teacher}}).item()
    assert module(student, teacher).item() == pytest.approx(want, rel=1e-5)


def test_variational_information_is_a_gaussian_likelihood() -> None:
    module = VariationalInformation(3, 4, spatial=False, initial_variance=2.0)
    student, teacher = normal(5, 3), normal(5, 4, seed=1)
    gaussian = torch.distributions.Normal(module.mean(student), module.variance().sqrt())
    want = -gaussian.log_prob(teacher).sum(1) - 4 * math.log(2 * math.pi) / 2
    torch.testing.assert_close(module(student, teacher, elements="sum", reduction="none"), want)


@pytest.mark.parametrize("initial", [1e-3, 2.0, 5.0, 200.0])
def test_the_variance_starts_where_it_is_told(initial: float) -> None:
    variance = VariationalInformation(3, 4, initial_variance=initial).variance()
    torch.testing.assert_close(variance, torch.full((4,), initial), rtol=1e-4, atol=0)


def test_the_best_variance_is_the_mean_squared_error_of_the_channel() -> None:
    module = VariationalInformation(1, 2, spatial=False)
    torch.nn.init.zeros_(module.mean.weight)
    torch.nn.init.zeros_(module.mean.bias)
    teacher = normal(200, 2) * torch.tensor([0.5, 3.0])
    optimizer = torch.optim.Adam([module.raw_variance], 0.1)
    for _ in range(400):
        optimizer.zero_grad()
        module(torch.zeros(200, 1), teacher).backward()
        optimizer.step()
    torch.testing.assert_close(module.variance(), teacher.square().mean(0), rtol=1e-2, atol=0)


def test_a_collapsed_variance_is_bounded() -> None:
    module = VariationalInformation(3, 4)
    torch.nn.init.constant_(module.raw_variance, -1000.0)
    value = module(normal(2, 3, 2, 2), normal(2, 4, 2, 2, seed=1))
    value.backward()
    assert value.isfinite() and module.raw_variance.grad.isfinite().all()


# What a user gets wrong.


def test_wrong_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"student_channels: wanted at least 1, got 0"):
        Hint(0, 2)
    with pytest.raises(ValueError, match=r"rate: wanted a finite number > 0, got 0"):
        FactorTransfer(3, 4, rate=0)
    with pytest.raises(ValueError, match=r"initial_variance: wanted a number above 1e-05, got 0.0"):
        VariationalInformation(3, 4, initial_variance=0.0)
    maps = normal(2, 3, 2, 2), normal(2, 4, 2, 2)
    with pytest.raises(ValueError, match=r"norm: wanted 1 or 2, got 3"):
        FactorTransfer(3, 4)(*maps, norm=3)
    with pytest.raises(ValueError, match=r"elements: wanted one of mean, sum, got 'max'"):
        VariationalInformation(3, 4)(*maps, elements="max")
    with pytest.raises(ValueError, match=r"student: wanted shape \(2, 5, 2, 2\), got \(2, 3, 2, 2\)"):
        Hint(5, 4)(*maps)
    with pytest.raises(ValueError, match=r"student: wanted 2 dimension"):
        Hint(3, 4, spatial=False)(*maps)
