"""What the tests of teaching share: blobs to tell apart, tiny networks, and the one trainer in its smallest form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcore.teaching import Learning
from kdcore.trainer import FitResult, TeachingStep, Trainer
from kdcore.trainer_config import TrainerConfig

FAST = Learning(batch_size=16, learning_rate=0.02)
WIDTH = 4


def blobs(rows: int = 120, classes: int = 3, *, seed: int = 0, spread: float = 1.0) -> dict[str, Tensor]:
    """Gaussian blobs around fixed corners, ``inputs`` [N, 4] and ``labels`` [N]; the corners do not go by the seed."""
    corners = torch.randn(classes, WIDTH, generator=torch.Generator().manual_seed(classes)) * 2.5
    generator = torch.Generator().manual_seed(100 + seed)
    labels = torch.arange(rows) % classes
    return {"inputs": corners[labels] + spread * torch.randn(rows, WIDTH, generator=generator), "labels": labels}


def network(hidden: int = 8, classes: int = 3, *, seed: int = 0, norm: bool = False, dropout: float = 0.0) -> Any:
    """Return an MLP in training mode; the random state is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        middle = [nn.BatchNorm1d(hidden)] if norm else []
        last = [nn.Dropout(dropout)] if dropout else []
        return nn.Sequential(nn.Linear(WIDTH, hidden), *middle, nn.ReLU(), *last, nn.Linear(hidden, classes))


def accuracy(data: dict[str, Tensor]) -> Callable[[nn.Module], dict[str, float]]:
    """Return a validation of a network on labelled rows."""

    def validate(model: nn.Module) -> dict[str, float]:
        return {"accuracy": float((model(data["inputs"]).argmax(1) == data["labels"]).float().mean())}

    return validate


def score(model: nn.Module, data: dict[str, Tensor]) -> float:
    """Return a network's accuracy in evaluation mode."""
    with torch.no_grad():
        return accuracy(data)(model.eval())["accuracy"]


def trained(hidden: int = 16, *, classes: int = 3, norm: bool = False, seed: int = 7, rows: int = 200) -> Any:
    """Return a teacher in evaluation mode that was taught by a plain loop."""
    data, model = blobs(rows, classes, seed=50), network(hidden, classes, seed=seed, norm=norm)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(data["inputs"]), data["labels"]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def fit(step: TeachingStep, epochs: int = 5, *, folder: Path | None = None, seed: int = 1, **options: Any) -> FitResult:
    """Train a step with the one trainer."""
    fabric = options.pop("fabric", None)
    base = {"max_epochs": epochs, "monitor": "accuracy", "tensorboard": False, "threads": 1, "accelerator": "cpu"}
    trainer = Trainer(TrainerConfig(**{**base, **options}), seed=seed, folder=folder, fabric=fabric)
    return trainer.fit(step)


def improves(step: TeachingStep, held: dict[str, Tensor], *, epochs: int = 5, least: float = 0.85) -> None:
    """Train a step; fail unless its student gets from (nearly) nothing to ``least`` on rows it was not taught on."""
    before = score(step.student, held)
    fit(step, epochs)
    after = score(step.student, held)
    assert after >= max(least, before), f"accuracy {before} before, {after} after"


def flat(model: nn.Module) -> Tensor:
    """Return all weights and buffers as one vector."""
    return torch.cat([value.detach().double().flatten() for value in model.state_dict().values()])


def kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T^2 KL(teacher || student) of every row, by torch's own functions."""
    log_q = F.log_softmax(student.double() / temperature, 1)
    log_p = F.log_softmax(teacher.double() / temperature, 1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def batch_of(step: TeachingStep, seed: int = 0) -> dict[str, Tensor]:
    """Return the first batch of an epoch."""
    return next(iter(step.batches(0, torch.Generator().manual_seed(seed))))


def loss_of(step: TeachingStep, batch: dict[str, Tensor]) -> Tensor:
    """Return the weighted mean the trainer would make of a batch."""
    terms, counts = step(batch), step.counts(batch)
    return torch.stack([step.weights[name] * terms[name] / max(counts[name], 1) for name in terms]).sum()
