"""Response losses against torch's and scipy's own, and the identities their papers state."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr
from scipy.special import softmax as scipy_softmax
from torch import Tensor
from torch.nn import functional as F

from kdcore.losses import (
    binary_soft_targets,
    confidence_penalty,
    decoupled,
    label_smoothing,
    logit_mse,
    normalised,
    regression,
    soft_targets,
    sparse_soft_targets,
)

seeds = st.integers(0, 2**31)
law = settings(max_examples=25, deadline=None)


def pair(rows: int = 7, classes: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, rows, classes, generator=generator, dtype=torch.float64) * 3
    return draw[0].clone().requires_grad_(), draw[1].clone()


def test_forward_equals_kl_div_and_scipy() -> None:
    student, teacher = pair()
    got = soft_targets(student, teacher, temperature=2.0)
    log_q, log_p = (student / 2).log_softmax(1), (teacher / 2).log_softmax(1)
    torch.testing.assert_close(got, 4 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean"))
    p, q = scipy_softmax(teacher.numpy() / 2, 1), scipy_softmax(student.detach().numpy() / 2, 1)
    assert got.item() == pytest.approx(4 * rel_entr(p, q).sum(1).mean())


def test_reverse_is_forward_with_the_roles_swapped() -> None:
    student, teacher = pair()
    got = soft_targets(student, teacher, temperature=2.0, direction="reverse")
    torch.testing.assert_close(got.detach(), soft_targets(teacher, student.detach(), temperature=2.0))


@given(seed=seeds, temperature=st.floats(0.2, 5))
@law
def test_symmetric_directions(seed: int, temperature: float) -> None:
    student, teacher = pair(seed=seed)
    a, b = student.detach(), teacher
    for direction in ("symmetric", "jensen_shannon"):
        there = soft_targets(a, b, temperature=temperature, direction=direction, reduction="none")
        back = soft_targets(b, a, temperature=temperature, direction=direction, reduction="none")
        torch.testing.assert_close(there, back)
    assert (there <= temperature**2 * math.log(2) + 1e-12).all()


def test_the_gradient_keeps_its_size_when_the_temperature_grows() -> None:
    student, teacher = pair()
    for temperature in (1e2, 1e3, 1e4):
        (gradient,) = torch.autograd.grad(soft_targets(student, teacher, temperature=temperature), student)
        # Hinton et al., section 2.1: the limit is that of the mean over classes of (s - t)^2 / 2, logits centred.
        limit = ((student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))) / 9 / 7
        assert (gradient - limit).abs().max() < 5 / temperature


def test_high_temperature_tends_to_the_logit_regression() -> None:
    student, teacher = pair()
    a, b = student - student.mean(1, keepdim=True), teacher - teacher.mean(1, keepdim=True)
    got = soft_targets(student, teacher, temperature=1e4)
    torch.testing.assert_close(got, logit_mse(a, b) / 2, rtol=1e-2, atol=0)


@pytest.mark.parametrize("direction", ["forward", "reverse", "symmetric", "jensen_shannon"])
def test_classes_excluded_by_minus_infinity_are_dropped(direction: str) -> None:
    student, teacher = pair()
    hidden = torch.zeros(9, dtype=torch.bool)
    hidden[[2, 5]] = True
    got = soft_targets(
        student.masked_fill(hidden, -torch.inf), teacher.masked_fill(hidden, -torch.inf), direction=direction
    )
    want = soft_targets(student[:, ~hidden], teacher[:, ~hidden], direction=direction)
    torch.testing.assert_close(got, want)
    (got_gradient,) = torch.autograd.grad(got, student)
    (want_gradient,) = torch.autograd.grad(want, student)
    torch.testing.assert_close(got_gradient, want_gradient)


def test_teacher_mass_on_an_excluded_class_is_infinite_not_hidden() -> None:
    student, teacher = pair()
    excluded = torch.arange(9) == 3
    assert soft_targets(student.masked_fill(excluded, -torch.inf), teacher).item() == math.inf


def test_chunks_bound_the_memory_kept_for_the_backward_pass() -> None:
    student, teacher = pair(rows=64, classes=50)

    def kept(chunk_size: int | None) -> int:
        sizes: list[int] = []
        inputs = {t.untyped_storage().data_ptr() for t in (student, teacher)}

        def pack(values: Tensor) -> Tensor:
            if values.untyped_storage().data_ptr() not in inputs:
                sizes.append(values.numel())
            return values

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values):
            soft_targets(student, teacher, chunk_size=chunk_size)
        return sum(sizes)

    # Unchunked keeps one [B, C] array; in chunks nothing of that size stays beside the inputs themselves.
    assert kept(None) >= student.numel()
    assert kept(8) == 0


def kept(teacher: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    log_probs, items = (teacher / temperature).log_softmax(1).topk(k, 1)
    return items, log_probs


@given(seed=seeds, temperature=st.floats(0.3, 5))
@law
def test_sparse_soft_targets_grow_to_the_dense_ones(seed: int, temperature: float) -> None:
    student, teacher = pair(seed=seed)
    dense = soft_targets(student, teacher, temperature=temperature, reduction="none")
    last = torch.zeros_like(dense)
    for k in (1, 3, 8, 9):
        items, log_probs = kept(teacher, k, temperature)
        value = sparse_soft_targets(student, items, log_probs, temperature=temperature, reduction="none")
        assert (value >= last - 1e-10).all() and (value <= dense + 1e-10).all()
        last = value
    torch.testing.assert_close(last, dense)
    (want,) = torch.autograd.grad(dense.sum(), student)
    (got,) = torch.autograd.grad(last.sum(), student)
    torch.testing.assert_close(got, want)


def test_sparse_soft_targets_put_invalid_classes_into_the_lump() -> None:
    student, teacher = pair()
    items, log_probs = kept(teacher, 5)
    mask = torch.arange(5) < torch.tensor([[5], [4], [3], [2], [1], [5], [0]])
    padded = items.masked_fill(~mask, 0), log_probs.masked_fill(~mask, torch.nan)
    got = sparse_soft_targets(student, *padded, mask=mask, reduction="none")
    want = [
        sparse_soft_targets(student[b : b + 1], items[b : b + 1, mask[b]], log_probs[b : b + 1, mask[b]])
        for b in range(6)
    ]
    torch.testing.assert_close(got, torch.stack([*want, torch.zeros_like(want[0])]))
    torch.testing.assert_close(sparse_soft_targets(student, *padded, mask=mask), sum(want) / 6)


def test_sparse_soft_targets_of_all_classes_in_float32_leave_no_mass_over() -> None:
    # In float32 the probabilities of a row sum to 1 only up to rounding; the rest is in no class at all.
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(200, 300, generator=generator)
    student = torch.randn(200, 300, generator=generator, requires_grad=True)
    items, log_probs = kept(teacher, 300)
    value = sparse_soft_targets(student, items, log_probs)
    value.backward()
    torch.testing.assert_close(value, soft_targets(student, teacher))
    assert student.grad.isfinite().all()


@given(seed=seeds, temperature=st.floats(0.3, 5))
@law
def test_renormalised_sparse_soft_targets_are_dense_ones_over_the_kept(seed: int, temperature: float) -> None:
    student, teacher = pair(seed=seed)
    items, log_probs = kept(teacher, 4, temperature)
    options = {"temperature": temperature, "reduction": "none"}
    want = soft_targets(student.gather(1, items), teacher.gather(1, items), **options)
    got = sparse_soft_targets(student, items, log_probs, rest="renormalise", **options)
    torch.testing.assert_close(got, want)
    mask = torch.arange(4) < torch.tensor([[3]] * 6 + [[0]])
    padded = items.masked_fill(~mask, -1), log_probs.masked_fill(~mask, torch.nan)
    got = sparse_soft_targets(student, *padded, rest="renormalise", mask=mask, **options)
    want = sparse_soft_targets(student, items[:, :3], log_probs[:, :3], rest="renormalise", **options)
    torch.testing.assert_close(got, want * mask[:, 0])
    (gradient,) = torch.autograd.grad(got.sum(), student)
    assert gradient.isfinite().all() and torch.equal(gradient[6], torch.zeros(9).double())


def test_mse_and_huber_equal_torch() -> None:
    student, teacher = pair()
    torch.testing.assert_close(logit_mse(student, teacher), F.mse_loss(student, teacher))
    torch.testing.assert_close(regression(student, teacher), F.mse_loss(student, teacher))
    torch.testing.assert_close(regression(student[:, 0], teacher[:, 0]), F.mse_loss(student[:, 0], teacher[:, 0]))
    torch.testing.assert_close(regression(student, teacher, delta=0.7), F.huber_loss(student, teacher, delta=0.7))


def test_huber_limits_what_one_outlier_pulls() -> None:
    student = torch.zeros(2, requires_grad=True)
    regression(student, torch.tensor([1e6, 0.1]), delta=1.0, reduction="sum").backward()
    torch.testing.assert_close(student.grad, torch.tensor([-1.0, -0.1]))


@given(seed=seeds, temperature=st.floats(0.5, 5))
@law
def test_binary_equals_two_class_soft_targets(seed: int, temperature: float) -> None:
    student, teacher = pair(seed=seed)
    got = binary_soft_targets(student, teacher, temperature=temperature, reduction="sum")
    two_student = torch.stack([student.flatten(), torch.zeros_like(student).flatten()], 1)
    two_teacher = torch.stack([teacher.flatten(), torch.zeros_like(teacher).flatten()], 1)
    torch.testing.assert_close(got, soft_targets(two_student, two_teacher, temperature=temperature, reduction="sum"))
    flat = binary_soft_targets(student.flatten(), teacher.flatten(), temperature=temperature, reduction="sum")
    torch.testing.assert_close(got, flat)


@given(seed=seeds, temperature=st.floats(0.5, 5))
@law
def test_decoupled_with_beta_of_the_teacher_is_soft_targets(seed: int, temperature: float) -> None:
    # Zhao et al., equation 7: KD = TCKD + (1 - p_target) NCKD.
    student, teacher = pair(seed=seed)
    labels = torch.randint(9, (7,), generator=torch.Generator().manual_seed(seed))
    options = {"temperature": temperature, "reduction": "none"}
    target = decoupled(student, teacher, labels, alpha=1.0, beta=0.0, **options)
    others = decoupled(student, teacher, labels, alpha=0.0, beta=1.0, **options)
    probability = (teacher / temperature).softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(target + (1 - probability) * others, soft_targets(student, teacher, **options))


def test_decoupled_still_teaches_when_the_teacher_is_certain() -> None:
    teacher = torch.tensor([[1000.0, 3.0, 1.0, -2.0]])
    student = torch.tensor([[1000.0, 0.0, 0.0, 0.0]], requires_grad=True)
    value = decoupled(student, teacher, torch.tensor([0]), temperature=1.0)
    value.backward()
    want = 8 * F.kl_div(torch.full((3,), 1 / 3).log(), teacher[0, 1:].softmax(0), reduction="sum")
    torch.testing.assert_close(value, want)
    assert student.grad.isfinite().all() and student.grad[0, 1:].abs().min() > 0.1


@given(seed=seeds, temperature=st.floats(0.5, 5))
@law
def test_the_second_part_of_normalised_is_that_of_decoupled(seed: int, temperature: float) -> None:
    # Both normalise over the other classes: the cross-entropy here is the divergence there and the teacher's entropy.
    student, teacher = pair(seed=seed)
    labels = torch.randint(9, (7,), generator=torch.Generator().manual_seed(seed))
    options = {"temperature": temperature, "reduction": "none"}
    first = normalised(student, teacher, labels, gamma=0.0, **options)
    second = normalised(student, teacher, labels, gamma=1.0, **options) - first
    others = decoupled(student, teacher, labels, alpha=0.0, beta=1.0, **options)
    (got,) = torch.autograd.grad(second.sum(), student, retain_graph=True)
    (want,) = torch.autograd.grad(others.sum(), student)
    torch.testing.assert_close(got, want)
    assert (second >= others).all()
    sure = torch.full_like(teacher, -1e4).scatter(1, labels[:, None], 0.0)
    torch.testing.assert_close(
        normalised(student, sure, labels, gamma=0.0), F.cross_entropy(student, labels), msg="a teacher that is sure"
    )


def test_normalised_with_two_classes_and_a_certain_teacher() -> None:
    student = torch.tensor([[1.0, -2.0]], requires_grad=True)
    value = normalised(student, torch.tensor([[500.0, -500.0]]), torch.tensor([0]), temperature=2.0)
    value.backward()
    torch.testing.assert_close(value, F.cross_entropy(student, torch.tensor([0])))
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_equals_torch(smoothing: float) -> None:
    student, _ = pair()
    labels = torch.arange(7)
    got = label_smoothing(student, labels, smoothing=smoothing)
    torch.testing.assert_close(got, F.cross_entropy(student, labels, label_smoothing=smoothing))


def test_confidence_penalty_is_entropy_from_above() -> None:
    student, _ = pair()
    entropy = torch.distributions.Categorical(logits=student).entropy()
    torch.testing.assert_close(confidence_penalty(student, reduction="none"), math.log(9) - entropy)
    assert confidence_penalty(torch.full((2, 9), 5.0)).item() == pytest.approx(0, abs=1e-6)


def test_out_of_range_options_are_named() -> None:
    student, teacher = pair()
    labels = torch.zeros(7, dtype=torch.int64)
    wrong: list[tuple[str, object]] = [
        (r"temperature: wanted a finite number > 0, got 0", lambda: soft_targets(student, teacher, temperature=0)),
        (r"direction: .*got 'backward'", lambda: soft_targets(student, teacher, direction="backward")),
        (r"chunk_size: wanted at least 1, got 0", lambda: soft_targets(student, teacher, chunk_size=0)),
        (r"delta: wanted a finite number > 0, got -1", lambda: regression(student, teacher, delta=-1)),
        (r"alpha: wanted a finite number >= 0, got -1", lambda: decoupled(student, teacher, labels, alpha=-1)),
        (r"beta: .*got nan", lambda: decoupled(student, teacher, labels, beta=math.nan)),
        (r"gamma: wanted a finite number >= 0, got -1", lambda: normalised(student, teacher, labels, gamma=-1)),
        (
            r"rest: wanted one of lump, renormalise, got 'drop'",
            lambda: sparse_soft_targets(student, *kept(teacher, 3), rest="drop"),
        ),
        (r"labels: wanted int64", lambda: decoupled(student, teacher, labels.int())),
        (r"at least 2 classes, got 1", lambda: decoupled(student[:, :1], teacher[:, :1], labels)),
        (r"smoothing: wanted a number in 0..1, got 1.5", lambda: label_smoothing(student, labels, smoothing=1.5)),
        (
            r"items: wanted shape \(7, K <= 9\), got \(7, 10\)",
            lambda: sparse_soft_targets(student, torch.zeros(7, 10, dtype=torch.int64), torch.zeros(7, 10)),
        ),
        (r"items: wanted int64", lambda: sparse_soft_targets(student, labels[:, None].int(), torch.zeros(7, 1))),
        (r"teacher: wanted shape \(7, 9\), got \(7, 8\)", lambda: soft_targets(student, teacher[:, 1:])),
    ]
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="student: wanted a tensor, got list"):
        soft_targets([[1.0]], teacher)
