"""Structure losses, slow and obvious: loops over the formulas, the modules' seeded parameters read off."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from kdcore.losses import entry
from tests.kdcore.losses.references.relation import dot, normalised

Rows = list[list[float]]


def ref_contrast(student: list[float], teacher: list[float], contrast: list[int]) -> float:
    loss = entry("contrastive_representation").build().double()
    parameters = {k: v.detach().numpy() for k, v in loss.state_dict().items()}
    of_student = normalised(parameters["student_head.weight"] @ student + parameters["student_head.bias"])
    of_teacher = normalised(parameters["teacher_head.weight"] @ teacher + parameters["teacher_head.bias"])
    total = 0.0
    for way, (embedding, bank) in enumerate(((of_student, "teacher_bank"), (of_teacher, "student_bank"))):
        z = math.exp(parameters["log_constants"][way])
        for place, index in enumerate(contrast):
            p = math.exp(dot(embedding, parameters[bank][index]) / loss.temperature) / z
            h = p / (p + (len(contrast) - 1) / loss.samples)
            total -= math.log(h if place == 0 else 1 - h)
    return total


def ref_in_batch(student: Rows, teacher: Rows, temperature: float = 0.07, queue: Any = None) -> list[float]:
    keys = teacher + ([] if queue is None else queue.tolist())
    losses = []
    for i, row in enumerate(student):
        powers = [math.exp(dot(normalised(row), normalised(key)) / temperature) for key in keys]
        losses.append(-math.log(powers[i] / math.fsum(powers)))
    return losses


def ref_instance_graph(
    s_first: Rows,
    s_second: Rows,
    t_first: Rows,
    t_second: Rows,
    vertices: float = 1.0,
    edges: float = 1.0,
    transformation: float = 1.0,
) -> list[float]:
    rows = range(len(s_first))
    losses = []
    for i in rows:
        total = vertices * math.dist(s_second[i], t_second[i]) ** 2
        for s, t in ((s_first, t_first), (s_second, t_second)):
            total += edges * float(
                np.mean([(math.dist(s[i], s[j]) ** 2 - math.dist(t[i], t[j]) ** 2) ** 2 for j in rows])
            )
        moved = math.dist(s_first[i], s_second[i]) ** 2 - math.dist(t_first[i], t_second[i]) ** 2
        losses.append(total + transformation * moved**2)
    return losses


def ref_pixel_pairs(student: Any, teacher: Any, grid: int = 8) -> float:
    student, teacher = np.asarray(student), np.asarray(teacher)
    height = min(grid, student.shape[1], teacher.shape[1])
    width = min(grid, student.shape[2], teacher.shape[2])

    def nodes(maps: Any) -> list[Any]:
        _, h, w = maps.shape
        result = []
        for i in range(height):
            for j in range(width):
                cell = maps[:, i * h // height : -(-(i + 1) * h // height), j * w // width : -(-(j + 1) * w // width)]
                result.append(normalised(cell.mean((1, 2))))
        return result

    of_student, of_teacher = nodes(student), nodes(teacher)
    errors = [
        (dot(a, b) - dot(c, d)) ** 2
        for a, c in zip(of_student, of_teacher, strict=True)
        for b, d in zip(of_student, of_teacher, strict=True)
    ]
    return math.fsum(errors) / len(errors)


def ref_adversarial(student: list[float]) -> float:
    parameters = [p.detach().numpy() for p in entry("adversarial_alignment").build().double().parameters()]
    values = np.asarray(student)
    for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
        values = weight @ values + bias
        values = np.where(values > 0, values, 0.2 * values)
    score = float((parameters[-2] @ values + parameters[-1])[0])
    return -math.log(1 / (1 + math.exp(-score)))


REFERENCES: dict[str, Callable[..., Any]] = {
    "contrastive_representation": ref_contrast,
    "contrastive_in_batch": ref_in_batch,
    "instance_graph": ref_instance_graph,
    "pixel_pairs": ref_pixel_pairs,
    "adversarial_alignment": ref_adversarial,
}
