"""Losses between transformer layers: padding of both time axes, heads, mappings by hand, and the papers' identities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcore.losses import (
    LayerMapping,
    attended_layers,
    attention_matrices,
    hidden_states,
    map_layers,
    soft_targets,
    value_relations,
)
from tests.kdcore.losses.references.layers import ref_attention

LENGTHS = torch.tensor([4, 2, 1])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Padding.

Case = tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...], tuple[int, ...], dict[str, Any]]
# the loss, the shapes of a row of student and teacher, the axes of time, the options
CASES: list[Case] = [
    (attention_matrices, (2, 4, 4), (2, 4, 4), (2, 3), {}),
    (attention_matrices, (2, 4, 4), (3, 4, 4), (2, 3), {}),
    (attention_matrices, (2, 4, 4), (2, 4, 4), (2, 3), {"divergence": "mse"}),
    (attention_matrices, (2, 4, 4), (3, 4, 4), (2, 3), {"divergence": "mse"}),
    (value_relations, (4, 6), (4, 2), (1,), {"heads": 2}),
    (hidden_states, (2, 4, 3), (4, 4, 3), (2,), {}),
    (hidden_states, (2, 4, 3), (4, 4, 3), (2,), {"normalised": True}),
    (LayerMapping(2, 4, 3, 5).double(), (2, 4, 3), (4, 4, 5), (2,), {}),
]
cases = pytest.mark.parametrize(("loss", "student_shape", "teacher_shape", "axes", "options"), CASES)


def cut(values: Tensor, axes: tuple[int, ...], length: int) -> Tensor:
    for axis in axes:
        values = values.narrow(axis, 0, length)
    return values


@cases
def test_a_padded_row_equals_the_row_cut_to_its_length(
    loss: Any, student_shape: Any, teacher_shape: Any, axes: Any, options: Any
) -> None:
    student, teacher = normal(3, *student_shape), normal(3, *teacher_shape, seed=1)
    padded = []
    for values in (student, teacher):
        inside = torch.zeros_like(values, dtype=torch.bool)
        for b, length in enumerate(LENGTHS.tolist()):
            cut(inside[b : b + 1], axes, length).fill_(True)
        padded.append(values.masked_fill(~inside, torch.nan).requires_grad_())
    got = loss(*padded, LENGTHS, **options, reduction="none")
    got.sum().backward()
    for b, length in enumerate(LENGTHS.tolist()):
        row = cut(student[b : b + 1], axes, length).clone().requires_grad_()
        want = loss(row, cut(teacher[b : b + 1], axes, length), **options, reduction="none")
        torch.testing.assert_close(got[b : b + 1], want)
        want.sum().backward()
        gradient = padded[0].grad[b : b + 1]
        torch.testing.assert_close(cut(gradient, axes, length), row.grad)
        assert gradient.count_nonzero() == row.grad.count_nonzero()


@cases
def test_a_row_of_length_zero_does_not_count(
    loss: Any, student_shape: Any, teacher_shape: Any, axes: Any, options: Any
) -> None:
    student, teacher = normal(3, *student_shape), normal(3, *teacher_shape, seed=1)
    got = loss(student, teacher, torch.tensor([4, 0, 3]), **options)
    keep = torch.tensor([0, 2])
    torch.testing.assert_close(got, loss(student[keep], teacher[keep], torch.tensor([4, 3]), **options))
    nothing = loss(student.requires_grad_(), teacher, torch.zeros(3, dtype=torch.int64), **options)
    nothing.backward()
    assert nothing.item() == 0 and not student.grad.any()


@cases
def test_no_lengths_are_full_lengths(
    loss: Any, student_shape: Any, teacher_shape: Any, axes: Any, options: Any
) -> None:
    student, teacher = normal(3, *student_shape), normal(3, *teacher_shape, seed=1)
    full = torch.full((3,), 4)
    torch.testing.assert_close(loss(student, teacher, **options), loss(student, teacher, full, **options))
    for wrong, message in (
        (full.int(), r"lengths: wanted int64 numbers of positions, got torch.int32"),
        (full[:2], r"lengths: wanted shape \(3,\), got \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(student, teacher, wrong, **options)


# Attention.


@pytest.mark.parametrize("divergence", ["kl", "mse"])
def test_other_numbers_of_heads_compare_the_means(divergence: Any) -> None:
    student, teacher = normal(3, 2, 4, 4), normal(3, 3, 4, 4, seed=1)
    got = attention_matrices(student, teacher, LENGTHS, divergence=divergence, reduction="none")
    want = [ref_attention(student[b].tolist(), teacher[b].tolist(), int(LENGTHS[b]), divergence) for b in range(3)]
    assert got.tolist() == pytest.approx(want, rel=1e-9)


def test_attention_is_soft_targets_of_each_query() -> None:
    student, teacher = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    want = soft_targets(student.flatten(0, 2), teacher.flatten(0, 2))
    torch.testing.assert_close(attention_matrices(student, teacher), want)
    # log-probabilities are scores as well
    logs = student.log_softmax(3), teacher.log_softmax(3)
    torch.testing.assert_close(attention_matrices(*logs), want)


@pytest.mark.parametrize("divergence", ["kl", "mse"])
@pytest.mark.parametrize("heads", [2, 3])
def test_causal_scores_equal_the_lower_triangle(divergence: Any, heads: int) -> None:
    student, teacher = normal(2, 2, 4, 4), normal(2, heads, 4, 4, seed=1)
    later = torch.ones(4, 4, dtype=torch.bool).triu(1)
    causal = student.masked_fill(later, -torch.inf).requires_grad_()
    got = attention_matrices(causal, teacher.masked_fill(later, -torch.inf), divergence=divergence)
    if divergence == "kl":
        rows = [
            attention_matrices(
                student[..., q, None, : q + 1].expand(-1, -1, q + 1, -1),
                teacher[..., q, None, : q + 1].expand(-1, -1, q + 1, -1),
            )
            for q in range(4)
        ]
        want = torch.stack(rows).mean()
    else:
        s, t = (student, teacher) if heads == 2 else (student.mean(1), teacher.mean(1))
        want = (s - t).square()[..., ~later].mean()
    torch.testing.assert_close(got, want)
    (gradient,) = torch.autograd.grad(got, causal)
    assert gradient.isfinite().all() and not gradient[..., later].any()


# Relations of values.


def test_relations_do_not_see_a_rotation_within_a_head() -> None:
    student, teacher = normal(3, 4, 6), normal(3, 4, 6, seed=1)
    rotations = torch.block_diag(*(torch.linalg.qr(normal(3, 3, seed=s)).Q for s in (2, 3)))
    for heads in (1, 2):
        got = value_relations(student @ rotations, teacher, LENGTHS, heads=heads)
        torch.testing.assert_close(got, value_relations(student, teacher, LENGTHS, heads=heads))


def test_relations_by_heads() -> None:
    student, teacher = normal(3, 4, 6), normal(3, 4, 4, seed=1)
    halves = [value_relations(student[..., 3 * h : 3 * h + 3], teacher[..., 2 * h : 2 * h + 2]) for h in (0, 1)]
    torch.testing.assert_close(value_relations(student, teacher, heads=2), sum(halves) / 2)
    with pytest.raises(ValueError, match=r"heads: wanted a divisor of the width of teacher, 4, got 3"):
        value_relations(student, teacher, heads=3)


# Mappings.


@pytest.mark.parametrize(
    ("sizes", "strategy", "want"),
    [
        ((4, 12), "uniform", (2, 5, 8, 11)),  # TinyBERT: g(m) = 3 m
        ((6, 12), "uniform", (1, 3, 5, 7, 9, 11)),
        ((3, 10), "uniform", (2, 6, 9)),
        ((1, 12), "uniform", (11,)),
        ((6, 12), "skip", (1, 3, 5, 7, 9, 11)),  # PKD-Skip: {2, 4, 6, 8, 10} and the top
        ((3, 10), "skip", (2, 5, 8)),
        ((5, 11), "skip", (1, 3, 5, 7, 9)),  # PKD-Skip as printed, the tops left out
        ((5, 11), "last", (6, 7, 8, 9, 10)),  # PKD-Last as printed: {7, 8, 9, 10, 11}
        ((3, 3), "uniform", (0, 1, 2)),
        ((3, 3), "skip", (0, 1, 2)),
        ((3, 3), "last", (0, 1, 2)),
    ],
)
def test_layers_by_hand(sizes: tuple[int, int], strategy: Any, want: tuple[int, ...]) -> None:
    assert map_layers(*sizes, strategy) == want


def test_layers_rise_within_the_teacher() -> None:
    for n_teacher in range(1, 30):
        for n_student in range(1, n_teacher + 1):
            for strategy in ("uniform", "skip", "last"):
                layers = map_layers(n_student, n_teacher, strategy)  # type: ignore[arg-type]
                assert list(layers) == sorted(set(layers)) and len(layers) == n_student
                assert layers[0] >= 0 and layers[-1] <= n_teacher - 1
            assert map_layers(n_student, n_teacher)[-1] == n_teacher - 1


def test_wrong_mappings_are_named() -> None:
    for wrong in (0, 5):
        with pytest.raises(ValueError, match=rf"n_student: wanted 1..4 \(n_teacher\), got {wrong}"):
            map_layers(wrong, 4)
    with pytest.raises(ValueError, match=r"strategy: wanted one of uniform, skip, last, got 'first'"):
        map_layers(2, 4, "first")  # type: ignore[arg-type]
    student, teacher = normal(3, 2, 4, 3), normal(3, 4, 4, 3)
    for layers in ((0,), (0, 4), (-1, 2)):
        with pytest.raises(ValueError, match=r"layers: wanted 2 indices in 0..3, got"):
            hidden_states(student, teacher, layers=layers)
    with pytest.raises(ValueError, match=r"divergence: wanted one of kl, mse, got 'js'"):
        attention_matrices(normal(1, 1, 2, 2), normal(1, 1, 2, 2), divergence="js")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"n_teacher: wanted at least 1, got 0"):
        LayerMapping(2, 0, 3, 3)


def test_normalised_states_do_not_see_the_scale() -> None:
    student, teacher = normal(3, 2, 4, 3), normal(3, 4, 4, 3, seed=1)
    got = hidden_states(student * 7, teacher, LENGTHS, normalised=True)
    torch.testing.assert_close(got, hidden_states(student, teacher, LENGTHS, normalised=True))
    right_angle = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2), torch.tensor([0.0, 5.0]).view(1, 1, 1, 2)
    assert hidden_states(*right_angle, normalised=True).item() == pytest.approx(2)


def test_attended_layers_of_one_teacher_layer_are_an_mse() -> None:
    student, teacher = normal(3, 2, 5), normal(3, 1, 5, seed=1)
    torch.testing.assert_close(attended_layers(student, teacher), (student - teacher).square().mean())


def test_attended_layers_find_the_layer_that_is_alike() -> None:
    teacher = 10 * torch.eye(4, dtype=torch.float64)[None]
    assert attended_layers(teacher[:, [2, 0]], teacher).item() == pytest.approx(0, abs=1e-12)


def test_even_and_certain_weights() -> None:
    mapping = LayerMapping(2, 4, 3, 3).double()
    student, teacher = normal(3, 2, 4, 3), normal(3, 4, 4, 3, seed=1)
    even = teacher.mean(1, keepdim=True).expand(-1, 2, -1, -1)
    torch.testing.assert_close(mapping(student, teacher, LENGTHS), hidden_states(student, even, LENGTHS))
    with torch.no_grad():
        mapping.logits[0, 3] = mapping.logits[1, 0] = 1e4
    want = hidden_states(student, teacher, LENGTHS, layers=(3, 0))
    torch.testing.assert_close(mapping(student, teacher, LENGTHS), want)


def test_the_mapping_learns_which_layer_is_alike() -> None:
    mapping = LayerMapping(2, 4, 3, 3)
    teacher = normal(16, 4, 4, 3).float()
    optimizer = torch.optim.Adam(mapping.parameters(), 0.1)
    for _ in range(200):
        optimizer.zero_grad()
        mapping(teacher[:, [1, 3]], teacher).backward()
        optimizer.step()
    assert mapping.weights().argmax(1).tolist() == [1, 3]
    torch.testing.assert_close(mapping.weights().sum(1), torch.ones(2))
