"""Losses with networks of their own, slow and obvious: one row, NumPy loops over channels and positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from kdcore.losses import entry
from tests.kdcore.losses.references.feature import flat, over, ref_hint, scaled

Array = NDArray[np.float64]


def pool(maps: Array, height: int, width: int) -> Array:
    """Average the cells from floor(i * H / height) up to ceil((i + 1) * H / height), and so in the other direction."""
    full_height, full_width = maps.shape[1:]
    pooled = np.zeros((len(maps), height, width))
    for i in range(height):
        for j in range(width):
            rows = slice(i * full_height // height, -(-(i + 1) * full_height // height))
            columns = slice(j * full_width // width, -(-(j + 1) * full_width // width))
            pooled[:, i, j] = maps[:, rows, columns].mean((1, 2))
    return pooled


def to_smaller(student: Array, teacher: Array) -> tuple[Array, Array]:
    size = min(student.shape[1], teacher.shape[1]), min(student.shape[2], teacher.shape[2])
    return pool(student, *size), pool(teacher, *size)


def convolve(maps: Array, layer: nn.Module) -> Array:
    """Cross-correlate with zeros around, so that the size stays."""
    weight, bias = np.asarray(layer.weight.tolist()), np.asarray(layer.bias.tolist())
    reach = weight.shape[2] // 2
    padded = np.pad(maps, ((0, 0), (reach, reach), (reach, reach)))
    out = np.zeros((len(weight), *maps.shape[1:]))
    for channel, kernel in enumerate(weight):
        for h in range(maps.shape[1]):
            for w in range(maps.shape[2]):
                window = padded[:, h : h + kernel.shape[1], w : w + kernel.shape[2]]
                out[channel, h, w] = (window * kernel).sum() + bias[channel]
    return out


def run(maps: Array, layers: nn.Sequential, slope: float) -> Array:
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    for number, layer in enumerate(convolutions):
        maps = convolve(maps, layer)
        if number < len(convolutions) - 1:
            maps = np.where(maps > 0, maps, slope * maps)
    return maps


def ref_regressed_hint(student: ArrayLike, teacher: ArrayLike, elements: str = "mean") -> float:
    module = entry("regressed_hint").build().double()
    s, t = to_smaller(convolve(np.asarray(student), module.regressor), np.asarray(teacher))
    return ref_hint(s, t, elements)


def ref_factor(student: ArrayLike, teacher: ArrayLike, norm: int = 1) -> float:
    module = entry("factor_transfer").build().double()
    s, t = to_smaller(run(np.asarray(student), module.translator, 0.1), run(np.asarray(teacher), module.encoder, 0.1))
    difference = [abs(a - b) for a, b in zip(scaled(flat(s)), scaled(flat(t)), strict=True)]
    return math.fsum(d**norm for d in difference) ** (1 / norm)


def ref_variational(student: ArrayLike, teacher: ArrayLike, elements: str = "mean") -> float:
    module = entry("variational_information").build().double()
    s, t = to_smaller(np.asarray(student), np.asarray(teacher))
    mean = run(s, module.mean, 0.0)
    values = []
    for c, raw in enumerate(module.raw_variance.tolist()):
        variance = math.log(1 + math.exp(raw)) + 1e-5
        for error in flat(mean[c] - t[c]):
            values.append(math.log(variance) / 2 + error**2 / (2 * variance))
    return over(values, elements)


REFERENCES: dict[str, Callable[..., Any]] = {
    "regressed_hint": ref_regressed_hint,
    "factor_transfer": ref_factor,
    "variational_information": ref_variational,
}
