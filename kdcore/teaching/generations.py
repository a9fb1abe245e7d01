"""Fits one after the other: a student becomes the next one's teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from kdcore.teaching.registry import teaching
from kdcore.teaching.step import frozen
from kdcore.trainer import FitResult

# trains a student under a teacher (None: labels alone) with the one trainer, and returns what came of it; the stage is
# for the name of its folder, so that a chain that was interrupted goes on where it was
Fit = Callable[[nn.Module, nn.Module | None, int], FitResult]


@dataclass(frozen=True)
class Stage:
    """One link of a chain."""

    model: nn.Module
    result: FitResult


@teaching(
    "born_again",
    "fits",
    "a factory of the student; labels",
    "Furlanello et al., Born-Again Neural Networks, ICML 2018",
)
def born_again(make: Callable[[int], nn.Module], fit: Fit, generations: int) -> list[Stage]:
    """Teach each generation by the one before it, all of one architecture; the first has labels alone.

    ``make(stage)`` returns a fresh network; stage 0 has no teacher, so ``generations`` taught ones make
    ``generations + 1`` stages.

    Raises:
        ValueError: generations < 1.
    """
    if generations < 1:
        raise ValueError(f"generations: wanted at least 1, got {generations}")
    return assistant_chain([make(stage) for stage in range(generations + 1)], fit)


@teaching(
    "assistant_chain",
    "fits",
    "a trained teacher, or none; models from large to small",
    "Mirzadeh et al., Improved Knowledge Distillation via Teacher Assistant, AAAI 2020",
)
def assistant_chain(models: Sequence[nn.Module], fit: Fit, *, teacher: nn.Module | None = None) -> list[Stage]:
    """Teach a chain of models, from large to small, each by the one before it; the last is the student.

    Raises:
        ValueError: no model.
    """
    if not models:
        raise ValueError("models: wanted at least 1, got 0")
    stages = []
    for stage, model in enumerate(models):
        stages.append(Stage(model, fit(model, teacher, stage)))
        teacher = frozen(copy.deepcopy(model).eval())  # the model itself stays trainable
    return stages


class Residual(nn.Module):
    """A student and an assistant that answers what the student misses: their sum is what is deployed."""

    def __init__(self, student: nn.Module, assistant: nn.Module) -> None:
        super().__init__()
        self.student, self.assistant = frozen(student.eval()), assistant

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the student's answer plus the assistant's correction; the student does not learn any more."""
        answer: Tensor = self.student(inputs) + self.assistant(inputs)
        return answer

    def train(self, mode: bool = True) -> Residual:
        """Set the mode of the assistant; the student stays in evaluation mode, or its statistics would move."""
        super().train(mode)
        self.student.eval()
        return self


@teaching(
    "residual_assistant",
    "fits",
    "a teacher, a student and a smaller assistant",
    "Gao et al., Residual Knowledge Distillation, 2020",
)
def residual_assistant(
    student: nn.Module, assistant: nn.Module, fit: Fit, *, teacher: nn.Module
) -> tuple[Residual, list[Stage]]:
    """Teach a student, then an assistant the error the student leaves, and return their sum.

    Both fits have the same teacher; in the second the student stands still, so the assistant learns teacher - student.
    """
    first = Stage(student, fit(student, teacher, 0))
    both = Residual(copy.deepcopy(student), assistant)
    return both, [first, Stage(both, fit(both, teacher, 1))]
