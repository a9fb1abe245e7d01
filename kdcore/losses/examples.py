"""Inputs on which the contract suite tries a loss: first axis B, floating ones float64."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    """Return standard normal numbers of a shape."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def pair(*shape: int, teacher: tuple[int, ...] | None = None, generator: torch.Generator) -> dict[str, Tensor]:
    """Return student and teacher of a shape, the teacher of a shape of its own if one is given."""
    student = normal(*shape, generator=generator)
    return {"student": student, "teacher": normal(*(teacher or shape), generator=generator)}


def labels(rows: int, classes: int, *, generator: torch.Generator) -> Tensor:
    """Return class indices int64 [rows]."""
    return torch.randint(classes, (rows,), generator=generator)
