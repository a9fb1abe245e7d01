"""One student for the union of what several teachers know, each of them of other classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kdcore.losses import soft_targets
from kdcore.teaching.registry import teaching
from kdcore.teaching.step import DistillationStep, Learning, Validate
from kdcore.teaching.terms import Term
from kdcore.trainer import Batch


def union_of(class_sets: Sequence[Sequence[int]]) -> int:
    """Return the number of classes of the union.

    Raises:
        ValueError: a set of fewer than 2 classes (its teacher would be sure of every row) or with one twice, or the
            union is not 0..n-1.
    """
    if not class_sets or any(len(each) < 2 or len(set(each)) != len(each) for each in class_sets):
        raise ValueError(f"classes: wanted 2 or more distinct classes a teacher, got {class_sets}")
    union = sorted({each for classes in class_sets for each in classes})
    if union != list(range(len(union))):
        raise ValueError(f"classes: wanted every class of 0..{len(union) - 1} with some teacher, got {union}")
    return len(union)


def most_confident(logits: Sequence[Tensor], class_sets: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return, for every row, which teacher is surest, int64 [B], and the entropies of all, [M, B].

    Entropies are divided by the log of the number of classes, so that teachers of many classes are not at a
    disadvantage.

    Reference: Luo et al., Knowledge Amalgamation from Heterogeneous Networks, IJCAI 2019 (selective learning).
    """
    if len(logits) != len(class_sets) or not logits:
        raise ValueError(f"logits: wanted one set of classes a teacher, got {len(class_sets)} for {len(logits)}")
    entropies = []
    for own, classes in zip(logits, class_sets, strict=True):
        if own.shape[1] != len(classes):
            raise ValueError(f"logits: wanted {len(classes)} classes, got {own.shape[1]}")
        entropy = torch.special.entr(torch.softmax(own.detach().float(), 1)).sum(1)
        entropies.append(entropy / math.log(max(len(classes), 2)))
    stacked = torch.stack(entropies)
    return stacked.argmin(0), stacked


class CommonFeatures(nn.Module):
    """Projections of the students' and teachers' features [B, D] into one space, and back for the teachers.

    Its loss is the squared distance of the student's projection from each teacher's, and of what is rebuilt from the
    teachers' projections from their features (so that the space keeps what they know), a mean over values.

    Reference: Luo et al., 2019 (common feature learning; the distance stands for their MMD over a batch).
    """

    def __init__(self, student_width: int, teacher_widths: Sequence[int], width: int) -> None:
        super().__init__()
        self.student = nn.Linear(student_width, width)
        self.teachers = nn.ModuleList(nn.Linear(each, width) for each in teacher_widths)
        self.back = nn.ModuleList(nn.Linear(width, each) for each in teacher_widths)

    def forward(self, student: Tensor, teachers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the alignment and the rebuilding error, each summed over rows."""
        own = self.student(student)
        alignment, rebuilt = own.sum() * 0, own.sum() * 0
        for teacher, project, back in zip(teachers, self.teachers, self.back, strict=True):
            teacher = teacher.detach()
            common = project(teacher)
            alignment = alignment + (own - common).square().mean(1).sum()
            rebuilt = rebuilt + (back(common) - teacher).square().mean(1).sum()
        return alignment / len(teachers), rebuilt / len(teachers)


@teaching(
    "amalgamation",
    "step",
    "teachers of different classes; unlabelled rows; feature layers for the common space",
    "Shen et al., Amalgamating Knowledge towards Comprehensive Classification, AAAI 2019; Luo et al., IJCAI 2019",
)
class AmalgamationStep(DistillationStep):
    """Teach a student of the union of the teachers' classes, without labels: what the surest teacher says of each row.

    The student's logits [B, U] are compared within the chosen teacher's classes (soft targets), and pushed to put its
    mass there: T^2 times -log of the student's probability of the chosen set. With ``feature`` taps on student
    and teachers (of [B, D] layers) a common feature space is learned beside.
    """

    def __init__(
        self,
        student: nn.Module,
        data: Mapping[str, Tensor],
        *,
        teachers: Sequence[nn.Module],
        classes: Sequence[Sequence[int]],
        validate: Validate,
        temperature: float = 2.0,
        common: CommonFeatures | None = None,
        student_taps: Mapping[str, str] | None = None,
        teacher_taps: Mapping[str, str] | None = None,
        learning: Learning | None = None,
    ) -> None:
        super().__init__(
            student,
            data,
            [Term("soft_targets", "soft_targets")],
            validate=validate,
            teachers=teachers,
            student_taps=student_taps,
            teacher_taps=teacher_taps,
            learning=learning,
        )
        if len(classes) != len(teachers):
            raise ValueError(f"classes: wanted one set a teacher ({len(teachers)}), got {len(classes)}")
        tapped = "feature" in self.student_taps and "feature" in self.teacher_taps
        if (common is not None) != tapped:
            raise ValueError("common: wanted a common space and the taps 'feature' of student and teachers, or none")
        self.union = union_of(classes)
        self.classes = [torch.tensor(each) for each in classes]
        self.common, self.temperature = common, temperature

    @property
    def weights(self) -> Mapping[str, float]:  # type: ignore[override]
        """The weights of the terms."""
        features = {"common_features": 1.0, "rebuilding": 1.0} if self.common is not None else {}
        return {"within": 1.0, "between": 1.0, **features}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Return the rows of the terms."""
        return dict.fromkeys(self.weights, len(batch["index"]))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the terms, summed over rows."""
        found = self.values(batch)
        names = [f"teacher{n or ''}" for n in range(len(self.teachers))]
        logits, student = [found[name] for name in names], found["student"].float()
        if student.shape[1] != self.union:
            raise ValueError(f"student: wanted logits of {self.union} classes, got {student.shape[1]}")
        chosen, _ = most_confident(logits, [each.tolist() for each in self.classes])
        log_q = torch.log_softmax(student / self.temperature, 1)
        within, between = student.sum() * 0, student.sum() * 0
        for number, (own, classes) in enumerate(zip(logits, self.classes, strict=True)):
            classes, mine = classes.to(student.device), chosen == number
            within = within + soft_targets(
                student[:, classes], own, temperature=self.temperature, mask=mine, reduction="sum"
            )
            inside = torch.logsumexp(log_q[:, classes], 1)
            between = between - self.temperature**2 * inside[mine].sum()
        terms = {"within": within, "between": between}
        if self.common is not None:
            aligned, rebuilt = self.common(found["student.feature"], [found[f"{name}.feature"] for name in names])
            terms |= {"common_features": aligned, "rebuilding": rebuilt}
        return terms
