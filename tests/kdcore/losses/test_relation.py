"""Relations between layers and of output to input: identities of the papers, singular cases, and other libraries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kdcore.losses import flow_of_solution, input_jacobian, jacobian_matching, singular_vectors


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Flow of solution.


def test_flow_is_the_matrix_of_torchdistill() -> None:
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    maps = normal(4, 3, 8, 8), normal(4, 5, 4, 4, seed=1), normal(4, 3, 6, 6, seed=2), normal(4, 5, 6, 6, seed=3)
    student, teacher = (mid_level.FSPLoss.compute_fsp_matrix(*pair) for pair in (maps[:2], maps[2:]))
    # The whole of its loss is a norm over one axis, summed over the other: neither the paper's square nor its root.
    want = (student - teacher).square().sum((1, 2))
    torch.testing.assert_close(flow_of_solution(*maps, reduction="none"), want)
    torch.testing.assert_close(flow_of_solution(*maps, entries="mean", reduction="none"), want / 15)


def test_flow_does_not_see_the_order_of_places() -> None:
    first, second, order = normal(2, 3, 2, 3), normal(2, 4, 2, 3, seed=1), torch.randperm(6)
    moved = [m.flatten(2)[:, :, order].unflatten(2, (2, 3)) for m in (first, second)]
    assert flow_of_solution(*moved, first, second).item() == pytest.approx(0, abs=1e-24)


def test_flow_and_vectors_want_equal_channels() -> None:
    maps = normal(2, 3, 4, 4), normal(2, 5, 4, 4), normal(2, 3, 4, 4), normal(2, 6, 4, 4)
    for loss in (flow_of_solution, singular_vectors):
        with pytest.raises(ValueError, match=r"teacher_second: wanted shape \(2, 5, 4, 4\), got \(2, 6, 4, 4\)"):
            loss(*maps)
        with pytest.raises(ValueError, match=r"student_first: wanted no empty axis .*, got .*\(2, 3, 0, 4\)"):
            loss(maps[0][:, :, :0], *maps[1:])
    with pytest.raises(ValueError, match="entries: wanted 'sum' or 'mean', got 'all'"):
        flow_of_solution(*maps[:3], maps[1], entries="all")


# Singular vectors.


def from_singular(values: list[float], seed: int = 0) -> Tensor:
    """Feature maps [1, 4, 3, 2] whose matrix [6, 4] has these singular values."""
    left = torch.linalg.qr(normal(6, 4, seed=seed)).Q
    right = torch.linalg.qr(normal(4, 4, seed=seed + 1)).Q
    return (left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right).T.reshape(1, 4, 3, 2)


def test_singular_vectors_do_not_see_signs_scale_and_order_of_places() -> None:
    teacher = from_singular([3, 2, 1, 0.5]), from_singular([4, 2, 1, 0.1], seed=5)
    order = torch.randperm(6)
    student = [-2 * m.flatten(2)[:, :, order].unflatten(2, (3, 2)) for m in teacher]
    assert singular_vectors(*student, *teacher, count=3).item() == pytest.approx(0, abs=1e-24)


@pytest.mark.parametrize("values", [[1, 1, 1, 1], [2, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [2, 2 + 1e-12, 1, 1]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_are_finite_where_singular_values_coincide(values: list[float], dtype: torch.dtype) -> None:
    student = from_singular(values).to(dtype).requires_grad_()
    other = from_singular([3, 2, 1, 0.5], seed=7).to(dtype)
    value = singular_vectors(student, other, other, -other.flip(2), count=4)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(4, 3, 2), (5, 2, 2), (3, 2, 4)])
def test_gradients_of_singular_vectors_for_wide_and_tall_maps(shape: tuple[int, ...]) -> None:
    student = normal(2, *shape).requires_grad_()
    others = [normal(2, *shape, seed=seed) for seed in (1, 2, 3)]
    assert torch.autograd.gradcheck(lambda s: singular_vectors(s, *others, count=2), student)


def test_singular_vectors_refuse_more_vectors_than_there_are() -> None:
    maps = [normal(2, 3, 1, 2)] * 4
    with pytest.raises(ValueError, match=r"count: wanted 1\.\.2 \(the smallest rank\), got 3"):
        singular_vectors(*maps, count=3)


# Jacobians.


def test_jacobian_loss_is_two_minus_twice_the_cosine() -> None:
    student, teacher = normal(5, 3, 4), normal(5, 3, 4, seed=1)
    cosine = torch.cosine_similarity(student.flatten(1), teacher.flatten(1))
    torch.testing.assert_close(jacobian_matching(student, teacher, reduction="none"), 2 - 2 * cosine)
    assert jacobian_matching(student, -student).item() == pytest.approx(4)
    assert jacobian_matching(student, torch.zeros_like(student)).item() == pytest.approx(1)


def test_input_jacobian_of_a_network() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    inputs, index = normal(5, 4).requires_grad_(), torch.tensor([0, 2, 1, 1, 0])
    jacobian = input_jacobian(network(inputs), inputs, index, create_graph=True)
    want = torch.stack([torch.autograd.functional.jacobian(network, x)[i] for x, i in zip(inputs, index, strict=True)])
    torch.testing.assert_close(jacobian, want)
    jacobian_matching(jacobian, normal(5, 4, seed=1)).backward()
    assert all(p.grad.abs().sum() > 0 for p in network[0].parameters())
    assert not input_jacobian(network(inputs), inputs, index).requires_grad


def test_input_jacobian_names_what_is_wrong() -> None:
    inputs = normal(5, 4).requires_grad_()
    for index, inputs_given, message in (
        (torch.zeros(5), inputs, "index: wanted int64, got torch.float32"),
        (torch.zeros(4, dtype=torch.int64), inputs, r"index: wanted shape \(5,\), got \(4,\)"),
        (torch.zeros(5, dtype=torch.int64), inputs[:3], r"inputs: wanted shape \(5, 4\), got \(3, 4\)"),
        (torch.zeros(5, dtype=torch.int64), inputs.detach(), "inputs: wanted a tensor that requires a gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            input_jacobian(inputs * 2, inputs_given, index)
