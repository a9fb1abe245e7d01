"""Every kind of model fitted from its configuration, from training data alone, the same for the same seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from apps.recsys import fitting
from apps.recsys.config import ModelConfig, TeacherConfig
from apps.recsys.data.splits import make_split
from apps.recsys.distill import Optimization
from apps.recsys.evaluate import Evaluator
from apps.recsys.fitting import fit_model, new_model, teaching_step
from apps.recsys.knowledge import KNOWLEDGE
from apps.recsys.models.factors import MatrixFactorization
from apps.recsys.models.linear import Ease, EaseOptions, IalsOptions, fit_ials
from kdcore.config import UserError
from kdcore.trainer_config import TrainerConfig
from tests.recsys.made import Table, factors, histories, history_of, lessons, split

SPLIT = split(16, 24, longest=12)
EVALUATOR = Evaluator(SPLIT, "valid", ("ndcg@10",))
USERS = torch.arange(16)
TRAINER = TrainerConfig(max_epochs=3, patience=0, tensorboard=False, threads=1)
GRADIENT = {"optimization": Optimization(learning_rate=0.05, batch_size=32), "trainer": TRAINER}
CONFIGS = {
    "mf": ModelConfig("mf", {"dimension": 4}, **GRADIENT),
    "lightgcn": ModelConfig("lightgcn", {"dimension": 4, "layers": 2}, **GRADIENT),
    "sasrec": ModelConfig(
        "sasrec",
        {"dimension": 4, "length": 5},
        Optimization(loss="cross_entropy", batch_size=4, learning_rate=0.01),
        TRAINER,
    ),
    "ease": ModelConfig("ease", {"l2": 3.0}),
    "ials": ModelConfig("ials", {"dimension": 4}, trainer=TRAINER),
}
CONFIGS["ensemble"] = TeacherConfig(
    "ensemble", members=[CONFIGS["ease"], CONFIGS["mf"], CONFIGS["sasrec"]], weights=[1.0, 1.0, 2.0]
)


def scores(model) -> torch.Tensor:
    with torch.no_grad():
        return model.scores(USERS, SPLIT.train)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_seed_decides_the_model(kind):
    first, again, other = (fit_model(CONFIGS[kind], SPLIT, EVALUATOR, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(scores(first.model), scores(again.model))
    assert torch.equal(scores(first.model), scores(other.model)) == (kind == "ease")
    assert not first.model.training
    assert first.seconds > 0


@pytest.mark.parametrize("kind", CONFIGS)
def test_nothing_of_the_test_part_enters_a_model(kind):
    """Other test items, the same model, bit for bit; with one validation of each."""
    other = make_split("made up", SPLIT.train, SPLIT.valid, histories(16, 24, shortest=1, seed=9))
    got = fit_model(CONFIGS[kind], other, Evaluator(other, "valid", ("ndcg@10",)), seed=0)
    assert torch.equal(scores(got.model), scores(fit_model(CONFIGS[kind], SPLIT, EVALUATOR, seed=0).model))


@pytest.mark.parametrize("kind", ["mf", "sasrec"])
def test_validation_chooses_among_epochs_but_teaches_nothing(kind):
    """With one epoch there is no choice, so other validation items change nothing either."""
    config = replace(CONFIGS[kind], trainer=replace(TRAINER, max_epochs=1))
    other = make_split("made up", SPLIT.train, histories(16, 24, shortest=1, seed=9), SPLIT.test)
    got = fit_model(config, other, Evaluator(other, "valid", ("ndcg@10",)), seed=0)
    assert torch.equal(scores(got.model), scores(fit_model(config, SPLIT, EVALUATOR, seed=0).model))


def test_the_best_epoch_is_kept():
    config = replace(CONFIGS["mf"], trainer=replace(TRAINER, max_epochs=12))
    fitted = fit_model(config, SPLIT, EVALUATOR, seed=0)
    assert EVALUATOR(fitted.model).values == fitted.validation
    best = 0.0
    for epochs in range(1, 13):
        shorter = replace(config, trainer=replace(TRAINER, max_epochs=epochs))
        best = max(best, fit_model(shorter, SPLIT, EVALUATOR, seed=0).validation["ndcg@10"])
    assert fitted.validation["ndcg@10"] == best


def test_training_lowers_the_loss_and_beats_chance():
    """Two groups of users, two of items: what a factor model must find."""
    rng = np.random.default_rng(0)
    lists = [(rng.permutation(12)[:10] + 12 * (user % 2)).tolist() for user in range(16)]
    parts = [history_of([own[part] for own in lists], 24) for part in (slice(6), slice(6, 8), slice(8, 10))]
    made = make_split("two groups", *parts)
    evaluator = Evaluator(made, "valid", ("recall@10",))
    trainer = replace(TRAINER, max_epochs=30, monitor="recall@10")
    fitted = fit_model(replace(CONFIGS["mf"], trainer=trainer), made, evaluator, seed=0)
    assert fitted.validation["recall@10"] > 0.95  # by chance 10 of 18 unseen


def test_closed_forms_are_the_functions_themselves():
    ease = fit_model(CONFIGS["ease"], SPLIT, EVALUATOR, seed=0).model
    assert torch.equal(ease.weight, Ease.fit(SPLIT.train, EaseOptions(3.0)).weight)
    ials = fit_model(CONFIGS["ials"], SPLIT, EVALUATOR, seed=4).model
    assert torch.equal(ials.item, fit_ials(SPLIT.train, IalsOptions(dimension=4), 4, threads=1).item)


def test_a_graph_teacher_is_stored_as_vectors():
    model = fit_model(CONFIGS["lightgcn"], SPLIT, EVALUATOR, seed=0).model
    assert isinstance(model, MatrixFactorization)
    assert model.label() == "lightgcn-4"


def test_an_ensemble_has_its_members_and_goes_on_where_a_kill_left_it(tmp_path, monkeypatch):
    whole = fit_model(CONFIGS["ensemble"], SPLIT, EVALUATOR, seed=0, key="k", folder=tmp_path / "whole").model
    assert whole.label() == "ease+mf-4+sasrec-4"
    for member, kind in zip(whole.members, ("ease", "mf", "sasrec"), strict=True):
        assert torch.equal(scores(member), scores(fit_model(CONFIGS[kind], SPLIT, EVALUATOR, seed=0).model))
    steps = []
    plain = fitting.SequenceStep.forward

    def killed(step, batch):
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return plain(step, batch)

    monkeypatch.setattr(fitting.SequenceStep, "forward", killed)
    with pytest.raises(KeyboardInterrupt):
        fit_model(CONFIGS["ensemble"], SPLIT, EVALUATOR, seed=0, key="k", folder=tmp_path / "killed")

    def refuse(step, batch):
        raise AssertionError("the finished member was trained again")

    monkeypatch.setattr(fitting.InteractionStep, "forward", refuse)
    again = fit_model(CONFIGS["ensemble"], SPLIT, EVALUATOR, seed=0, key="k", folder=tmp_path / "killed").model
    assert torch.equal(scores(again), scores(whole))


def test_a_given_student_is_trained_with_what_it_is_taught(tmp_path):
    """A teacher that likes one item above all: the taught student ranks it higher than the one alone."""
    table = torch.zeros(16, 24)
    table[:, 23] = 50.0
    asked = lessons(Table(table), SPLIT.train, tmp_path)
    kind = KNOWLEDGE["soft_targets"]
    student = new_model(CONFIGS["mf"], SPLIT, 0)
    knowledge = {"soft_targets": (5.0, kind(kind.options_type(), asked))}
    taught = fit_model(CONFIGS["mf"], SPLIT, EVALUATOR, seed=0, student=student, knowledge=knowledge).model
    assert taught is student
    alone = fit_model(CONFIGS["mf"], SPLIT, EVALUATOR, seed=0).model
    rank = [(scores(model) > scores(model)[:, 23:]).sum(dim=1).float().mean() for model in (taught, alone)]
    assert rank[0] < rank[1] - 2


def test_fresh_models_of_a_seed_are_equal_whatever_was_drawn_before():
    first = new_model(CONFIGS["sasrec"], SPLIT, 3)
    torch.randn(7)
    second = new_model(CONFIGS["sasrec"], SPLIT, 3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_wrong_kinds_and_losses_are_refused():
    with pytest.raises(UserError, match=r"model kind: got 'eas'.*ease"):
        fit_model(ModelConfig("eas"), SPLIT, EVALUATOR, seed=0)
    with pytest.raises(UserError, match="trainable kind"):
        new_model(CONFIGS["ease"], SPLIT, 0)
    with pytest.raises(UserError, match="wanted bpr or bce"):
        teaching_step(
            replace(CONFIGS["mf"], optimization=Optimization("cross_entropy")), factors(16, 24), SPLIT, EVALUATOR
        )
    with pytest.raises(UserError, match="wanted cross_entropy"):
        fit_model(replace(CONFIGS["sasrec"], optimization=Optimization("bpr")), SPLIT, EVALUATOR, seed=0)
