"""The general teaching step: a student, its teachers, and a weighted sum of losses on labelled rows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdcore.teaching.schedules import Schedule
from kdcore.teaching.taps import Taps
from kdcore.teaching.terms import Term, Terms
from kdcore.trainer import Batch, TeachingStep, iterate_rows

Validate = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class Learning:
    """How weights move: AdamW, and rows a batch; a learning rate that is a schedule moves from epoch to epoch."""

    batch_size: int = 64
    learning_rate: float | Schedule = 1e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        rate = self.learning_rate
        largest = max(rate.start, rate.end or 0.0) if isinstance(rate, Schedule) else rate
        if self.batch_size < 1 or not largest > 0 or not self.weight_decay >= 0:
            raise ValueError(f"learning: wanted batch_size >= 1, learning_rate > 0, weight_decay >= 0, got {self}")

    def rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch, counted from 0."""
        return self.learning_rate.at(epoch) if isinstance(self.learning_rate, Schedule) else self.learning_rate

    def set_rate(self, optimizer: torch.optim.Optimizer | None, epoch: int) -> None:
        """Give all weights of an optimiser, if there is one, the learning rate of an epoch."""
        for group in optimizer.param_groups if optimizer is not None else ():
            group["lr"] = self.rate(epoch)


def frozen(model: nn.Module, role: str = "teacher") -> nn.Module:
    """Return a model in evaluation mode, without gradients; one found in training mode is warned of, once."""
    if any(module.training for module in model.modules()):
        warnings.warn(f"{role} was in training mode; it is put into evaluation mode", stacklevel=2)
    return model.eval().requires_grad_(False)


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put a model into a mode for the block, and every module of it back into its own mode after it."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        model.train(modes[model])  # also for those that do more than to set a flag
        for module, mode in modes.items():
            module.training = mode


def check_outputs(values: Tensor, name: str) -> Tensor:
    """Return a teacher's outputs; raise ValueError with the count if some are NaN."""
    missing = int(torch.isnan(values).sum())
    if missing:
        raise ValueError(f"{name}: {missing} of {values.numel()} values are NaN")
    return values


class DistillationStep(TeachingStep):
    """Teach a student on rows of tensors by a weighted sum of terms.

    ``data`` holds tensors by name with one first axis, ``inputs`` and mostly ``labels``. Every term sees: the rows of
    ``data``; ``index`` (which rows); ``student`` and ``teacher`` (what the models answer to ``inputs``; several
    teachers are ``teacher``, ``teacher1``, ...); and ``student.NAME``, ``teacher.NAME`` for the taps. Teachers run
    frozen and are not part of the checkpoint. A subclass changes ``values`` to teach in another way.

    Raises:
        ValueError: tensors of different lengths, an empty set, or an unknown layer.
    """

    def __init__(
        self,
        student: nn.Module,
        data: Mapping[str, Tensor],
        terms: Sequence[Term],
        *,
        validate: Validate,
        teachers: Sequence[nn.Module] = (),
        student_taps: Mapping[str, str] | None = None,
        teacher_taps: Mapping[str, str] | None = None,
        learning: Learning | None = None,
    ) -> None:
        super().__init__()
        lengths = {name: len(rows) for name, rows in data.items()}
        if "inputs" not in data or len(set(lengths.values())) != 1 or not lengths["inputs"]:
            raise ValueError(f"data: wanted inputs and others of one length > 0, got {lengths}")
        self.student = student
        self.data = dict(data)
        self.terms = Terms(terms)
        self.validator = validate
        # a plain tuple, not a ModuleList: teachers are neither trained nor saved
        self.teachers = tuple(frozen(teacher) for teacher in teachers)
        self.student_taps, self.teacher_taps = dict(student_taps or {}), dict(teacher_taps or {})
        for model, taps in ((student, self.student_taps), *((teacher, self.teacher_taps) for teacher in teachers)):
            Taps(model, taps)  # an unknown layer is told of here, not in the first batch
        self.learning = learning or Learning()
        # the trainer's: a learning rate on a schedule is set in it at the start of every epoch
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def weights(self) -> Mapping[str, float]:  # type: ignore[override]
        """The weights of the terms in this epoch."""
        return self.terms.weights

    def optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW over the student and the losses that have parameters."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("student: wanted weights that learn, got none (is it frozen, or its own teacher?)")
        self._optimizer = torch.optim.AdamW(
            parameters, lr=self.learning.rate(0), weight_decay=self.learning.weight_decay
        )
        return self._optimizer

    def begin_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Set the weights and the learning rate of the epoch."""
        self.terms.begin_epoch(epoch)
        self.learning.set_rate(self._optimizer, epoch)

    def batch_count(self) -> int:
        """Return the number of batches of an epoch."""
        return math.ceil(len(self.data["inputs"]) / self.learning.batch_size)

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yield the rows in random order."""
        order = torch.randperm(len(self.data["inputs"]), generator=generator)
        for rows in iterate_rows(order, self.learning.batch_size):
            yield {"index": rows, **{name: tensor[rows] for name, tensor in self.data.items()}}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Return the rows every term sums over."""
        return self.terms.counts(batch, len(batch["index"]))

    def values(self, batch: Batch) -> dict[str, Tensor]:
        """Return all that terms may be given: the batch, and what student and teachers make of it."""
        found = {**batch, **self.ask(self.student, batch["inputs"], "student", self.student_taps)}
        for number, teacher in enumerate(self.teachers):
            name = f"teacher{number or ''}"
            found |= self.ask_teacher(teacher, batch["inputs"], name)
        return found

    def ask_teacher(self, teacher: nn.Module, inputs: Tensor, name: str = "teacher") -> dict[str, Tensor]:
        """Return a teacher's answer and tapped layers, without gradient, checked for NaN."""
        with torch.no_grad():
            answers = self.ask(teacher.to(inputs.device), inputs, name, self.teacher_taps)
        return {key: check_outputs(value, key) for key, value in answers.items()}

    @staticmethod
    def ask(model: nn.Module, inputs: Tensor, name: str, taps: Mapping[str, str]) -> dict[str, Tensor]:
        """Return a model's answer under ``name`` and its tapped layers under ``name.TAP``."""
        if not taps:
            return {name: model(inputs)}
        with Taps(model, taps) as tapped:
            answer = model(inputs)
            return {name: answer, **{f"{name}.{tap}": value for tap, value in tapped.take().items()}}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the sum of every term over the rows."""
        return dict(self.terms(self.values(batch)))

    def validate(self) -> dict[str, float]:
        """Return the validation metrics of the student."""
        return self.validator(self.student)


def labels_term(weight: Any = 1.0, *, student: str = "student", smoothing: float = 0.0) -> Term:
    """Return the cross-entropy with the labels as a term."""
    return Term(
        "cross_entropy", "label_smoothing", inputs={"student": student}, options={"smoothing": smoothing}, weight=weight
    )
