"""How a student is trained, as recipes say it; apart from the loop, so that reading a recipe imports no Lightning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Precision = Literal["32-true", "bf16-mixed"]
Accelerator = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True)
class TrainerConfig:
    """How a student is trained; what it learns is the teaching step's business."""

    max_epochs: int = 100
    # stop after this many validations without improvement; 0 never stops early
    patience: int = 10
    # the validation metric that decides which weights are kept, and its direction
    monitor: str = "ndcg@10"
    mode: str = "max"
    validate_every: int = 1
    # largest norm of the gradient; 0 leaves it alone
    gradient_clip: float = 0.0
    # batches whose gradients are added up before one update
    accumulate: int = 1
    # Fabric's names; bf16-mixed keeps the weights in float32
    precision: Precision = "32-true"
    accelerator: Accelerator = "auto"
    # CPU threads; 0 leaves torch's choice
    threads: int = 0
    # at most this many seconds of work are lost when the process is killed
    checkpoint_seconds: float = 30.0
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in ("max_epochs", "validate_every", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name}: got {getattr(self, name)}, wanted at least 1")
        choices = {"mode": ("max", "min"), "precision": get_args(Precision), "accelerator": get_args(Accelerator)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"trainer.{name}: got {getattr(self, name)!r}, wanted one of {', '.join(known)}")
        for name in ("patience", "gradient_clip", "threads", "checkpoint_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"trainer.{name}: got {getattr(self, name)}, wanted 0 or more")
