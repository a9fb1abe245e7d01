"""Weighted sums of terms: what each is given, what is counted, what a weight of zero means, and losses with memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcore.losses import ContrastiveRepresentation
from kdcore.teaching import Schedule, Term, Terms, labels_term, switched_on, warm_up
from tests.kdcore.teaching.problems import kl

GENERATOR = torch.Generator().manual_seed(3)
VALUES = {
    "student": torch.randn(6, 4, generator=GENERATOR),
    "teacher": torch.randn(6, 4, generator=GENERATOR),
    "labels": torch.tensor([0, 1, 2, 3, 0, 1]),
    "some": torch.tensor([True, False, True, True, False, False]),
}


class Counting(nn.Module):
    """A loss with a weight, that counts its calls and keeps what its update is told."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.calls = 0
        self.told: list[dict[str, Tensor]] = []

    def forward(self, student: Tensor, *, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
        self.calls += 1
        rows = (self.scale * student).square().sum(1)
        return rows.sum() if mask is None else rows[mask].sum()

    def update(self, student: Tensor, index: Tensor) -> None:
        self.told.append({"student": student, "index": index})


def test_every_term_is_the_sum_over_rows_of_its_loss() -> None:
    terms = Terms(
        [
            labels_term(0.5),
            Term("soft", "soft_targets", options={"temperature": 3.0}),
            Term("masked", "soft_targets", inputs={"mask": "some"}),
            Term("swapped", "soft_targets", inputs={"student": "teacher", "teacher": "student"}),
        ]
    )
    found = terms(VALUES)
    student, teacher = VALUES["student"], VALUES["teacher"]
    wanted = {
        "cross_entropy": F.cross_entropy(student, VALUES["labels"], reduction="sum"),
        "soft": kl(teacher, student, 3.0).sum().float(),
        "masked": kl(teacher, student)[VALUES["some"]].sum().float(),
        "swapped": kl(student, teacher).sum().float(),
    }
    torch.testing.assert_close(found, wanted)
    assert terms.weights == {"cross_entropy": 0.5, "soft": 1.0, "masked": 1.0, "swapped": 1.0}
    assert terms.counts(VALUES, 6) == {"cross_entropy": 6, "soft": 6, "masked": 3, "swapped": 6}


def test_a_mask_of_elements_counts_rows_with_any() -> None:
    terms = Terms([Term("binary", "binary_soft_targets", inputs={"mask": "elements"})])
    elements = torch.zeros(6, 4, dtype=torch.bool)
    elements[1, 2] = elements[1, 3] = elements[4, 0] = True
    assert terms.counts({"elements": elements}, 6) == {"binary": 2}


def test_a_mask_that_cannot_be_counted_is_an_error_and_no_wrong_mean() -> None:
    terms = Terms([Term("soft", "soft_targets", inputs={"mask": "later"})])
    with pytest.raises(ValueError, match=r"soft: wants the value 'later', got labels, some, student, teacher"):
        terms.counts(VALUES, 6)


def test_weights_follow_the_epoch_and_are_restored_with_the_state() -> None:
    def make() -> Terms:
        return Terms([labels_term(), Term("soft", "soft_targets", weight=Schedule(0.1, 0.9, "cosine", epochs=7))])

    terms = make()
    assert terms.weights == {"cross_entropy": 1.0, "soft": 0.1}
    terms.begin_epoch(3)
    wanted = 0.1 + 0.8 * (1 - math.cos(math.pi * 3 / 7)) / 2
    assert terms.weights["soft"] == wanted, "in float64"
    again = make()
    assert again.weights["soft"] == 0.1
    again.load_state_dict(terms.state_dict())
    assert again.weights["soft"] == wanted
    assert again.to("meta").epoch.dtype == torch.int64, "float64 does not live on every device"


def test_a_term_of_weight_zero_is_not_computed_and_stays_in_the_graph() -> None:
    counting = Counting()
    terms = Terms([Term("counted", counting, inputs={"index": "labels"}, weight=switched_on(1.0, 2))]).train()
    student = VALUES["student"].clone().requires_grad_()
    found = terms({**VALUES, "student": student})["counted"]
    assert found.item() == 0.0 and found.dim() == 0
    assert counting.calls == 0 and counting.told == []
    found.backward()
    assert counting.scale.grad is not None and float(counting.scale.grad) == 0.0
    assert student.grad is not None and not student.grad.any()
    terms.begin_epoch(2)
    terms({**VALUES, "student": student})["counted"].backward()
    assert counting.calls == 1 and float(counting.scale.grad) != 0 and student.grad.any()


def test_zero_is_zero_where_the_values_are_infinite() -> None:
    student = torch.full((2, 4), -math.inf, requires_grad=True)
    terms = Terms([Term("soft", "soft_targets", weight=warm_up(1.0, 4))])
    found = terms({"student": student, "teacher": torch.zeros(2, 4)})["soft"]
    found.backward()
    assert found.item() == 0.0 and student.grad is not None and not student.grad.any()


def test_losses_with_weights_are_submodules_and_are_told_the_valid_rows_in_training() -> None:
    counting = Counting()
    terms = Terms([Term("counted", counting, inputs={"index": "labels", "mask": "some"})])
    assert [name for name, _ in terms.named_parameters()] == ["modules_of_terms.counted.scale"]
    terms.eval()(VALUES)
    assert counting.told == []
    student = VALUES["student"].clone().requires_grad_()
    terms.train()({**VALUES, "student": student})
    (told,) = counting.told
    assert told["index"].tolist() == [0, 2, 3]
    torch.testing.assert_close(told["student"], VALUES["student"][VALUES["some"]])
    assert not told["student"].requires_grad


def test_the_memory_of_the_contrastive_loss_follows_the_rows_it_saw() -> None:
    loss = ContrastiveRepresentation(4, 4, 20, dim=3, generator=torch.Generator().manual_seed(0))
    contrast = torch.randint(20, (6, 5), generator=torch.Generator().manual_seed(1))
    index = torch.tensor([2, 4, 6, 8, 10, 12])
    loss.estimate_constants(VALUES["student"], VALUES["teacher"], contrast)
    terms = Terms([Term("contrast", loss, inputs={"indices": "index"})]).train()
    before = loss.student_bank.clone()
    terms({**VALUES, "contrast": contrast, "index": index})["contrast"].backward()
    moved = (loss.student_bank != before).any(1).nonzero()[:, 0]
    assert moved.tolist() == index.tolist()
    assert loss.student_head.weight.grad is not None and loss.student_head.weight.grad.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Terms([]), r"terms: wanted at least one, .*got \[\]"),
        (lambda: Terms([labels_term(), labels_term()]), r"terms: wanted .* a name of its own.*cross_entropy"),
        (lambda: Terms([Term("a.b", "soft_targets")]), r"terms: wanted .*no dot, got \['a.b'\]"),
        (lambda: Terms([Term("soft", "soft_target")]), r"got the unknown name 'soft_target'; the nearest are soft_tar"),
        (lambda: Terms([Term("c", "contrastive_representation")]), r"c: .* has parameters of its own; give an inst"),
        (
            lambda: Terms([Term("soft", "soft_targets", inputs={"studnet": "student"})]),
            r"soft: the loss takes no studnet; it takes student, teacher",
        ),
        (lambda: Terms([Term("none", lambda *, reduction="sum": torch.zeros(()))]), r"none: the loss is given no tens"),
        (lambda: Terms([Term("soft", "soft_targets", weight=-1.0)]), r"start: wanted a finite weight >= 0, got -1.0"),
        (
            lambda: Terms([Term("soft", "soft_targets")])({"student": VALUES["student"]}),
            r"soft: wants the value 'teacher', got student$",
        ),
        (
            lambda: Terms([Term("soft", "soft_targets", options={"temperature": 0.0})])(VALUES),
            r"^soft: temperature: wanted a finite number > 0, got 0.0",
        ),
        (
            lambda: Terms([Term("soft", "soft_targets")])({**VALUES, "teacher": torch.zeros(6, 5)}),
            r"^soft: teacher: wanted shape \(6, 4\), got \(6, 5\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
