"""Training samples out of a teacher alone, where its data are gone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcore.teaching.registry import teaching
from kdcore.teaching.step import Learning, frozen
from kdcore.trainer import Batch, TeachingStep, iterate_rows


class Samples(nn.Module):
    """Inputs that are learned, [N, ...]; called with row numbers it gives those rows, within its bounds."""

    def __init__(
        self, count: int, shape: tuple[int, ...], *, low: float | None = None, high: float | None = None
    ) -> None:
        super().__init__()
        if count < 1:
            raise ValueError(f"count: wanted at least 1, got {count}")
        if low is not None and high is not None and not low < high:
            raise ValueError(f"low, high: wanted low < high, got {low} and {high}")
        self.low, self.high, self.bounded = low, high, low is not None or high is not None
        values = torch.randn(count, *shape)
        self.values = nn.Parameter(values.clamp(low, high) if self.bounded else values)

    def forward(self, rows: Tensor) -> Tensor:
        """Return rows [n, ...]."""
        if self.training and self.bounded:  # back onto the bounds, beyond which a clamp has no gradient
            with torch.no_grad():
                self.values.clamp_(self.low, self.high)
        values = self.values[rows]
        return values.clamp(self.low, self.high) if self.bounded else values


@teaching(
    "data_free_samples",
    "step",
    "a teacher with batch normalisation; no data",
    "Yin et al., Dreaming to Distill (DeepInversion), CVPR 2020",
)
class SynthesisStep(TeachingStep):
    """Learn inputs that a teacher is sure of and whose layer statistics are those it saw in training.

    Terms: ``cross_entropy`` with wanted classes (spread evenly), ``statistics`` (squared distance of batch means and
    variances from every batch norm's running ones), ``variation`` (differences of neighbouring values, for maps) and
    ``size`` (mean square). What is trained is the Samples; ``labels`` are the classes they were made for.
    """

    labels: Tensor

    def __init__(
        self,
        teacher: nn.Module,
        samples: Samples,
        classes: int,
        *,
        statistics: float = 1.0,
        variation: float = 1e-3,
        size: float = 1e-3,
        steps_per_epoch: int = 50,
        learning: Learning | None = None,
    ) -> None:
        super().__init__()
        self.teacher = (frozen(teacher),)
        self.norms = [m for m in teacher.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
        if not self.norms or any(norm.running_mean is None for norm in self.norms):
            raise ValueError("teacher: wanted batch normalisation with running statistics, which is what samples match")
        if steps_per_epoch < 1 or classes < 2:
            raise ValueError(f"steps_per_epoch, classes: wanted >= 1 and >= 2, got {steps_per_epoch} and {classes}")
        self.student = samples
        self.register_buffer("labels", torch.arange(len(samples.values)) % classes)
        self.learning = learning or Learning(batch_size=len(samples.values), learning_rate=0.05)
        self._optimizer: torch.optim.Optimizer | None = None
        self.steps_per_epoch = steps_per_epoch
        self.weights = {"cross_entropy": 1.0, "statistics": statistics, "variation": variation, "size": size}

    def optimizer(self) -> torch.optim.Optimizer:
        """Return Adam over the samples."""
        self._optimizer = torch.optim.Adam(self.student.parameters(), lr=self.learning.rate(0))
        return self._optimizer

    def begin_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Set the learning rate of the epoch."""
        self.learning.set_rate(self._optimizer, epoch)

    def batch_count(self) -> int:
        """Return the number of steps of an epoch."""
        return self.steps_per_epoch

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yield random rows."""
        left = self.steps_per_epoch
        while left:
            order = torch.randperm(len(self.labels), generator=generator)
            for rows in iterate_rows(order, self.learning.batch_size):
                yield {"index": rows}
                left -= 1
                if not left:
                    return

    def counts(self, batch: Batch) -> dict[str, int]:
        """Return the rows of a batch for every term."""
        return dict.fromkeys(self.weights, len(batch["index"]))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the terms; those of the whole batch count once a row."""
        rows = batch["index"]
        inputs = self.student(rows)
        distances: list[Tensor] = []

        def compare(norm: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
            if not len(given[0]):  # a process may be left without rows, which have no mean
                distances.append(given[0].sum())
                return
            values = given[0].transpose(0, 1).flatten(1)
            mean, variance = values.mean(1), values.var(1, unbiased=False)
            distances.append((mean - norm.running_mean).square().mean() + (variance - norm.running_var).square().mean())

        handles = [norm.register_forward_hook(compare) for norm in self.norms]
        try:
            logits = self.teacher[0].to(inputs.device)(inputs)
        finally:
            for handle in handles:
                handle.remove()
        return {
            "cross_entropy": F.cross_entropy(logits, self.labels[rows], reduction="sum"),
            "statistics": torch.stack(distances).mean() * len(rows),
            "variation": _variation(inputs),
            "size": inputs.flatten(1).square().mean(1).sum(),
        }

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return how often the teacher says the wanted class, and how sure it is."""
        rows = torch.arange(len(self.labels), device=self.labels.device)
        logits = self.teacher[0].to(rows.device)(self.student(rows))
        chance = torch.softmax(logits, 1).gather(1, self.labels[:, None])
        right = logits.argmax(1) == self.labels
        return {"accuracy": float(right.float().mean()), "confidence": float(chance.mean())}


def _variation(inputs: Tensor) -> Tensor:
    """Return the mean squared difference of neighbours along the last two axes of maps, summed over rows."""
    if inputs.dim() < 4:
        return inputs.sum() * 0
    down = (inputs[..., 1:, :] - inputs[..., :-1, :]).square().flatten(1).mean(1)
    right = (inputs[..., 1:] - inputs[..., :-1]).square().flatten(1).mean(1)
    return (down + right).sum()
