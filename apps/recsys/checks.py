"""The checks of a whole configuration before anything runs: refuse at once what would fail after hours."""

from __future__ import annotations

import math

from apps.recsys.config import ModelConfig, RecsysConfig, TeacherConfig, alone_config, baseline_config
from apps.recsys.fitting import KINDS
from apps.recsys.knowledge import KNOWLEDGE
from apps.recsys.metrics import parse_metric
from apps.recsys.models.ensemble import Ensemble
from apps.recsys.models.options import build_options
from apps.recsys.models.store import model_options
from kdcore.config import UserError, nearest

BASELINES = ("ials", "svd", "bpr")
TRAINABLE = ("mf", "lightgcn", "sasrec", "two_tower")
_SPLITS = ("leave_last_out", "ratio", "global_time", "files")
# teachers that answer from any history, and teachers with user and item vectors
_READ_HISTORIES = ("sasrec", "ease")
_HAVE_VECTORS = ("mf", "lightgcn", "sasrec", "ials", "two_tower")


def check_config(config: RecsysConfig) -> None:
    """Raise UserError for the first setting that cannot work, naming it."""
    if not config.seeds or len(set(config.seeds)) != len(config.seeds):
        raise UserError(f"seeds: got {config.seeds}, wanted distinct seeds, at least one")
    if config.split.kind not in _SPLITS:
        raise UserError(f"split.kind: got {config.split.kind!r}, {nearest(config.split.kind, _SPLITS)}")
    varies = config.split.kind == "ratio" and config.split.seed is None
    if config.teacher.seed is not None and varies and config.seeds != [config.teacher.seed]:
        # a teacher fitted on another split has seen what its students are tested on
        raise UserError("teacher.seed: one teacher for all seeds needs one split; set split.seed as well")
    if not any(parse_metric(name).per_user for name in config.metrics):
        raise UserError(f"metrics: got {config.metrics}, wanted at least one with a value per user, such as ndcg@10")
    _check_teacher(config.teacher)
    _check_student(config)
    _check_knowledge(config)
    for kind in config.baselines:
        if kind not in BASELINES:
            raise UserError(f"baselines: got {kind!r}, {nearest(kind, BASELINES)}")
        if kind != "svd":
            _check_model(f"baselines.{kind}", baseline_config(config, kind))


def _check_teacher(teacher: TeacherConfig) -> None:
    if teacher.kind != Ensemble.kind:
        _check_model("teacher", teacher)
        return
    if not teacher.members:
        raise UserError("teacher.members: wanted at least one member, got none")
    for member in teacher.members:
        if member.kind == Ensemble.kind:
            raise UserError("teacher.members: got an ensemble, wanted models of other kinds")
        _check_model("teacher.members", member)
    if teacher.weights and len(teacher.weights) != len(teacher.members):
        wanted = f"{len(teacher.members)}, one a member"
        raise UserError(f"teacher.weights: got {len(teacher.weights)} weights, wanted {wanted}")
    if teacher.weights and not (min(teacher.weights) >= 0 and 0 < sum(teacher.weights) < math.inf):
        raise UserError(f"teacher.weights: got {teacher.weights}, wanted numbers of 0 or more, one of them above 0")


def _check_student(config: RecsysConfig) -> None:
    student = config.student
    if student.kind not in TRAINABLE:
        raise UserError(f"student.kind: got {student.kind!r}, {nearest(student.kind, TRAINABLE)}")
    if student.initialize not in ("random", "svd"):
        raise UserError(f"student.initialize: got {student.initialize!r}, wanted 'random' or 'svd'")
    if student.initialize == "svd" and student.kind not in ("mf", "sasrec"):
        raise UserError(f"student.initialize svd: wanted a student of kind mf or sasrec, got {student.kind}")
    _check_model("student", student)
    _check_model("student.alone", alone_config(config))


def _check_model(what: str, model: ModelConfig) -> None:
    if model.kind not in KINDS:
        raise UserError(f"{what}.kind: got {model.kind!r}, {nearest(model.kind, KINDS)}")
    model_options(model.kind, model.options)
    monitor = parse_metric(model.trainer.monitor)
    if monitor.name != model.trainer.monitor:
        raise UserError(f"{what}.trainer.monitor: got {model.trainer.monitor!r}, wanted {monitor.name!r}")
    sequential, loss = model.kind == "sasrec", model.optimization.loss
    if model.kind in TRAINABLE and sequential != (loss == "cross_entropy"):
        wanted = "cross_entropy" if sequential else "bpr or bce"
        raise UserError(f"{what}.optimization.loss: got {loss!r} for {model.kind}, wanted {wanted}")


def _check_knowledge(config: RecsysConfig) -> None:
    teacher, sequential = config.teacher, config.student.kind == "sasrec"
    kinds = [member.kind for member in teacher.members] if teacher.kind == Ensemble.kind else [teacher.kind]
    if config.knowledge and sequential and not set(kinds) <= set(_READ_HISTORIES):
        raise UserError(
            f"teacher.kind: got {' and '.join(kinds)}, wanted {' or '.join(_READ_HISTORIES)} for a sequential "
            "student: its teacher is asked about every prefix of a history"
        )
    for name, each in config.knowledge.items():
        if name not in KNOWLEDGE:
            raise UserError(f"knowledge: got {name!r}, {nearest(name, KNOWLEDGE)}")
        cls = KNOWLEDGE[name]
        build_options(f"knowledge.{name}", cls.options_type, each.options)
        if not (math.isfinite(each.weight) and each.weight >= 0):
            raise UserError(f"knowledge.{name}.weight: got {each.weight}, wanted 0 or more")
        if cls.needs_user_vectors and sequential:
            raise UserError(f"knowledge.{name}: wanted a student with a vector a user (mf, lightgcn), got sasrec")
        if cls.needs_teacher_vectors and teacher.kind not in _HAVE_VECTORS:
            raise UserError(
                f"knowledge.{name}: wanted a teacher with user and item vectors ({', '.join(_HAVE_VECTORS)}), "
                f"got {teacher.kind}"
            )
