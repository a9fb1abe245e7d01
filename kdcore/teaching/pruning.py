"""Students that are their teacher with channels taken out."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from kdcore.losses import soft_targets
from kdcore.teaching.registry import teaching
from kdcore.teaching.step import DistillationStep, Learning, Validate, check_outputs
from kdcore.teaching.terms import Term
from kdcore.trainer import Batch


def prune_channels(model: nn.Sequential, share: float) -> nn.Sequential:
    """Return a copy whose hidden convolutions and linear layers have lost their weakest output channels (by 2-norm).

    ``share`` (0..1) of each layer's channels, all but one at most, is masked (torch.nn.utils.prune, so they stay out
    while it learns), bias included; the last layer, whose outputs are the classes, is left whole. Make it permanent
    with ``finish_pruning``, also before the model is copied or pruned again.

    Raises:
        ValueError: share outside [0, 1), or nothing to prune.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share: wanted 0 <= share < 1, got {share}")
    pruned = copy.deepcopy(model).requires_grad_(True)  # a teacher may be frozen, its pruned copy learns
    layers = [m for m in pruned.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear))]
    if len(layers) < 2:
        raise ValueError(f"model: wanted a hidden convolution or linear layer, got {len(layers)} layer(s)")
    for layer in layers[:-1]:
        channels = layer.weight.shape[0]
        prune.ln_structured(layer, "weight", amount=min(round(share * channels), channels - 1), n=2, dim=0)
        if layer.bias is not None:
            kept = layer.get_buffer("weight_mask").flatten(1).any(1)
            prune.custom_from_mask(layer, "bias", kept.to(layer.bias.dtype))
    return pruned


def finish_pruning(model: nn.Module) -> nn.Module:
    """Make the masks of a pruned model permanent, in place, and return it."""
    for module in model.modules():
        for name in ("weight", "bias"):
            if hasattr(module, f"{name}_mask"):
                prune.remove(module, name)
    return model


def remaining_parameters(model: nn.Module) -> int:
    """Return how many weights of a pruned model are not zero."""
    return sum(
        int(getattr(module, name).count_nonzero())
        for module in model.modules()
        for name in ("weight", "bias")
        if isinstance(getattr(module, name, None), Tensor)
    )


@teaching(
    "pruned_cross_distillation",
    "step",
    "a teacher of blocks (Sequential) and its pruned copy; few, unlabelled rows",
    "Bai et al., Few Shot Network Compression via Cross Distillation, AAAI 2020",
)
class CrossDistillationStep(DistillationStep):
    """Teach a pruned copy block by block, each network also fed what the other made of the inputs before.

    For every block, with h_T and h_S the two networks' inputs to it: ``correction`` is |T(h_T) - S(h_T)|^2 (the student
    on clean inputs) and ``imitation`` |T(h_S) - S(h_S)|^2 (the teacher on the student's: errors do not pile up), both
    means over values, summed over blocks; ``mixing`` a replaces h_T and h_S by a h_T + (1 - a) h_S and the converse
    (the soft form; 1 leaves them apart). ``soft_targets`` on the last block's answer are added.
    """

    student: nn.Sequential

    def __init__(
        self,
        student: nn.Sequential,
        data: Mapping[str, Tensor],
        *,
        teacher: nn.Sequential,
        validate: Validate,
        correction: float = 0.5,
        soft: float = 1.0,
        mixing: float = 1.0,
        temperature: float = 4.0,
        learning: Learning | None = None,
    ) -> None:
        term = Term("soft_targets", "soft_targets")
        super().__init__(student, data, [term], validate=validate, teachers=[teacher], learning=learning)
        if len(student) != len(teacher):
            raise ValueError(f"student: wanted {len(teacher)} blocks as the teacher has, got {len(student)}")
        if not 0 <= correction <= 1 or not 0 <= mixing <= 1 or soft < 0:
            raise ValueError(
                f"correction, mixing, soft: wanted 0..1, 0..1, >= 0, got {correction}, {mixing} and {soft}"
            )
        self.correction, self.soft, self.mixing, self.temperature = correction, soft, mixing, temperature

    @property
    def weights(self) -> Mapping[str, float]:  # type: ignore[override]
        """The weights of the terms."""
        return {"correction": self.correction, "imitation": 1 - self.correction, "soft_targets": self.soft}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Return the rows of the terms."""
        return dict.fromkeys(self.weights, len(batch["index"]))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the terms, summed over rows (and blocks)."""
        teacher: nn.Sequential = self.teachers[0].to(batch["inputs"].device)  # type: ignore[assignment]
        clean = own = batch["inputs"]
        correction, imitation = [], []
        for block, twin in zip(teacher, self.student, strict=True):
            a = self.mixing
            to_correct, to_imitate = a * clean + (1 - a) * own.detach(), a * own + (1 - a) * clean
            with torch.no_grad():
                wanted = block(to_correct)
                clean = block(clean) if a < 1 else wanted
            with _still(twin):  # deployed, the block will see the student's inputs: its statistics are of those
                correction.append(_error(twin(to_correct), wanted))
            # the teacher's block is fixed, but its answer to the student's input moves with the student
            next_own = twin(to_imitate)
            imitation.append(_error(next_own, block(to_imitate)))
            own = next_own
        return {
            "correction": torch.stack(correction).sum(),
            "imitation": torch.stack(imitation).sum(),
            "soft_targets": soft_targets(
                own, check_outputs(clean, "teacher"), temperature=self.temperature, reduction="sum"
            ),
        }


@contextmanager
def _still(block: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norms where they are."""
    norms = [module for module in block.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
    rates = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, rate in zip(norms, rates, strict=True):
            norm.momentum = rate


def _error(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).flatten(1).square().mean(1).sum()
