"""Learning a new task without forgetting the old ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from kdcore.losses import label_smoothing, soft_targets
from kdcore.teaching.registry import teaching
from kdcore.teaching.step import DistillationStep, Learning, Validate, frozen, labels_term
from kdcore.trainer import Batch


class Heads(nn.Module):
    """A body with one classifier a task; called, it answers with the newest."""

    def __init__(self, body: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not heads:
            raise ValueError("heads: wanted at least 1, got 0")
        self.body, self.heads = body, nn.ModuleDict(heads)

    def forward(self, inputs: Tensor, task: str | None = None) -> Tensor:
        """Return the logits of a task, of the newest without a name."""
        name = list(self.heads)[-1] if task is None else task
        if name not in self.heads:
            raise ValueError(f"task: wanted one of {', '.join(self.heads)}, got {name!r}")
        answer: Tensor = self.heads[name](self.body(inputs))
        return answer

    def all_heads(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return the logits of every task."""
        features = self.body(inputs)
        return {name: head(features) for name, head in self.heads.items()}


def choose_exemplars(features: Tensor, labels: Tensor, per_class: int) -> Tensor:
    """Return rows whose mean stays near their class's mean, int64 [<= classes * per_class], by herding.

    Reference: Rebuffi et al., iCaRL: Incremental Classifier and Representation Learning, CVPR 2017.
    """
    if per_class < 1:
        raise ValueError(f"per_class: wanted at least 1, got {per_class}")
    if features.dim() != 2 or not len(features) or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features, labels: wanted [N, D] and [N], N > 0, got {tuple(features.shape)} and {tuple(labels.shape)}"
        )
    chosen = []
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        own = features[rows].float()
        mean, total = own.mean(0), torch.zeros_like(own[0])
        open_rows = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        for count in range(1, min(per_class, len(rows)) + 1):
            distance = (mean - (total + own) / count).square().sum(1).masked_fill(~open_rows, torch.inf)
            best = int(distance.argmin())
            open_rows[best] = False
            total += own[best]
            chosen.append(rows[best])
    return torch.stack(chosen)


@teaching(
    "without_forgetting",
    "step",
    "a network with old heads and a new one; labels of the new task; exemplars of the old ones if kept",
    "Li & Hoiem, Learning without Forgetting, ECCV 2016; with a memory: Rebuffi et al., iCaRL, CVPR 2017",
)
class WithoutForgettingStep(DistillationStep):
    """Teach a new head while the old heads keep saying what they said before, on the new data.

    The network as it was is the teacher of the old heads. ``memory`` holds ``inputs`` of old tasks: some are put
    beside each batch, and there too the old heads are held to their former answers.
    """

    student: Heads

    def __init__(
        self,
        student: Heads,
        data: Mapping[str, Tensor],
        *,
        validate: Validate,
        new: str,
        memory: Tensor | None = None,
        weight: float = 1.0,
        temperature: float = 2.0,
        learning: Learning | None = None,
    ) -> None:
        super().__init__(student, data, [labels_term()], validate=validate, learning=learning)
        if new not in student.heads or len(student.heads) < 2:
            raise ValueError(f"new: wanted one of {', '.join(student.heads)} beside an old head, got {new!r}")
        if memory is not None and not len(memory):
            raise ValueError("memory: wanted rows, or None, got 0 rows")
        self.new, self.memory = new, memory
        self.weight, self.temperature = weight, temperature
        self.before = (frozen(copy.deepcopy(student).eval()),)  # in a tuple: neither trained nor saved

    @property
    def weights(self) -> Mapping[str, float]:  # type: ignore[override]
        """The weights of the new labels and of the old answers."""
        return {"cross_entropy": 1.0, "old_answers": self.weight}

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yield the rows, with as many of the memory as half a batch."""
        for batch in super().batches(epoch, generator):
            if self.memory is not None:
                drawn = torch.randint(len(self.memory), (max(1, len(batch["index"]) // 2),), generator=generator)
                batch["memory"] = self.memory[drawn]
            yield batch

    def counts(self, batch: Batch) -> dict[str, int]:
        """Return the new rows, and all rows of the old heads."""
        rows = len(batch["index"])
        return {"cross_entropy": rows, "old_answers": rows + len(batch.get("memory", ()))}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return both terms, summed over rows (and old heads)."""
        inputs = batch["inputs"]
        rows = len(inputs)
        if "memory" in batch:
            inputs = torch.cat([inputs, batch["memory"]])
        answers = self.student.all_heads(inputs)
        before: Heads = self.before[0].to(inputs.device)  # type: ignore[assignment]
        with torch.no_grad():
            then = before.all_heads(inputs)
        kept = [
            soft_targets(answers[name], then[name], temperature=self.temperature, reduction="sum")
            for name in answers
            if name != self.new
        ]
        new = label_smoothing(answers[self.new][:rows], batch["labels"], smoothing=0.0, reduction="sum")
        return {"cross_entropy": new, "old_answers": torch.stack(kept).sum()}
