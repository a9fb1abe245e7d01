"""Who teaches whom: blending several teachers, composing losses, and the ways of teaching the one trainer runs."""

from __future__ import annotations

from kdcore.teaching.amalgamation import AmalgamationStep, CommonFeatures, most_confident
from kdcore.teaching.blending import (
    TeacherEnsemble,
    average_scores,
    average_soft_targets,
    blend_weights,
    normalise_scores,
)
from kdcore.teaching.codistillation import CodistillationStep, solo_fabric
from kdcore.teaching.consistency import ClassWiseStep, DataDistortionStep
from kdcore.teaching.exits import DeepToShallowStep, EarlyAnswer, ExitNetwork
from kdcore.teaching.federated import FederatedResult, Traffic, federated, federated_average
from kdcore.teaching.generations import Residual, Stage, assistant_chain, born_again, residual_assistant
from kdcore.teaching.lifelong import Heads, WithoutForgettingStep, choose_exemplars
from kdcore.teaching.mutual import DiversePeersStep, MutualLearningStep, Peers
from kdcore.teaching.pruning import CrossDistillationStep, finish_pruning, prune_channels, remaining_parameters
from kdcore.teaching.quantised import (
    ExportedStudent,
    convert_quantised,
    keep_rounded,
    prepare_quantised,
    round_weights,
    set_rounding,
    stored_bytes,
)
from kdcore.teaching.registry import TeachingEntry, teaching, teaching_entries, teaching_entry
from kdcore.teaching.robust import AdversariallyRobustStep, DefensiveStep, Tempered, attack
from kdcore.teaching.schedules import Schedule, switched_on, warm_up
from kdcore.teaching.several import (
    SeveralTeachersStep,
    agreement_weights,
    confidence_weights,
    easiest,
    mixture,
)
from kdcore.teaching.step import DistillationStep, Learning, frozen, labels_term
from kdcore.teaching.synthesis import Samples, SynthesisStep
from kdcore.teaching.taps import Taps
from kdcore.teaching.terms import Term, Terms

__all__ = [
    "AdversariallyRobustStep",
    "AmalgamationStep",
    "ClassWiseStep",
    "CodistillationStep",
    "CommonFeatures",
    "CrossDistillationStep",
    "DataDistortionStep",
    "DeepToShallowStep",
    "DefensiveStep",
    "DistillationStep",
    "DiversePeersStep",
    "EarlyAnswer",
    "ExitNetwork",
    "ExportedStudent",
    "FederatedResult",
    "Heads",
    "Learning",
    "MutualLearningStep",
    "Peers",
    "Residual",
    "Samples",
    "Schedule",
    "SeveralTeachersStep",
    "Stage",
    "SynthesisStep",
    "Taps",
    "TeacherEnsemble",
    "TeachingEntry",
    "Tempered",
    "Term",
    "Terms",
    "Traffic",
    "WithoutForgettingStep",
    "agreement_weights",
    "assistant_chain",
    "attack",
    "average_scores",
    "average_soft_targets",
    "blend_weights",
    "born_again",
    "choose_exemplars",
    "confidence_weights",
    "convert_quantised",
    "easiest",
    "federated",
    "federated_average",
    "finish_pruning",
    "frozen",
    "keep_rounded",
    "labels_term",
    "mixture",
    "most_confident",
    "normalise_scores",
    "prepare_quantised",
    "prune_channels",
    "remaining_parameters",
    "residual_assistant",
    "round_weights",
    "set_rounding",
    "solo_fabric",
    "stored_bytes",
    "switched_on",
    "teaching",
    "teaching_entries",
    "teaching_entry",
    "warm_up",
]
