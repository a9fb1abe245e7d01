"""The search: one budget for everything compared, validation only, and a killed search goes on as it would have."""

from __future__ import annotations

from collections import Counter

import pytest

from apps.recsys import tune
from apps.recsys.config import load_config
from apps.recsys.knowledge import KNOWLEDGE
from apps.recsys.tune import Tuner
from kdcore.config import UserError, resolved
from kdcore.run import read_log
from tests.recsys.test_pipeline import SETTINGS, configure
from tests.recsys.tiny_run import write_log


def quiet(text: str) -> None:
    """Announce nothing."""


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return write_log(tmp_path_factory.mktemp("data") / "log.csv", titles=False)


@pytest.fixture
def valued(monkeypatch):
    """Score a trial by its settings instead of a fit: a smooth bowl with its best at learning rate 0.01."""
    asked = []

    def score(tuner, config, **taught):
        asked.append((config, taught))
        rate = config.optimization.learning_rate
        return float(-((rate - 0.01) ** 2) - config.options.get("regularization", 0.0) * 1e-3)

    monkeypatch.setattr(Tuner, "_score", score)
    return asked


def parts(out) -> Counter:
    return Counter(trial["part"] for trial in read_log(out / "trials.jsonl"))


def test_every_part_gets_the_same_number_of_trials(log, tmp_path):
    """Two real fits each, of one epoch, through the whole search."""
    config = configure(log, seeds=[3])
    tuned = Tuner(config, tmp_path, 2, quiet).tune()
    assert parts(tmp_path) == {"student_alone": 2, "ials": 2, "bpr": 2, "student": 2}
    again = load_config(file=tmp_path / "tuned.yaml")
    assert resolved(again) == tuned
    trials = read_log(tmp_path / "trials.jsonl")
    for part, got in (
        ("student_alone", again.student.alone["optimization"]),
        ("bpr", again.baselines["bpr"]),
        ("ials", again.baselines["ials"]),
    ):
        best = max((each for each in trials if each["part"] == part), key=lambda each: each["score"])["values"]
        assert {name.removeprefix("optimization."): value for name, value in best.items()}.items() <= got.items()
    best = max((each for each in trials if each["part"] == "student"), key=lambda each: each["score"])["values"]
    assert again.student.optimization.learning_rate == best["optimization.learning_rate"]
    assert again.knowledge["relaxed_ranking"].weight == best["knowledge.relaxed_ranking.weight"]
    assert again.knowledge["relaxed_ranking"].options["length"] == 10  # what was not searched stays


def test_a_trial_is_scored_on_validation_by_the_fit_that_a_run_would_make(log, tmp_path):
    """The stored student of a run with the tuned settings has the score of the trial that found them."""
    tuner = Tuner(configure(log, seeds=[1], baselines={"ials": {}, "bpr": {}}), tmp_path / "tune", 1, quiet)
    tuner.tune()
    scores = {trial["part"]: trial["score"] for trial in read_log(tmp_path / "tune" / "trials.jsonl")}
    config = load_config(file=tmp_path / "tune" / "tuned.yaml")
    rows = tune.Pipeline(config, tmp_path / "run").run_all()
    valid = {(row["role"], row["model"]): row["metrics"]["ndcg@10"] for row in rows if row["split"] == "valid"}
    assert valid["student", "mf-4"] == scores["student"]
    assert valid["student_alone", "mf-4"] == scores["student_alone"]
    assert valid["baseline", "ials-4"] == scores["ials"]
    assert valid["baseline", "bpr-4"] == scores["bpr"]


def test_each_part_is_fitted_as_what_it_is(log, tmp_path, valued):
    """The BPR baseline of a sequential student is a factor model, not the student once more."""
    model = {"kind": "sasrec", "optimization": {"loss": "cross_entropy"}, "options": {"dimension": 4, "length": 4}}
    config = configure(
        log,
        split={"kind": "leave_last_out"},
        teacher={"kind": "ease"},
        student=model,
        knowledge={"sparse_soft_targets": {}},
        baselines={"bpr": {"batch_size": 77}, "ials": {}},
    )
    tuner = Tuner(config, tmp_path, 1, quiet)
    tuner.tune()
    kinds = [(config.kind, config.options.get("dimension"), sorted(taught)) for config, taught in valued]
    assert kinds == [
        ("sasrec", 4, []),
        ("ials", 4, []),
        ("mf", 4, []),
        ("sasrec", 4, ["knowledge", "student"]),
    ]
    assert valued[2][0].optimization.batch_size == 77


def test_a_killed_search_goes_on_as_it_would_have(log, tmp_path, valued):
    config = configure(log, baselines={})
    whole = Tuner(config, tmp_path / "whole", 14, quiet)
    whole.pipeline.prepare()
    wanted = whole._search("student_alone", whole._own_space(), whole._alone, {})
    for killed_after in (3, 12):
        out = tmp_path / f"killed-{killed_after}"
        first = Tuner(config, out, 14, quiet)
        first.pipeline.prepare()
        plain, done = first._alone, []

        def killed(values, plain=plain, done=done, killed_after=killed_after):
            if len(done) == killed_after:
                raise KeyboardInterrupt
            done.append(values)
            return plain(values)

        with pytest.raises(KeyboardInterrupt):
            first._search("student_alone", first._own_space(), killed, {})
        second = Tuner(config, out, 14, quiet)
        second.pipeline.prepare()
        before = len(valued)
        assert second._search("student_alone", second._own_space(), second._alone, {}) == wanted
        assert len(valued) - before == 14 - killed_after
        assert read_log(out / "trials.jsonl") == read_log(tmp_path / "whole" / "trials.jsonl")
    distinct = {tuple(trial["values"].items()) for trial in read_log(tmp_path / "whole" / "trials.jsonl")}
    assert len(distinct) == 14


def test_a_line_torn_by_a_kill_hides_nothing_that_comes_after(log, tmp_path, valued):
    tuner = Tuner(configure(log, baselines={}), tmp_path, 2, quiet)
    tuner.pipeline.prepare()
    tuner._search("student_alone", tuner._own_space(), tuner._alone, {})
    with open(tmp_path / "trials.jsonl", "a", encoding="utf-8") as handle:
        handle.write('{"part": "stud')
    more = Tuner(tuner.config, tmp_path, 4, quiet)
    more._search("student_alone", more._own_space(), more._alone, {})
    assert parts(tmp_path) == {"student_alone": 4}


def test_fewer_trials_than_are_on_disk_profit_no_part(log, tmp_path, valued):
    """A later search of 3 trials takes the first 3 of 6, as the parts that were not yet searched will have."""
    config = configure(log, baselines={})
    many, few = Tuner(config, tmp_path / "many", 6, quiet), Tuner(config, tmp_path / "few", 3, quiet)
    for tuner in (many, few):
        tuner.pipeline.prepare()
    many._search("student_alone", many._own_space(), many._alone, {})
    wanted = few._search("student_alone", few._own_space(), few._alone, {})
    later = Tuner(config, tmp_path / "many", 3, quiet)
    assert later._search("student_alone", later._own_space(), later._alone, {}) == wanted


def test_a_trial_that_diverges_is_the_worst_and_the_search_goes_on(log, tmp_path, valued):
    tuner = Tuner(configure(log, baselines={}), tmp_path, 3, quiet)
    tuner.pipeline.prepare()
    tried = []

    def score(values):
        tried.append(values)
        if len(tried) == 2:
            raise FloatingPointError("loss became nan")
        return tuner._alone(values)

    best = tuner._search("student_alone", tuner._own_space(), score, {})
    assert len(tried) == 3
    assert best != tried[1]
    assert Tuner(tuner.config, tmp_path, 3, quiet)._search("student_alone", tuner._own_space(), score, {}) == best


def test_what_alone_already_sets_is_kept(log, tmp_path, valued):
    student = {**SETTINGS["student"], "alone": {"trainer": {"max_epochs": 9}}}
    tuned = Tuner(configure(log, student=student, baselines={}), tmp_path, 1, quiet).tune()
    assert tuned["student"]["alone"]["trainer"] == {"max_epochs": 9}
    assert set(tuned["student"]["alone"]["optimization"]) == {"learning_rate", "weight_decay"}


def test_the_first_trial_of_every_part_is_what_the_recipe_says(log, tmp_path, valued):
    """Where a setting lies outside its bounds, or has no value, it is drawn like in any other trial."""
    student = {**SETTINGS["student"], "optimization": {"learning_rate": 0.02, "weight_decay": 1e-5}}
    baselines = {"ials": {"alpha": 3.0}, "bpr": {"learning_rate": 0.5, "weight_decay": 1e-4}}
    Tuner(configure(log, student=student, baselines=baselines), tmp_path, 2, quiet).tune()
    first: dict = {}
    for trial in read_log(tmp_path / "trials.jsonl"):
        first.setdefault(trial["part"], trial["values"])
    assert first["student_alone"] == {"optimization.learning_rate": 0.02, "optimization.weight_decay": 1e-5}
    assert first["ials"] == {"regularization": 0.1, "alpha": 3.0, "iterations": 15}
    assert first["bpr"]["weight_decay"] == 1e-4
    assert first["bpr"]["learning_rate"] <= 3e-2  # 0.5 is no place the search may go
    assert first["student"]["optimization.learning_rate"] == 0.02
    assert first["student"]["knowledge.relaxed_ranking.weight"] == 0.5


def test_every_knowledge_has_a_space_of_settings_it_knows():
    assert set(tune._KNOWLEDGE) == set(KNOWLEDGE)
    for name, space in tune._KNOWLEDGE.items():
        for path, (low, high, kind) in space.items():
            assert low < high
            assert kind in ("log", "linear", "integer")
            if path != "weight":
                options = KNOWLEDGE[name].options_type()
                assert hasattr(options, path.removeprefix("options."))


def test_no_trial_is_a_user_error(log, tmp_path):
    with pytest.raises(UserError, match="--trials: got 0"):
        Tuner(configure(log), tmp_path, 0, quiet)
