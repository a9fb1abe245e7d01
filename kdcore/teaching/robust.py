"""Students that hold against inputs made to fool them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcore.losses import label_smoothing, soft_targets
from kdcore.teaching.registry import teaching
from kdcore.teaching.step import DistillationStep, Learning, Validate, in_mode, labels_term
from kdcore.teaching.terms import Term
from kdcore.trainer import Batch


def attack(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    radius: float,
    steps: int = 10,
    low: float | None = 0.0,
    high: float | None = 1.0,
    random_start: bool = True,
) -> Tensor:
    """Return inputs that a model gets wrong within ``radius`` (largest change of a value): projected gradient ascent.

    ``low`` and ``high`` bound the values (None: no bound). Each step goes radius * 2.5 / steps along the gradient's
    sign. The model's gradients and mode are left as they are.

    Raises:
        ValueError: radius < 0 or steps < 1.

    Reference: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018.
    """
    if not radius >= 0 or steps < 1:
        raise ValueError(f"radius, steps: wanted radius >= 0 and steps >= 1, got {radius} and {steps}")
    start = inputs.detach()
    moved = start + (torch.empty_like(start).uniform_(-radius, radius) if random_start else 0)
    moved = moved.clamp(low, high) if low is not None or high is not None else moved
    for _ in range(steps):
        moved.requires_grad_(True)
        with torch.enable_grad():
            loss = F.cross_entropy(model(moved), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, moved)
        moved = moved.detach() + gradient.sign() * (radius * 2.5 / steps)
        moved = start + (moved - start).clamp(-radius, radius)
        moved = moved.clamp(low, high) if low is not None or high is not None else moved
    return moved.detach()


@teaching(
    "adversarially_robust",
    "step",
    "a (robust) teacher; labels; inputs with known bounds",
    "Goldblum et al., Adversarially Robust Distillation, AAAI 2020",
)
class AdversariallyRobustStep(DistillationStep):
    """Teach a student to say of attacked inputs what the teacher says of the clean ones.

    The attack is made on the student as it stands, every step; ``soft`` weighs the teacher's word, 1 - soft the labels
    on clean inputs.
    """

    def __init__(
        self,
        student: nn.Module,
        data: Mapping[str, Tensor],
        *,
        teacher: nn.Module,
        validate: Validate,
        radius: float,
        steps: int = 7,
        soft: float = 0.9,
        temperature: float = 1.0,
        low: float | None = 0.0,
        high: float | None = 1.0,
        learning: Learning | None = None,
    ) -> None:
        super().__init__(student, data, [labels_term()], validate=validate, teachers=[teacher], learning=learning)
        if not 0 <= soft <= 1:
            raise ValueError(f"soft: wanted 0..1, got {soft}")
        self.soft, self.temperature = soft, temperature
        self.attack = {"radius": radius, "steps": steps, "low": low, "high": high}

    @property
    def weights(self) -> Mapping[str, float]:  # type: ignore[override]
        """The weights of the labels and of the teacher."""
        return {"cross_entropy": 1 - self.soft, "robust_targets": self.soft}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Return the rows of both terms."""
        return dict.fromkeys(self.weights, len(batch["index"]))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return both terms, summed over rows."""
        inputs, labels = batch["inputs"], batch["labels"]
        with in_mode(self.student, False):  # the attack must not move running statistics
            fooled = attack(self.student, inputs, labels, **self.attack)  # type: ignore[arg-type]
        teacher = self.ask_teacher(self.teachers[0], inputs)["teacher"]
        clean, attacked = self.student(torch.cat([inputs, fooled])).chunk(2)
        return {
            "cross_entropy": label_smoothing(clean, labels, smoothing=0.0, reduction="sum"),
            "robust_targets": soft_targets(attacked, teacher, temperature=self.temperature, reduction="sum"),
        }


class Tempered(nn.Module):
    """A network whose logits are divided by a temperature while it trains, and not after."""

    def __init__(self, network: nn.Module, temperature: float) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature: wanted a number > 0, got {temperature}")
        self.network, self.temperature = network, temperature

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits, divided in training."""
        logits: Tensor = self.network(inputs)
        return logits / self.temperature if self.training else logits


@teaching(
    "defensive",
    "step",
    "a teacher trained at the same temperature (Tempered); no labels",
    "Papernot et al., Distillation as a Defense to Adversarial Perturbations, SP 2016",
)
class DefensiveStep(DistillationStep):
    """Teach a student of the teacher's architecture at a high temperature from the teacher's soft labels alone.

    Deployed at temperature 1 the student's gradients by its inputs all but vanish, which hinders simple attacks;
    Carlini & Wagner (2017) broke it as a defence: measure with ``attack`` on another model as well.
    """

    def __init__(self, student: nn.Module, data: Mapping[str, Tensor], *, temperature: float = 20.0, **kw: Any) -> None:
        # the trained logits are z / T on both sides; Hinton's T^2 is left out, as in the paper
        term = Term("soft_targets", "soft_targets", weight=1.0)
        super().__init__(Tempered(student, temperature), data, [term], **kw)
        if len(self.teachers) != 1:
            raise ValueError(f"teachers: wanted 1, got {len(self.teachers)}")
        self.temperature = temperature

    def ask_teacher(self, teacher: nn.Module, inputs: Tensor, name: str = "teacher") -> dict[str, Tensor]:
        """Return the teacher's answer at the temperature."""
        return {name: super().ask_teacher(teacher, inputs, name)[name] / self.temperature}
