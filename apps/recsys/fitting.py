"""Fits any model of the wing from its configuration: closed forms, solvers, and trained models alike."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apps.recsys.config import ModelConfig, TeacherConfig
from apps.recsys.data.dataset import Dataset
from apps.recsys.data.splits import Split
from apps.recsys.distill import InteractionStep, RecommenderStep, SequenceStep
from apps.recsys.evaluate import Evaluator
from apps.recsys.knowledge import Knowledge
from apps.recsys.models.base import DotRecommender, Recommender
from apps.recsys.models.ensemble import Ensemble
from apps.recsys.models.factors import LightGCN, MatrixFactorization
from apps.recsys.models.linear import Ease, fit_ials
from apps.recsys.models.sasrec import Sasrec
from apps.recsys.models.store import model_options
from apps.recsys.models.two_tower import TwoTower
from kdcore.config import UserError, nearest
from kdcore.trainer import FitResult, Trainer

KINDS = ("mf", "lightgcn", "sasrec", "two_tower", "ease", "ials", "ensemble")
# fitted by one process, without the trainer
SOLVED = ("ease", "ials")


@dataclass
class Fitted:
    """A fitted model and what it took; ``cpu_seconds`` and ``seconds`` include validation during training."""

    model: Recommender
    seconds: float
    cpu_seconds: float
    epochs: int = 0
    validation: Mapping[str, float] | None = None


def fit_model(
    config: ModelConfig,
    split: Split,
    evaluator: Evaluator,
    *,
    seed: int,
    folder: Path | None = None,
    key: str = "",
    context: Mapping[str, Any] | None = None,
    student: DotRecommender | None = None,
    knowledge: Mapping[str, tuple[float, Knowledge]] | None = None,
    dataset: Dataset | None = None,
) -> Fitted:
    """Fit one model on ``split.train``; selection is on ``evaluator`` (validation), never on test.

    Args:
        folder: where checkpoints go; a fit that was killed goes on from there.
        student: a model to train instead of a fresh one (initialised by a teacher, or already holding experts).
        knowledge: name -> (weight, knowledge) of a taught student.
        dataset: where ``split`` comes from; a two_tower model reads the features of its users and items.
    """
    if config.kind not in KINDS:
        raise UserError(f"model kind: got {config.kind!r}, {nearest(config.kind, KINDS)}")
    started = time.perf_counter(), time.process_time()
    if isinstance(config, TeacherConfig) and config.kind == "ensemble":
        return _ensemble(config, split, evaluator, seed, folder, key, context, dataset)
    if config.kind in SOLVED:
        model = _solve(config, split, seed)
        return Fitted(model.eval(), time.perf_counter() - started[0], time.process_time() - started[1])
    model = student if student is not None else new_model(config, split, seed, dataset)
    step = teaching_step(config, model, split, evaluator, knowledge)
    trainer = Trainer(
        config.trainer,
        seed=seed,
        folder=folder,
        key=key,
        context=context,
        description=" ".join(str((context or {}).get(name, "")) for name in ("role", "model")).strip() or config.kind,
    )
    result: FitResult = trainer.fit(step)
    final: Recommender = model.finalize() if isinstance(model, LightGCN) else model
    return Fitted(final.eval(), result.seconds, result.cpu_seconds, result.epochs, result.best_metrics)


def new_model(config: ModelConfig, split: Split, seed: int, dataset: Dataset | None = None) -> DotRecommender:
    """Return a freshly initialised trainable model; two_tower alone needs the ``dataset`` of the split."""
    options = model_options(config.kind, config.options)
    torch.manual_seed(seed)
    if config.kind == "lightgcn":
        return LightGCN(split.train, options)
    if config.kind == "sasrec":
        return Sasrec(split.n_users, split.n_items, options)
    if config.kind == "mf":
        return MatrixFactorization(split.n_users, split.n_items, options)
    if config.kind == "two_tower":
        if dataset is None:
            raise UserError("two_tower: its features are those of a data set, and there is only a split here")
        return TwoTower.fit(split.train, options, dataset.user_features, dataset.item_features)
    raise UserError(f"model kind: got {config.kind!r}, wanted a trainable kind: mf, lightgcn, sasrec or two_tower")


def teaching_step(
    config: ModelConfig,
    model: DotRecommender,
    split: Split,
    evaluator: Evaluator,
    knowledge: Mapping[str, tuple[float, Knowledge]] | None = None,
) -> RecommenderStep:
    """Return the step that trains ``model``, with what a teacher passes on if there is one."""
    loss, sequential = config.optimization.loss, isinstance(model, Sasrec)
    if sequential != (loss == "cross_entropy"):
        wanted = "cross_entropy" if sequential else "bpr or bce"
        raise UserError(f"optimization.loss: got {loss!r} for {config.kind}, wanted {wanted}")
    if isinstance(model, Sasrec):
        return SequenceStep(model, split.train, evaluator, config.optimization, knowledge, config.trainer.max_epochs)
    return InteractionStep(model, split.train, evaluator, config.optimization, knowledge, config.trainer.max_epochs)


def _ensemble(
    config: TeacherConfig,
    split: Split,
    evaluator: Evaluator,
    seed: int,
    folder: Path | None,
    key: str,
    context: Mapping[str, Any] | None,
    dataset: Dataset | None,
) -> Fitted:
    """Fit the members; what they took is what the ensemble took."""
    members: list[Fitted] = []
    for index, member in enumerate(config.members):
        own = folder / f"member-{index}" if folder is not None else None
        named = {**(context or {}), "model": member.kind}
        given: dict[str, Any] = {"folder": own, "key": f"{key}/{index}", "context": named, "dataset": dataset}
        members.append(fit_model(member, split, evaluator, seed=seed, **given))
    seconds, cpu_seconds = (
        sum(each) for each in zip(*((one.seconds, one.cpu_seconds) for one in members), strict=True)
    )
    return Fitted(Ensemble([each.model for each in members], config.weights).eval(), seconds, cpu_seconds)


def _solve(config: ModelConfig, split: Split, seed: int) -> Recommender:
    options = model_options(config.kind, config.options)
    if config.kind == "ease":
        return Ease.fit(split.train, options)
    return fit_ials(split.train, options, seed, threads=config.trainer.threads)
