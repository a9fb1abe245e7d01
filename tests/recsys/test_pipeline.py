"""Runs from data to metrics: what is written, what is not done twice, and what a kill leaves."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from apps.recsys import fitting, initialize
from apps.recsys import pipeline as pipeline_module
from apps.recsys.compare import compare
from apps.recsys.config import RecsysConfig, alone_config
from apps.recsys.data.splits import leave_last_out, ratio
from apps.recsys.evaluate import Evaluator
from apps.recsys.models import linear
from apps.recsys.models.store import load_model
from apps.recsys.pipeline import Pipeline
from kdcore.config import UserError, build, resolved
from kdcore.locks import beside, locked
from kdcore.run import read_json, read_log
from tests.recsys.tiny_run import write_log

QUICK = {"max_epochs": 2, "tensorboard": False, "threads": 1}
SETTINGS = {
    "recipe": "tiny",
    "split": {"kind": "ratio", "test": 0.2, "valid": 0.1},
    "teacher": {"kind": "ease", "options": {"l2": 5.0}},
    "student": {
        "kind": "mf",
        "options": {"dimension": 4},
        "optimization": {"batch_size": 64, "learning_rate": 0.02},
        "trainer": QUICK,
    },
    "knowledge": {"relaxed_ranking": {"weight": 0.5, "options": {"length": 10, "interesting": 4, "uninteresting": 4}}},
    "baselines": {"ials": {"iterations": 3}, "svd": {}, "bpr": {"learning_rate": 0.05}},
    "seeds": [0, 1],
}
ROW = {
    "domain",
    "recipe",
    "model",
    "role",
    "seed",
    "split",
    "params",
    "bytes",
    "metrics",
    "latency_ms",
    "train_seconds",
}


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return write_log(tmp_path_factory.mktemp("data") / "log.csv", titles=False)


def configure(log: Path, **values) -> RecsysConfig:
    return build(RecsysConfig, {**SETTINGS, "data": {"path": str(log)}, **values})


@pytest.fixture(scope="module")
def finished(log, tmp_path_factory) -> Path:
    """One whole run that nothing interrupted; tests copy it before they change it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    Pipeline(configure(log), out).run_all()
    return out


@pytest.fixture(autouse=True)
def hasty(monkeypatch) -> None:
    """Measure no latency and few resamples: neither is what these tests are about."""
    monkeypatch.setattr(pipeline_module, "latency_ms", lambda *args: {"p50": 1.0, "p99": 2.0})
    monkeypatch.setattr(pipeline_module, "compare", lambda tested, metric: compare(tested, metric, n_resamples=10))


def fit_all(config: RecsysConfig, out: Path) -> None:
    """Run the stages that fit models."""
    pipeline = Pipeline(config, out)
    for seed in config.seeds:
        pipeline.teach(seed)
        pipeline.distill(seed)


@pytest.fixture
def fits(monkeypatch) -> list[dict]:
    """What is fitted: context and arguments of every call, in order."""
    seen, plain = [], fitting.fit_model

    def recorded(config, split, evaluator, **given):
        seen.append({"kind": config.kind, **given.get("context", {}), "given": given})
        return plain(config, split, evaluator, **given)

    monkeypatch.setattr(fitting, "fit_model", recorded)
    svd = linear.fit_svd
    for module in (pipeline_module, initialize):  # the baseline, and where a student may start
        monkeypatch.setattr(module, "fit_svd", lambda *args: seen.append({"role": "svd"}) or svd(*args))
    return seen


def weights(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.glob("seeds/**/model.safetensors"))}


def timeless(rows: list[dict]) -> list[dict]:
    return [{key: row[key] for key in row if "seconds" not in key and key != "latency_ms"} for row in rows]


def test_metrics_have_a_row_for_every_model_seed_and_part(finished):
    rows = read_json(finished / "metrics.json")
    assert all(set(row) >= ROW for row in rows)
    models = [("teacher", "ease"), ("baseline", "ials-4"), ("baseline", "svd-4"), ("baseline", "bpr-4")]
    models += [("student_alone", "mf-4"), ("student", "mf-4")]
    got = [(row["seed"], row["split"], row["role"], row["model"]) for row in rows]
    assert got == [(seed, part, *model) for seed in (0, 1) for part in ("valid", "test") for model in models]
    for row in rows:
        assert (row["domain"], row["recipe"]) == ("recsys", "tiny")
        assert set(row["metrics"]) == set(RecsysConfig().metrics)
        assert (row["latency_ms"]["p50"] is None) == (row["split"] == "valid")
        assert row["split"] == "valid" or 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p99"]
        assert row["train_seconds"] >= 0  # milliseconds: EASE of a tiny log may take none
        file = next(finished.glob(f"seeds/{row['seed']}/**/{folder_of(row)}/model.safetensors"))
        assert row["bytes"] == file.stat().st_size
        assert row["params"] == load_model(file.parent).parameter_count()


def folder_of(row) -> str:
    return row["model"].split("-")[0] if row["role"] == "baseline" else row["role"]


def test_metrics_are_those_of_the_stored_models_on_the_seeds_own_split(finished, log):
    pipeline = Pipeline.reopen(finished)
    dataset = pipeline.prepare()
    for row in read_json(finished / "metrics.json"):
        if row["role"] in ("student", "teacher"):
            own = ratio(dataset, 0.2, 0.1, row["seed"])
            model = load_model(finished / "seeds" / str(row["seed"]) / row["role"])
            assert Evaluator(own, row["split"], pipeline.config.metrics)(model).values == row["metrics"]


def test_the_log_has_every_epoch_of_every_trained_model(finished):
    lines = read_log(finished / "log.jsonl")
    assert all(
        {"time", "event", "epoch", "role", "model", "seed", "step", "terms", "validation"} <= set(x) for x in lines
    )
    got = sorted((line["seed"], line["role"], line["model"], line["epoch"]) for line in lines)
    trained = [("baseline", "mf-4"), ("student_alone", "mf-4"), ("student", "mf-4")]
    assert got == sorted((seed, *model, epoch) for seed in (0, 1) for model in trained for epoch in (0, 1))
    for line in lines:
        assert set(line["terms"]) == ({"bpr", "relaxed_ranking"} if line["role"] == "student" else {"bpr"})


def test_configuration_and_provenance_are_beside_the_result(finished, log):
    assert resolved(Pipeline.reopen(finished).config) == resolved(configure(log))
    about = read_json(finished / "provenance.json")
    assert about["seeds"] == [0, 1]
    assert about["data"]["fingerprint"] == Pipeline.reopen(finished).prepare().fingerprint


def test_a_finished_run_is_not_fitted_again(finished, tmp_path, fits):
    again = tmp_path / "run"
    shutil.copytree(finished, again)
    rows = Pipeline.reopen(again).run_all()
    assert fits == []
    assert timeless(rows) == timeless(read_json(finished / "metrics.json"))
    assert weights(again) == weights(finished)


def test_two_commands_fit_a_model_once(finished, log, tmp_path, fits):
    pipeline = Pipeline(configure(log), tmp_path / "run")
    place = Path("seeds") / "0" / "student_alone"
    said = []
    with ExitStack() as held:
        held.enter_context(locked(beside(tmp_path / "run" / place)))

        def announce(text: str) -> None:
            said.append(text)
            if "another command" in text:
                shutil.copytree(finished / place, tmp_path / "run" / place)
                held.close()

        pipeline.announce = announce
        pipeline._student_alone(0)
    assert said[-1] == f"{tmp_path / 'run' / place}: another command is making it; waiting" and fits == []


def test_two_commands_do_not_mix_their_settings(log, tmp_path):
    first, second = (Pipeline(configure(log, seeds=[seed]), tmp_path / "run") for seed in (0, 1))
    with ExitStack() as held:
        held.enter_context(locked(beside(tmp_path / "run" / "data")))

        def announce(text: str) -> None:
            held.close()
            first.prepare()

        second.announce = announce
        with pytest.raises(UserError, match=r"holds a run with other settings \(seeds\)"):
            second.prepare()
    assert Pipeline.reopen(tmp_path / "run").config.seeds == [0]


def test_the_canonical_copy_gives_the_same_split_as_the_source(finished, log, tmp_path):
    fresh = Pipeline(configure(log), tmp_path / "run")
    for seed in (0, 1):
        assert fresh.split(seed).fingerprint == Pipeline.reopen(finished).split(seed).fingerprint
    assert fresh.split(0).fingerprint != fresh.split(1).fingerprint


@pytest.mark.parametrize("stage", [0, 2, 3, 5, 6])
def test_a_run_killed_in_any_stage_goes_on_and_ends_with_the_same_bits(stage, finished, log, tmp_path, monkeypatch):
    """Killed at the n-th write of a model (a seed has 6), after it was fitted; then started again."""
    saved, plain = [], pipeline_module.save_model

    def killed(model, folder, **about):
        if len(saved) == stage:
            raise KeyboardInterrupt
        saved.append(folder)
        plain(model, folder, **about)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline_module, "save_model", killed)
        with pytest.raises(KeyboardInterrupt):
            fit_all(configure(log), tmp_path / "run")
    before = {folder: (folder / "model.json").stat().st_mtime_ns for folder in saved}
    fit_all(configure(log), tmp_path / "run")
    assert weights(tmp_path / "run") == weights(finished)
    assert before == {folder: (folder / "model.json").stat().st_mtime_ns for folder in saved}


def test_a_student_killed_inside_an_epoch_ends_with_the_same_bits(finished, log, tmp_path, monkeypatch):
    """Checkpoints are written after every batch here; the optimiser's state, the lists and the order all go on."""
    every = {**SETTINGS["student"], "trainer": {**QUICK, "checkpoint_seconds": 0.0}}
    config = configure(log, student=every, seeds=[0], baselines={})
    learned, plain = [], fitting.InteractionStep.forward

    def killed(step, batch):
        if len(step.knowledge):
            if len(learned) == 4:
                raise KeyboardInterrupt
            learned.append(batch)
        return plain(step, batch)

    def counted(step, batch):
        learned.append(batch)
        return plain(step, batch)

    with monkeypatch.context() as patch:
        patch.setattr(fitting.InteractionStep, "forward", killed)
        with pytest.raises(KeyboardInterrupt):
            fit_all(config, tmp_path / "run")
    monkeypatch.setattr(fitting.InteractionStep, "forward", counted)
    fit_all(config, tmp_path / "run")
    name = "seeds/0/student/model.safetensors"
    assert weights(tmp_path / "run")[name] == weights(finished)[name]
    batches = -(-len(Pipeline.reopen(finished).split(0).train) // 64)
    assert len(learned) == 2 * batches  # two epochs, and no batch learned twice


def test_changed_settings_are_refused_and_the_setting_is_named(finished, log):
    student = {**SETTINGS["student"], "optimization": {"batch_size": 64, "learning_rate": 0.03}}
    with pytest.raises(UserError, match=r"student\.optimization\.learning_rate") as error:
        Pipeline(configure(log, student=student), finished).run_all()
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no run here"):
        Pipeline.reopen(finished / "nothing")


@pytest.mark.parametrize(
    ("changed", "fitted"),
    [
        ({"teacher": {"kind": "ease", "options": {"l2": 6.0}}}, ["teacher", "svd", "student"]),
        ({"knowledge": {"relaxed_ranking": {"weight": 0.6}}}, ["student"]),
        (
            {"student": {**SETTINGS["student"], "alone": {"optimization": {"learning_rate": 0.5}}}},
            ["student_alone", "student"],
        ),
        ({"baselines": {"ials": {"iterations": 4}, "svd": {}, "bpr": {"learning_rate": 0.05}}}, ["baseline"]),
        ({"metrics": ["recall@5", "coverage@5"]}, []),
    ],
)
def test_only_what_a_setting_reaches_is_fitted_again(changed, fitted, finished, log, tmp_path, fits):
    """The configuration of a run edited by hand: every stage knows what it was made from."""
    shutil.copytree(finished, tmp_path / "run")
    config = configure(log, seeds=[0], **changed)
    pipeline = Pipeline(config, tmp_path / "run")
    pipeline.run.write_config(resolved(config))
    pipeline.teach(0)
    pipeline.distill(0)
    assert [each["role"] for each in fits] == fitted


def test_metrics_without_the_monitor_are_enough(log, tmp_path):
    """Neither slices nor the choice of the deployed seed need what was not asked for."""
    metrics = ["coverage@5", "recall@5", "hr@3"]
    pipeline = Pipeline(configure(log, metrics=metrics, seeds=[1]), tmp_path / "run")
    rows = pipeline.run_all()
    assert {tuple(row["metrics"]) for row in rows if row["split"] == "test"} == {("recall@5", "hr@3", "coverage@5")}
    assert read_json(tmp_path / "run" / "slices.json")["metric"] == "recall@5"
    assert {row["metric"] for row in read_json(tmp_path / "run" / "comparisons.json")} == {"recall@5"}
    assert (tmp_path / "run" / "student" / "model.json").exists()


def test_the_student_alone_has_no_teacher(finished, log, tmp_path, fits):
    """It is given none, and with another teacher it is the same model, bit for bit."""
    other = configure(log, teacher={"kind": "ials", "options": {"dimension": 3}}, seeds=[0])
    pipeline = Pipeline(other, tmp_path / "run")
    pipeline.teach(0)
    pipeline.distill(0)
    alone = next(each for each in fits if each["role"] == "student_alone")
    assert "knowledge" not in alone["given"]
    assert "student" not in alone["given"]
    taught = next(each for each in fits if each["role"] == "student")
    assert list(taught["given"]["knowledge"]) == ["relaxed_ranking"]
    got, before = weights(tmp_path / "run"), weights(finished)
    assert got["seeds/0/student_alone/model.safetensors"] == before["seeds/0/student_alone/model.safetensors"]
    assert got["seeds/0/student/model.safetensors"] != before["seeds/0/student/model.safetensors"]
    split = pipeline.split(0)
    plain = fitting.fit_model(alone_config(other), split, Evaluator(split, "valid", ("ndcg@10",)), seed=0).model
    stored = load_model(tmp_path / "run" / "seeds" / "0" / "student_alone")
    assert all(torch.equal(value, stored.state_dict()[name]) for name, value in plain.state_dict().items())


def test_a_student_may_start_from_the_teachers_factors_but_not_alone(log, tmp_path, fits):
    student = {**SETTINGS["student"], "initialize": "svd"}
    pipeline = Pipeline(configure(log, student=student, seeds=[0], baselines={}), tmp_path / "run")
    pipeline.teach(0)
    pipeline.distill(0)
    assert [each["role"] for each in fits] == ["teacher", "student_alone", "svd", "student"]
    teacher, split = pipeline.teach(0), pipeline.split(0)
    start, _ = pipeline.taught(0, pipeline.config)
    scores = teacher.scores(torch.arange(split.n_users), split.train).double().numpy()
    left, values, right = np.linalg.svd(scores)
    np.testing.assert_allclose((start.user @ start.item.T).detach(), (left[:, :4] * values[:4]) @ right[:4], atol=1e-4)


def test_one_teacher_may_serve_all_seeds(log, tmp_path, fits):
    """With a split that does not vary; its lists are computed once as well."""
    config = configure(log, split={"kind": "leave_last_out"}, teacher={**SETTINGS["teacher"], "seed": 0}, baselines={})
    rows = Pipeline(config, tmp_path / "run").run_all()
    assert [(each["role"], each["seed"]) for each in fits] == [
        ("teacher", 0),
        *((role, seed) for seed in (0, 1) for role in ("student_alone", "student")),
    ]
    assert sorted(path.name for path in (tmp_path / "run" / "seeds").iterdir()) == ["0", "1", "shared"]
    entries = list((tmp_path / "run").glob("seeds/*/teacher_cache/*/entry.json"))
    assert len(entries) == 1
    teachers = [row for row in timeless(rows) if row["role"] == "teacher" and row["split"] == "test"]
    assert [row["seed"] for row in teachers] == [0, 1]
    assert teachers[0]["metrics"] == teachers[1]["metrics"]


def test_a_sequential_run_gives_the_log_in_time_order(log, tmp_path):
    trainer = {**QUICK, "max_epochs": 1}
    model = {"kind": "sasrec", "optimization": {"loss": "cross_entropy", "batch_size": 8}, "trainer": trainer}
    config = configure(
        log,
        split={"kind": "leave_last_out"},
        teacher={**model, "options": {"dimension": 8, "length": 4}},
        student={**model, "options": {"dimension": 4, "length": 4}},
        knowledge={"sparse_soft_targets": {}, "ranking_distillation": {"options": {"warm_up": 0}}},
        baselines={},
        seeds=[0],
    )
    pipeline = Pipeline(config, tmp_path / "run")
    rows = pipeline.run_all()
    assert {row["model"] for row in rows} == {"sasrec-8", "sasrec-4"}
    dataset = pipeline.prepare()
    assert pipeline.split(0).fingerprint == leave_last_out(dataset).fingerprint


def test_the_deployed_models_are_those_of_the_best_seed_and_a_torn_copy_is_repaired(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    pipeline = Pipeline.reopen(tmp_path / "run")
    valid = [row for row in pipeline.run.read_metrics() if (row["role"], row["split"]) == ("student", "valid")]
    best = max(valid, key=lambda row: row["metrics"]["ndcg@10"])["seed"]
    # killed while the folder of an earlier copy was removed, and while a new one was made
    (tmp_path / "run" / "student" / "model.json").unlink()
    (tmp_path / "run" / ".teacher.tmp").mkdir()
    assert pipeline.deploy() == best
    for role in ("teacher", "student_alone", "student"):
        source = tmp_path / "run" / "seeds" / str(best) / role
        for file in ("model.json", "model.safetensors"):
            assert (tmp_path / "run" / role / file).read_bytes() == (source / file).read_bytes()
    other = next(row for row in valid if row["seed"] != best)
    rows = pipeline.run.read_metrics()
    for row in rows:
        if (row["role"], row["split"], row["seed"]) == ("student", "valid", other["seed"]):
            row["metrics"]["ndcg@10"] = 2.0
    pipeline.run.write_metrics(rows)
    assert pipeline.deploy() == other["seed"]
    about = json.loads((tmp_path / "run" / "student" / "model.json").read_text())
    assert about == read_json(tmp_path / "run" / "seeds" / str(other["seed"]) / "student" / "model.json")


def test_files_of_ones_own_are_the_split(log, tmp_path):
    lines = log.read_text().splitlines()
    files = {}
    for part, rows in (("train", lines[1:241]), ("valid", lines[241:300]), ("test", lines[300:])):
        files[f"{part}_file"] = str(tmp_path / f"{part}.csv")
        Path(files[f"{part}_file"]).write_text("\n".join([lines[0], *rows]) + "\n")
    config = configure(log, split={"kind": "files", **files}, baselines={}, seeds=[0])
    pipeline = Pipeline(config, tmp_path / "run")
    pipeline.run_all()
    own = pipeline.split(0)
    assert [len(part) for part in (own.train, own.valid, own.test)] == [240, 59, len(lines) - 300]
    assert Pipeline.reopen(tmp_path / "run").split(0).fingerprint == own.fingerprint
    missing = configure(log, split={"kind": "files", "train_file": files["train_file"]})
    with pytest.raises(UserError, match="all three"):
        Pipeline(missing, tmp_path / "other").prepare()
