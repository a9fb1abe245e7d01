"""Vectors of a batch: their directions, inner products and distances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def unit(values: Tensor, dim: int = -1) -> Tensor:
    """Return ``values`` over their L2 norm along ``dim``; a zero vector stays one, with a zero gradient."""
    norm = torch.linalg.vector_norm(values, dim=dim, keepdim=True)
    return values / norm.masked_fill(norm == 0, torch.inf)


class _Gram(torch.autograd.Function):
    """Inner products of all rows; their symmetry saves one of the two matrix products of the gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return rows @ rows.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        with torch.autocast(rows.device.type, enabled=False):
            gradient: Tensor = (upstream + upstream.T) @ rows
        return gradient


def gram(rows: Tensor) -> Tensor:
    """Return the inner products [B, B] of rows [B, D], in their own precision also under autocast."""
    with torch.autocast(rows.device.type, enabled=False):
        products: Tensor = _Gram.apply(rows)
    return products


def squared_distances(products: Tensor) -> Tensor:
    """Return the squared distances [B, B] of rows with these inner products; those that are rounding are 0.

    Give float64 products of centred rows: the digits of rows that are close must survive the subtraction.
    """
    norms = products.diagonal()
    both = norms[:, None] + norms
    squared = both - 2 * products
    return squared.masked_fill(squared.detach() <= 1e-13 * both.detach(), 0.0)
