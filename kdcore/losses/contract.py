"""What every loss does the same way: precision, masks, reduction and the checks of its arguments.

A mask says which rows count (bool [B]) or, where a loss says so, which elements of a row count (bool [B, K]).
What stands in a masked place is never looked at: it may be NaN.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["none", "mean", "sum"]


def in_full_precision(values: Tensor) -> Tensor:
    """Return ``values`` as float32, or unchanged if they are float64 (gradient checks)."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def teacher_like(teacher: Tensor, student: Tensor) -> Tensor:
    """Return ``teacher`` without its graph, in the dtype of ``student``."""
    return teacher.detach().to(student.dtype)


def check_float(argument: str, values: Tensor, *dimensions: int) -> None:
    """Raise unless ``values`` is a floating tensor with one of the numbers of ``dimensions``."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{argument}: wanted a tensor, got {type(values).__name__}")
    if not values.is_floating_point():
        raise ValueError(f"{argument}: wanted a floating dtype, got {values.dtype}")
    if values.dim() not in dimensions:
        wanted = " or ".join(str(d) for d in dimensions)
        raise ValueError(f"{argument}: wanted {wanted} dimension(s), got shape {tuple(values.shape)}")


def check_shape(argument: str, values: Tensor, wanted: tuple[int, ...]) -> None:
    """Raise unless ``values`` has the shape ``wanted``."""
    if tuple(values.shape) != wanted:
        raise ValueError(f"{argument}: wanted shape {wanted}, got {tuple(values.shape)}")


def check_pair(student: Tensor, teacher: Tensor, *dimensions: int) -> None:
    """Raise unless ``student`` and ``teacher`` are floating tensors of one shape."""
    check_float("student", student, *dimensions)
    check_float("teacher", teacher, *dimensions)
    check_shape("teacher", teacher, tuple(student.shape))


def check_labels(labels: Tensor, rows: int, classes: int) -> None:
    """Raise unless ``labels`` is int64 [rows]; a wrong index is left to the gather (no sync here)."""
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: wanted int64 class indices, got {labels.dtype}")
    check_shape("labels", labels, (rows,))
    if classes < 2:
        raise ValueError(f"student: wanted at least 2 classes, got {classes}")


def check_positive(argument: str, value: float) -> None:
    """Raise unless ``value`` is a finite number above zero."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{argument}: wanted a finite number > 0, got {value}")


def check_at_least(argument: str, value: int, least: int) -> None:
    """Raise unless ``value`` >= ``least``."""
    if value < least:
        raise ValueError(f"{argument}: wanted at least {least}, got {value}")


def row_mask(mask: Tensor | None, rows: int) -> Tensor | None:
    """Return ``mask`` if it is a bool [rows], None if there is none; raise otherwise."""
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: wanted torch.bool, got {mask.dtype}")
    check_shape("mask", mask, (rows,))
    return mask


def element_mask(mask: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Split a row mask [B] or an element mask [B, K] into (valid rows [B], valid elements [B, K]).

    A row is valid if one of its elements is.
    """
    if mask is None:
        return None, None
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: wanted torch.bool, got {mask.dtype}")
    if tuple(mask.shape) == shape:
        return (mask, mask) if len(shape) == 1 else (mask.flatten(1).any(1), mask)
    if tuple(mask.shape) == shape[:1]:
        return mask, mask.reshape(-1, *(1,) * (len(shape) - 1)).expand(shape)
    raise ValueError(f"mask: wanted shape {shape[:1]} or {shape}, got {tuple(mask.shape)}")


def hide(values: Tensor, valid: Tensor | None) -> Tensor:
    """Return ``values`` with zeros in the places that do not count, so that NaN there reaches no gradient.

    ``valid`` covers the first dimensions of ``values``.
    """
    if valid is None:
        return values
    return values.masked_fill(~valid.reshape(*valid.shape, *(1,) * (values.dim() - valid.dim())), 0.0)


def reduce_rows(values: Tensor, valid: Tensor | None, reduction: Reduction) -> Tensor:
    """Reduce the losses of the rows [B]: "none" keeps them (0 where not valid), "sum" and "mean" are over valid rows.

    No valid row gives a zero that still has a graph.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction: wanted one of {', '.join(get_args(Reduction))}, got {reduction!r}")
    values = hide(values, valid)
    if reduction == "none":
        return values
    total = values.sum()
    if reduction == "sum":
        return total
    return total / (max(values.shape[0], 1) if valid is None else valid.sum().clamp(min=1))
