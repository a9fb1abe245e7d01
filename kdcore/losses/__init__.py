"""Distillation losses: plain functions on tensors, one registry. Imports torch and nothing else."""

from __future__ import annotations

from kdcore.losses.geometry import angle_relations, distance_relations
from kdcore.losses.ranking import (
    DistillationExperts,
    annealed_temperature,
    bpr,
    collaborative_distillation,
    pointwise_bce,
    position_weights,
    ranking_discrepancy_weights,
    ranking_distillation,
    relaxed_ranking,
    sample_interesting,
    student_guided_positions,
    student_guided_probabilities,
    teacher_guided_positions,
)
from kdcore.losses.registry import LossEntry, catalogue, entries, entry, get, register
from kdcore.losses.response import (
    binary_soft_targets,
    confidence_penalty,
    decoupled,
    label_smoothing,
    logit_mse,
    regression,
    soft_targets,
    sparse_soft_targets,
)

__all__ = [
    "DistillationExperts",
    "LossEntry",
    "angle_relations",
    "annealed_temperature",
    "binary_soft_targets",
    "bpr",
    "catalogue",
    "collaborative_distillation",
    "confidence_penalty",
    "decoupled",
    "distance_relations",
    "entries",
    "entry",
    "get",
    "label_smoothing",
    "logit_mse",
    "pointwise_bce",
    "position_weights",
    "ranking_discrepancy_weights",
    "ranking_distillation",
    "register",
    "regression",
    "relaxed_ranking",
    "sample_interesting",
    "soft_targets",
    "sparse_soft_targets",
    "student_guided_positions",
    "student_guided_probabilities",
    "teacher_guided_positions",
]
