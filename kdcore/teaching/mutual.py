"""Students that teach each other, without a teacher above them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kdcore.losses import label_smoothing, soft_targets
from kdcore.teaching.registry import teaching
from kdcore.teaching.step import DistillationStep, Learning, Validate, labels_term
from kdcore.trainer import Batch


class Peers(nn.Module):
    """Networks that learn together; the one asked is the first, which is the one to deploy."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        if len(networks) < 2:
            raise ValueError(f"networks: wanted at least 2 peers, got {len(networks)}")
        self.networks = nn.ModuleList(networks)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the first network's answer."""
        answer: Tensor = self.networks[0](inputs)
        return answer

    def all_answers(self, inputs: Tensor) -> list[Tensor]:
        """Return every network's answer."""
        return [network(inputs) for network in self.networks]


@teaching("mutual_learning", "step", "two or more students; labels", "Zhang et al., Deep Mutual Learning, CVPR 2018")
class MutualLearningStep(DistillationStep):
    """Teach n peers together: each has its cross-entropy and the mean over peers j of T^2 KL(p_j || p_i).

    All peers move at once, each pulled to what the others said before the move, without gradient through them. The
    student to deploy is the first; ``step.student.networks`` holds all.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        data: Mapping[str, Tensor],
        *,
        validate: Validate,
        weight: float = 1.0,
        temperature: float = 1.0,
        learning: Learning | None = None,
    ) -> None:
        super().__init__(Peers(networks), data, [labels_term()], validate=validate, learning=learning)
        self.weight, self.temperature = weight, temperature

    @property
    def weights(self) -> Mapping[str, float]:  # type: ignore[override]
        """The weights of the labels and of the peers."""
        return {"cross_entropy": 1.0, "peers": self.weight}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Return the rows of both terms."""
        return dict.fromkeys(self.weights, len(batch["index"]))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the sums over rows, and over peers, of cross-entropy and divergence from the others."""
        peers: Peers = self.student  # type: ignore[assignment]
        answers = peers.all_answers(batch["inputs"])
        labels = sum(label_smoothing(each, batch["labels"], smoothing=0.0, reduction="sum") for each in answers)
        return {"cross_entropy": torch.as_tensor(labels), "peers": self.lessons(answers)}

    def lessons(self, answers: list[Tensor]) -> Tensor:
        """Return what the peers teach each other, summed over rows and peers."""
        n = len(answers)
        taught = [
            soft_targets(mine, other, temperature=self.temperature, reduction="sum") / (n - 1)
            for i, mine in enumerate(answers)
            for j, other in enumerate(answers)
            if i != j
        ]
        return torch.stack(taught).sum()


@teaching(
    "diverse_peers",
    "step",
    "three or more students, the first of which leads; labels",
    "Chen et al., Online Knowledge Distillation with Diverse Peers, AAAI 2020",
)
class DiversePeersStep(MutualLearningStep):
    """Teach peers from targets of their own, each a learned mixture of the others, and a leader from their average.

    Every auxiliary peer attends over the auxiliary peers with a small projection of its answers, so the targets differ
    and the peers do not all become alike; the leader (the first, which is deployed) learns from the mean of the others.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        data: Mapping[str, Tensor],
        *,
        validate: Validate,
        classes: int,
        width: int = 8,
        weight: float = 1.0,
        temperature: float = 3.0,
        learning: Learning | None = None,
    ) -> None:
        if len(networks) < 3:
            raise ValueError(f"networks: wanted a leader and at least 2 peers, got {len(networks)}")
        super().__init__(networks, data, validate=validate, weight=weight, temperature=temperature, learning=learning)
        self.query, self.key = nn.Linear(classes, width, bias=False), nn.Linear(classes, width, bias=False)

    def lessons(self, answers: list[Tensor]) -> Tensor:
        """Return what the peers and the leader are taught, summed over rows and networks."""
        leader, others = answers[0], torch.stack(answers[1:], 1)  # [B, M, C]
        # the attention is trained by the peers' loss: the mixture keeps its graph there, the answers mixed do not
        said = others.detach().float()
        attention = torch.softmax(self.query(said) @ self.key(said).transpose(1, 2), 2)
        mixed = torch.softmax(said / self.temperature, 2)
        targets = (attention @ mixed).clamp(min=1e-12).log() * self.temperature
        log_p = torch.log_softmax(targets / self.temperature, 2)
        log_q = torch.log_softmax(others.float() / self.temperature, 2)
        peers = self.temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
        group = mixed.mean(1).clamp(min=1e-12).log() * self.temperature
        return peers + soft_targets(leader, group, temperature=self.temperature, reduction="sum")
