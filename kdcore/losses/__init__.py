"""Distillation losses: plain functions on tensors, one registry. Imports torch and nothing else."""

from __future__ import annotations

from kdcore.losses.contrast import ContrastiveRepresentation, Queue, contrastive_in_batch
from kdcore.losses.feature import (
    activation_boundary,
    attention_transfer,
    channel_weights,
    hint,
    neuron_selectivity,
    probabilistic_transfer,
    weighted_channels,
)
from kdcore.losses.geometry import angle_relations, distance_relations
from kdcore.losses.layers import (
    LayerMapping,
    attended_layers,
    attention_matrices,
    hidden_states,
    map_layers,
    value_relations,
)
from kdcore.losses.lists import list_net, pairwise_ranking, plackett_luce, privileged_features
from kdcore.losses.nbest import cut_at_blanks, segment_ctc, sequence_ctc
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
from kdcore.losses.regressed import (
    FactorTransfer,
    Hint,
    VariationalInformation,
)
from kdcore.losses.relation import flow_of_solution, input_jacobian, jacobian_matching, singular_vectors
from kdcore.losses.response import (
    binary_soft_targets,
    confidence_penalty,
    decoupled,
    label_smoothing,
    logit_mse,
    normalised,
    regression,
    soft_targets,
)
from kdcore.losses.seq2seq import sequence_level, word_level
from kdcore.losses.sequence import frame_ctc, guided_spikes, spike_mask
from kdcore.losses.similarity import (
    correlation_congruence,
    darkrank_hard,
    darkrank_soft,
    graph_relations,
    similarity_preserving,
)
from kdcore.losses.sparse import sparse_soft_targets
from kdcore.losses.structure import AdversarialAlignment, instance_graph, pixel_pairs
from kdcore.losses.trees import blended_cross_entropy, gradient_and_hessian, james_stein, refit_leaves, tree_targets

__all__ = [
    "AdversarialAlignment",
    "ContrastiveRepresentation",
    "DistillationExperts",
    "FactorTransfer",
    "Hint",
    "LayerMapping",
    "LossEntry",
    "Queue",
    "VariationalInformation",
    "activation_boundary",
    "angle_relations",
    "annealed_temperature",
    "attended_layers",
    "attention_matrices",
    "attention_transfer",
    "binary_soft_targets",
    "blended_cross_entropy",
    "bpr",
    "catalogue",
    "channel_weights",
    "collaborative_distillation",
    "confidence_penalty",
    "contrastive_in_batch",
    "correlation_congruence",
    "cut_at_blanks",
    "darkrank_hard",
    "darkrank_soft",
    "decoupled",
    "distance_relations",
    "entries",
    "entry",
    "flow_of_solution",
    "frame_ctc",
    "get",
    "gradient_and_hessian",
    "graph_relations",
    "guided_spikes",
    "hidden_states",
    "hint",
    "input_jacobian",
    "instance_graph",
    "jacobian_matching",
    "james_stein",
    "label_smoothing",
    "list_net",
    "logit_mse",
    "map_layers",
    "neuron_selectivity",
    "normalised",
    "pairwise_ranking",
    "pixel_pairs",
    "plackett_luce",
    "pointwise_bce",
    "position_weights",
    "privileged_features",
    "probabilistic_transfer",
    "ranking_discrepancy_weights",
    "ranking_distillation",
    "refit_leaves",
    "register",
    "regression",
    "relaxed_ranking",
    "sample_interesting",
    "segment_ctc",
    "sequence_ctc",
    "sequence_level",
    "similarity_preserving",
    "singular_vectors",
    "soft_targets",
    "sparse_soft_targets",
    "spike_mask",
    "student_guided_positions",
    "student_guided_probabilities",
    "teacher_guided_positions",
    "tree_targets",
    "value_relations",
    "weighted_channels",
    "word_level",
]
