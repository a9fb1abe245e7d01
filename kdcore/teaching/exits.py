"""A network with exits: its deep end teaches its shallow ones, which then answer easy inputs early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdcore.losses import label_smoothing, regression, soft_targets
from kdcore.teaching.registry import teaching
from kdcore.teaching.step import DistillationStep, Learning, Validate, labels_term
from kdcore.trainer import Batch


@dataclass(frozen=True)
class EarlyAnswer:
    """Logits [B, C], and which exit each row took, int64 [B]."""

    logits: Tensor
    exits: Tensor


class ExitNetwork(nn.Module):
    """Blocks with a classifier after each: exit e is ``heads[e](blocks[e](... blocks[0](x)))``.

    Raises:
        ValueError: not one head a block, or fewer than two.
    """

    def __init__(self, blocks: Sequence[nn.Module], heads: Sequence[nn.Module]) -> None:
        super().__init__()
        if len(blocks) != len(heads) or len(blocks) < 2:
            raise ValueError(f"heads: wanted one a block and at least 2, got {len(heads)} for {len(blocks)} blocks")
        self.blocks, self.heads = nn.ModuleList(blocks), nn.ModuleList(heads)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the deepest exit's logits [B, C]."""
        return self.all_exits(inputs)[-1]

    def all_exits(self, inputs: Tensor) -> list[Tensor]:
        """Return the logits [B, C] of every exit, shallow to deep."""
        answers = []
        for block, head in zip(self.blocks, self.heads, strict=True):
            inputs = block(inputs)
            answers.append(head(inputs))
        return answers

    @torch.no_grad()
    def answer_early(self, inputs: Tensor, threshold: float) -> EarlyAnswer:
        """Answer each row at the first exit that is sure enough; later blocks run on the rows still open.

        ``threshold`` is the probability of the best class at which an exit answers; above 1 all rows go to the end.
        """
        if self.training:
            raise ValueError("training: wanted evaluation mode for early answers")
        if not threshold > 0:
            raise ValueError(f"threshold: wanted a probability > 0, got {threshold}")
        open_rows = torch.arange(len(inputs), device=inputs.device)
        exits = torch.full((len(inputs),), len(self.heads) - 1, device=inputs.device)
        logits: Tensor | None = None
        for number, (block, head) in enumerate(zip(self.blocks, self.heads, strict=True)):
            inputs = block(inputs)
            answer = head(inputs)
            if logits is None:
                logits = answer.new_empty(len(exits), answer.shape[1])
            sure = torch.softmax(answer, 1).amax(1) >= threshold
            if number == len(self.heads) - 1:
                sure = torch.ones_like(sure)
            logits[open_rows[sure]] = answer[sure]
            exits[open_rows[sure]] = number
            inputs, open_rows = inputs[~sure], open_rows[~sure]
            if not len(open_rows):
                break
        if logits is None:
            raise ValueError("inputs: wanted at least one block")
        return EarlyAnswer(logits, exits)


@teaching(
    "deep_to_shallow",
    "step",
    "a network with exits; labels; no teacher",
    "Zhang et al., Be Your Own Teacher, ICCV 2019",
)
class DeepToShallowStep(DistillationStep):
    """Teach every exit from the labels, and the shallow ones from the deepest: soft targets, and its features.

    Features are compared where a shallow head's last hidden layer has the deepest one's width; ``hint`` 0 leaves them
    out. Heads are taken to end in their classifier: the input of its last linear layer is the feature.
    """

    student: ExitNetwork

    def __init__(
        self,
        network: ExitNetwork,
        data: Mapping[str, Tensor],
        *,
        validate: Validate,
        soft: float = 0.3,
        hint: float = 0.03,
        temperature: float = 3.0,
        learning: Learning | None = None,
    ) -> None:
        super().__init__(network, data, [labels_term()], validate=validate, learning=learning)
        if not 0 <= soft < 1 or hint < 0:
            raise ValueError(f"soft, hint: wanted 0 <= soft < 1 and hint >= 0, got {soft} and {hint}")
        self.soft, self.hint, self.temperature = soft, hint, temperature

    @property
    def weights(self) -> Mapping[str, float]:  # type: ignore[override]
        """The weights: 1 - soft on the labels, soft on the deepest exit's answers, hint on its features."""
        return {"cross_entropy": 1 - self.soft, "soft_targets": self.soft, "hint": self.hint}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Return the rows of the terms."""
        return dict.fromkeys(self.weights, len(batch["index"]))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the terms, summed over rows and exits."""
        features: list[Tensor] = []

        def keep(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            features.append(inputs[0])

        handles = [_classifier(head).register_forward_hook(keep) for head in self.student.heads]
        try:
            answers = self.student.all_exits(batch["inputs"])
        finally:
            for handle in handles:
                handle.remove()
        labels = [label_smoothing(each, batch["labels"], smoothing=0.0, reduction="sum") for each in answers]
        soft = [soft_targets(each, answers[-1], temperature=self.temperature, reduction="sum") for each in answers[:-1]]
        # the deepest exit learns from the labels alone, so its cross-entropy keeps its full weight
        labels[-1] = labels[-1] / (1 - self.soft)
        alike = [f.flatten(1) for f in features if f.shape[1:] == features[-1].shape[1:]]
        hints = [regression(each, alike[-1], reduction="sum") for each in alike[:-1]]
        nothing = answers[-1].sum() * 0
        return {
            "cross_entropy": torch.stack(labels).sum(),
            "soft_targets": torch.stack(soft).sum(),
            "hint": torch.stack(hints).sum() if hints else nothing,
        }


def _classifier(head: nn.Module) -> nn.Module:
    """Return the last linear layer of a head."""
    linear = [module for module in head.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"heads: wanted a linear classifier at the end, got {type(head).__name__}")
    return linear[-1]
