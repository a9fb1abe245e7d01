"""Relations of a batch: other libraries, enumerated chances, and what a short batch does."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcore.losses import (
    correlation_congruence,
    darkrank_hard,
    darkrank_soft,
    graph_relations,
    similarity_preserving,
)
from kdcore.losses.similarity import row_distances
from kdcore.losses.vectors import unit


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# What they share.


def test_unit_and_distances_where_they_are_singular() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-20, 0.0]], requires_grad=True)
    got = unit(rows)
    torch.testing.assert_close(got.detach(), torch.tensor([[0.6, 0.8], [0.0, 0.0], [1.0, 0.0]]))
    got.sum().backward()
    assert rows.grad.isfinite().all() and torch.equal(rows.grad[1], torch.zeros(2))
    far = (normal(6, 3).float() + 1e4)[[0, 1, 2, 0, 4, 5]]
    torch.testing.assert_close(row_distances(far), torch.cdist(far.double(), far.double()).square())
    assert row_distances(far)[0, 3] == 0


# Correlation congruence, similarity preserving.


@pytest.mark.parametrize("kernel", ["gaussian", "bilinear"])
def test_correlations_are_those_of_torchdistill(kernel: str) -> None:
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    student, teacher = normal(7, 4), normal(7, 6, seed=1)
    config = {"type": kernel, "gamma": 0.4, "max_p": 2}
    other = mid_level.CCKDLoss("s", "t", config, reduction="sum")
    # It takes embeddings as they come and has the root of the paper's squared norm.
    norm = other({"s": {"output": F.normalize(student)}}, {"t": {"output": F.normalize(teacher)}})
    got = correlation_congruence(student, teacher, kernel=kernel)
    assert got.item() == pytest.approx(norm.item() ** 2 / 7**2, rel=1e-5)


def test_taylor_series_tends_to_the_gaussian_kernel() -> None:
    student, teacher = normal(7, 4), normal(7, 6, seed=1)
    kernels = [torch.exp(-0.4 * torch.cdist(F.normalize(x), F.normalize(x)).square()) for x in (student, teacher)]
    got = correlation_congruence(student, teacher, order=20, reduction="none")
    torch.testing.assert_close(got, (kernels[0] - kernels[1]).square().mean(1))


def test_similarities_have_rows_of_length_one_where_torchdistill_has_sums() -> None:
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    student, teacher = normal(7, 3, 2, 2), normal(7, 5, 4, 4, seed=1)
    grams = [x.flatten(1) @ x.flatten(1).T for x in (student, teacher)]
    by_norm = {p: sum_of_squares(*(F.normalize(g, p=p, dim=1) for g in grams)) / 7**2 for p in (1, 2)}
    other = mid_level.SPKDLoss("s", "t", reduction="batchmean")
    # It calls normalize(gram, 1), whose second argument is p: an L1 norm, where the paper's is L2.
    want = other({"s": {"output": student}}, {"t": {"output": teacher}}).item()
    assert want == pytest.approx(by_norm[1], rel=1e-5)
    assert similarity_preserving(student, teacher).item() == pytest.approx(by_norm[2], rel=1e-9)


def sum_of_squares(a: Tensor, b: Tensor) -> float:
    return (a - b).square().sum().item()


def test_options_out_of_range_are_named() -> None:
    x = normal(5, 4)
    for call, message in (
        (lambda: correlation_congruence(x, x, kernel="laplace"), "kernel: wanted one of gaussian, bilinear, got 'lapl"),
        (lambda: correlation_congruence(x, x, gamma=0.0), "gamma: wanted a finite number > 0, got 0"),
        (lambda: correlation_congruence(x, x, order=0), "order: wanted at least 1, got 0"),
        (lambda: darkrank_hard(x, x, beta=0.5), "beta: wanted a finite number >= 1, got 0.5"),
        (lambda: darkrank_soft(x, x, length=7), r"length: wanted 2\.\.6, got 7"),
        (lambda: darkrank_soft(x, x, alpha=-1.0), "alpha: wanted a finite number > 0, got -1"),
        (lambda: graph_relations(x, x, heads=3), "student: wanted a width that is a multiple of 3 heads, got 4"),
        (lambda: graph_relations(x, x, temperature=0.0), "temperature: wanted a finite number > 0, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# DarkRank.


def test_chances_of_all_rankings_sum_to_one() -> None:
    # One student; for every order of the other rows a teacher, rows on an arc, that has that order.
    student = normal(4, 3)
    total = 0.0
    for order in permutations(range(3)):
        angles = torch.tensor([0.0, *(0.3 * (order.index(i) + 1) for i in range(3))], dtype=torch.float64)
        teacher = torch.stack([angles.cos(), angles.sin()], 1)
        total += math.exp(-darkrank_hard(student, teacher, reduction="none")[0].item())
    assert total == pytest.approx(1)


def test_hard_ranking_falls_as_the_student_separates_the_teachers_order() -> None:
    angles = torch.linspace(0, 1, 6, dtype=torch.float64) ** 2
    rows = torch.stack([angles.cos(), angles.sin()], 1)
    losses = [darkrank_hard(rows, rows, alpha=alpha).item() for alpha in (1.0, 10.0, 1e3)]
    assert losses == sorted(losses, reverse=True)
    assert darkrank_hard(rows, rows, alpha=1e7).item() == pytest.approx(0, abs=1e-6)
    assert darkrank_hard(torch.ones_like(rows), rows).item() == pytest.approx(math.log(math.factorial(5)))


def test_soft_ranking_is_a_divergence_of_enumerated_chances() -> None:
    # Two candidates: a Bernoulli choice with the difference of the scores as logit.
    student, teacher = normal(3, 4), normal(3, 4, seed=1)

    def first_is_chosen(rows: Tensor) -> float:
        scores = -3 * torch.cdist(F.normalize(rows), F.normalize(rows))[0] ** 3
        return torch.sigmoid(scores[1] - scores[2]).item()

    p, q = first_is_chosen(teacher), first_is_chosen(student)
    want = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert darkrank_soft(student, teacher, reduction="none")[0].item() == pytest.approx(want)


def test_lists_shorten_with_the_valid_rows() -> None:
    student, teacher = normal(6, 4), normal(6, 4, seed=1)
    for count in (1, 2, 3, 4):
        mask = torch.arange(6) >= 6 - count
        got = darkrank_soft(student.masked_fill(~mask[:, None], torch.nan), teacher, length=5, mask=mask)
        torch.testing.assert_close(got, darkrank_soft(student[mask], teacher[mask], length=5))
        assert (got.item() == pytest.approx(0, abs=1e-15)) == (count < 3)


# Graph.


def test_one_head_is_attention_of_all_channels() -> None:
    student, teacher = normal(5, 4), normal(5, 6, seed=1)
    diagonal = torch.eye(5, dtype=torch.bool)
    q, p = (
        (F.normalize(x) @ F.normalize(x).T / 0.1).masked_fill(diagonal, -torch.inf).softmax(1)
        for x in (student, teacher)
    )
    want = torch.special.xlogy(p, p / q.masked_fill(diagonal, 1.0)).sum(1)
    torch.testing.assert_close(graph_relations(student, teacher, heads=1, reduction="none"), want)
    halves = [
        graph_relations(student[:, a : a + 2], teacher[:, b : b + 3], heads=1, reduction="none")
        for a, b in ((0, 0), (2, 3))
    ]
    torch.testing.assert_close(graph_relations(student, teacher, heads=2, reduction="none"), sum(halves) / 2)


def test_large_batches_need_no_cube() -> None:
    student = torch.randn(256, 512, requires_grad=True)
    for loss in (similarity_preserving, correlation_congruence, darkrank_hard, darkrank_soft, graph_relations):
        loss(student, torch.randn(256, 64)).backward()
    assert student.grad.isfinite().all()
