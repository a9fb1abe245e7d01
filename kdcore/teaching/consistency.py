"""A network that teaches itself by saying the same of two samples that ought to be alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdcore.losses import label_smoothing, soft_targets
from kdcore.teaching.registry import teaching
from kdcore.teaching.step import DistillationStep, Learning, Validate, labels_term
from kdcore.trainer import Batch

Distort = Callable[[Tensor, torch.Generator], Tensor]


class _ConsistencyStep(DistillationStep):
    """Labels on the rows, and a term ``consistency`` between their answers and those to ``partner``."""

    def __init__(
        self,
        student: nn.Module,
        data: Mapping[str, Tensor],
        *,
        validate: Validate,
        weight: float = 1.0,
        temperature: float = 4.0,
        learning: Learning | None = None,
    ) -> None:
        super().__init__(student, data, [labels_term()], validate=validate, learning=learning)
        if not weight >= 0:
            raise ValueError(f"weight: wanted a number >= 0, got {weight}")
        self.weight, self.temperature = weight, temperature

    @property
    def weights(self) -> Mapping[str, float]:  # type: ignore[override]
        """The weights of the labels and of the consistency."""
        return {"cross_entropy": 1.0, "consistency": self.weight}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Return the rows of both terms."""
        return dict.fromkeys(self.weights, len(batch["index"]))


@teaching(
    "class_wise",
    "step",
    "labels; no teacher",
    "Yun et al., Regularizing Class-Wise Predictions via Self-Knowledge Distillation, CVPR 2020",
)
class ClassWiseStep(_ConsistencyStep):
    """Teach a network to say of a sample what it says of another one of the same class (which gets no gradient)."""

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yield the rows, each with a random other one of its class as partner (itself where it is alone)."""
        labels = self.data["labels"]
        by_class = labels.argsort(stable=True)
        counts = labels.bincount()
        first = counts.cumsum(0) - counts
        place = torch.empty_like(by_class)  # of a row among those of its class
        place[by_class] = torch.arange(len(labels)) - first[labels[by_class]]
        for batch in super().batches(epoch, generator):
            own = batch["labels"]
            others = (counts[own] - 1).clamp(min=1)
            further = 1 + (torch.rand(len(own), generator=generator) * others).long()
            drawn = (place[batch["index"]] + further) % counts[own]
            yield {**batch, "partner": self.data["inputs"][by_class[first[own] + drawn]]}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return cross-entropy, and T^2 KL(partner || row), summed over rows."""
        answer = self.student(batch["inputs"])
        with torch.no_grad():
            partner = self.student(batch["partner"])
        return {
            "cross_entropy": label_smoothing(answer, batch["labels"], smoothing=0.0, reduction="sum"),
            "consistency": soft_targets(answer, partner, temperature=self.temperature, reduction="sum"),
        }


@teaching(
    "data_distortion",
    "step",
    "labels and a random distortion of the inputs; no teacher",
    "Xu & Liu, Data-Distortion Guided Self-Distillation for Deep Neural Networks, AAAI 2019",
)
class DataDistortionStep(_ConsistencyStep):
    """Teach a network to say the same of two distortions of a sample: each learns from the other.

    ``distort(inputs, generator)`` returns distorted inputs of the same shape. The paper adds a distance between the
    features of the two views, which here is the divergence's limit at a high temperature.
    """

    def __init__(self, *args: Any, distort: Distort, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.distort = distort

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yield the rows in two distortions."""
        for batch in super().batches(epoch, generator):
            views = [self.distort(batch["inputs"], generator) for _ in range(2)]
            yield {**batch, "inputs": views[0], "partner": views[1]}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the mean cross-entropy of both views and their mutual divergence, summed over rows."""
        one, other = self.student(torch.cat([batch["inputs"], batch["partner"]])).chunk(2)
        labels = [label_smoothing(each, batch["labels"], smoothing=0.0, reduction="sum") for each in (one, other)]
        mutual = [
            soft_targets(a, b, temperature=self.temperature, reduction="sum") for a, b in ((one, other), (other, one))
        ]
        return {"cross_entropy": torch.stack(labels).mean(), "consistency": torch.stack(mutual).mean()}
