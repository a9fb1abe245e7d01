"""Recipes and what a configuration file may say; every recipe runs end to end on a tiny log."""

from __future__ import annotations

import json
from importlib import resources

import pytest
import yaml

from apps.recsys.checks import check_config
from apps.recsys.config import (
    RecsysConfig,
    alone_config,
    baseline_config,
    load_config,
    read_recipe,
    recipe_names,
    student_dimension,
)
from apps.recsys.pipeline import Pipeline
from kdcore.config import UserError, build
from tests.recsys.tiny_run import write_log

TINY = [
    ("student.trainer.max_epochs", "1"),
    ("student.trainer.tensorboard", "false"),
    ("teacher.trainer.max_epochs", "1"),
    ("teacher.trainer.tensorboard", "false"),
]
ROLES = {"teacher", "student_alone", "student", "baseline"}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_short_and_says_what_it_is(name):
    text = (resources.files("apps.recsys") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    config = load_config(recipe=name)
    assert config.recipe == name
    assert config.title
    assert config.reference
    assert config.knowledge
    check_config(config)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_runs_end_to_end_for_one_epoch(name, tmp_path):
    log = write_log(tmp_path / "log.csv", titles=False)
    config = load_config(recipe=name, overrides=[("data.path", str(log)), *TINY])
    rows = Pipeline(config, tmp_path / "run").run_all()
    assert {row["role"] for row in rows} == ROLES
    assert {row["split"] for row in rows} == {"valid", "test"}
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    student = [line for line in logged if line["role"] == "student"]
    assert len(student) == 1
    assert set(config.knowledge) < set(student[0]["terms"])
    alone = [line for line in logged if line["role"] == "student_alone"]
    assert not set(config.knowledge) & set(alone[0]["terms"])


def config(**values) -> RecsysConfig:
    return build(RecsysConfig, read_recipe("relaxed_ranking") | values)


def test_alone_is_the_student_but_for_what_it_sets():
    student = {
        "kind": "mf",
        "options": {"dimension": 6},
        "optimization": {"learning_rate": 0.01, "weight_decay": 0.002},
        "trainer": {"max_epochs": 7},
        "alone": {"optimization": {"learning_rate": 0.5}},
    }
    alone = alone_config(config(student=student))
    assert (alone.kind, alone.options, alone.trainer.max_epochs) == ("mf", {"dimension": 6}, 7)
    assert (alone.optimization.learning_rate, alone.optimization.weight_decay) == (0.5, 0.002)
    for wrong in ({"knowledge": {}}, {"optimization": 3}, {"optimization": {"learning_speed": 1}}):
        with pytest.raises(UserError):
            alone_config(config(student=student | {"alone": wrong}))


def test_baselines_have_the_students_size_also_where_it_is_the_default():
    baselines = {"ials": {"alpha": 3.0}, "bpr": {"learning_rate": 0.02}}
    sequential = {"kind": "sasrec", "optimization": {"loss": "cross_entropy"}}
    for student, size in (({"kind": "mf"}, 8), ({"kind": "mf", "options": {"dimension": 5}}, 5), (sequential, 64)):
        given = config(student=student, baselines=baselines)
        assert student_dimension(given) == size
        ials, bpr = baseline_config(given, "ials"), baseline_config(given, "bpr")
        assert (ials.kind, ials.options) == ("ials", {"dimension": size, "alpha": 3.0})
        assert (bpr.kind, bpr.options, bpr.optimization.loss) == ("mf", {"dimension": size}, "bpr")
        assert bpr.optimization.learning_rate == 0.02
    assert baseline_config(given, "ials", {"alpha": 4.0}).options["alpha"] == 4.0


def test_a_file_and_overrides(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(read_recipe("relaxed_ranking")))
    made = load_config(file=file, overrides=[("knowledge.relaxed_ranking.weight", "3e-2"), ("seeds", "[4, 5]")])
    assert made.knowledge["relaxed_ranking"].weight == 0.03
    assert made.seeds == [4, 5]
    with pytest.raises(UserError, match="either --recipe NAME or --config FILE"):
        load_config()
    with pytest.raises(UserError, match="either --recipe NAME or --config FILE"):
        load_config(recipe="relaxed_ranking", file=file)
    with pytest.raises(UserError, match=r"'relaxed_rankin'.*relaxed_ranking"):
        load_config(recipe="relaxed_rankin")
    with pytest.raises(UserError, match="no_such"):
        load_config(recipe="relaxed_ranking", overrides=[("student.no_such", "1")])


SEQUENTIAL = {"kind": "sasrec", "optimization": {"loss": "cross_entropy"}}
MEMBERS = [{"kind": "ease"}, {"kind": "ials"}]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seeds": []}, "at least one"),
        ({"seeds": [1, 1]}, "distinct"),
        ({"split": {"kind": "random"}}, "split.kind"),
        ({"metrics": ["coverage@10"]}, "a value per user"),
        ({"metrics": ["ndgc@10"]}, "ndcg"),
        ({"teacher": {"kind": "ease", "seed": 0}, "seeds": [0, 1]}, "one teacher for all seeds needs one split"),
        # one seed, but another split than the teacher's: it would have seen the students' test part
        ({"teacher": {"kind": "ease", "seed": 0}, "seeds": [1]}, "one teacher for all seeds needs one split"),
        ({"teacher": {"kind": "bert"}}, "teacher.kind"),
        ({"teacher": {"kind": "ease", "options": {"l2": -1.0}}}, "l2"),
        ({"teacher": {"kind": "ensemble"}}, "at least one member"),
        ({"teacher": {"kind": "ensemble", "members": [{"kind": "ensemble"}]}}, "got an ensemble"),
        ({"teacher": {"kind": "ensemble", "members": MEMBERS, "weights": [1.0]}}, "got 1 weights, wanted 2"),
        ({"teacher": {"kind": "ensemble", "members": MEMBERS, "weights": [1.0, -1.0]}}, "0 or more"),
        ({"teacher": {"kind": "ensemble", "members": [{"kind": "mf", "options": {"dim": 3}}]}}, "dimension"),
        ({"teacher": {"kind": "lightgcn", "optimization": {"loss": "cross_entropy"}}}, "bpr or bce"),
        ({"student": {"kind": "ease"}}, "student.kind"),
        ({"student": {"kind": "mf", "initialize": "ones"}}, "initialize"),
        ({"student": {"kind": "lightgcn", "initialize": "svd"}}, "wanted a student of kind mf"),
        ({"student": {"kind": "sasrec"}}, "cross_entropy"),
        ({"student": {"kind": "mf", "alone": {"options": {"dimension": 0}}}}, "dimension"),
        ({"student": {"kind": "mf", "alone": {"optimization": {"loss": "cross_entropy"}}}}, "student.alone"),
        ({"student": {"kind": "mf", "trainer": {"monitor": "ndcg"}}}, "cutoff"),
        ({"student": {"kind": "mf", "trainer": {"monitor": "NDCG@10"}}}, "ndcg@10"),
        ({"student": SEQUENTIAL, "teacher": {"kind": "ials"}}, "prefix of a history"),
        ({"student": SEQUENTIAL, "teacher": {"kind": "ensemble", "members": MEMBERS}}, "prefix of a history"),
        ({"student": SEQUENTIAL, "knowledge": {"item_relaxed_ranking": {}}}, "a vector a user"),
        ({"knowledge": {"relaxed_rankin": {}}}, "relaxed_ranking"),
        ({"knowledge": {"relaxed_ranking": {"weight": -1.0}}}, "weight"),
        ({"knowledge": {"relaxed_ranking": {"options": {"interesting": 0}}}}, "interesting"),
        ({"knowledge": {"distillation_experts": {}}}, "a teacher with user and item vectors"),
        ({"baselines": {"popular": {}}}, "baselines"),
        ({"baselines": {"ials": {"alfa": 1.0}}}, "alpha"),
        ({"baselines": {"bpr": {"loss": "cross_entropy"}}}, "bpr or bce"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(values, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        Pipeline(config(**values), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_one_seed_may_share_its_teachers_split():
    check_config(config(teacher={"kind": "ease", "seed": 3}, seeds=[3]))
    check_config(config(teacher={"kind": "ease", "seed": 0}, seeds=[1, 2], split={"kind": "ratio", "seed": 5}))
