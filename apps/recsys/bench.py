"""The wing's benchmarks: each is one command, resumable, and writes the JSON the README's tables come from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from apps.recsys.compare import per_user
from apps.recsys.config import RecsysConfig, load_config
from apps.recsys.data.dataset import load_dataset
from apps.recsys.data.splits import leave_last_out, ratio
from apps.recsys.data.store import find_data
from apps.recsys.evaluate import Evaluation, Evaluator
from apps.recsys.fitting import fit_model
from apps.recsys.pipeline import Pipeline
from apps.recsys.tune import Tuner
from kdcore.config import UserError, build, resolved
from kdcore.progress import Announcer
from kdcore.report import write_report
from kdcore.run import provenance, write_json
from kdcore.statistics import gap_closed, paired_bootstrap

# ml-100k, the dimension-8 student: one teacher, and a better one
_QUALITY = ("relaxed_ranking", "teacher_ensemble")
_TRIALS = 16
# the SASRec teacher's settings on ml-100k, chosen on validation
_SASREC_ML100K = [
    ("teacher.options.dimension", "64"),
    ("teacher.options.heads", "1"),
    ("teacher.options.dropout", "0.3"),
    ("teacher.optimization.batch_size", "64"),
    ("teacher.optimization.learning_rate", "0.002"),
    ("teacher.trainer.patience", "8"),
]
_QUALITY_SEEDS = [0, 1, 2, 3, 4]
_BEAUTY_SEEDS = [0, 1, 2]


def run_bench(what: str, output: Path | None, work: Path, *, quick: bool = False, only: Sequence[str] = ()) -> int:
    """Run one benchmark and print its result as JSON; ``output`` also takes it, atomically.

    ``quick`` and ``only`` (some of its parts) are for ``serve``.
    """
    if what == "serve":
        result = serve(work, quick=quick, only=only)
    elif quick or only:
        raise UserError(f"--{'quick' if quick else 'only'}: is for bench serve, got bench {what}")
    else:
        result = BENCHMARKS[what](work)
    # as anyone would type it: where the runs lay on this machine is of no use to another
    command = ["kd", "recsys", "bench", what, *(["--json", f"benchmarks/results/{output.name}"] if output else [])]
    command += ["--quick"] if quick else []
    result = {**result, "benchmark": f"recsys {what}", "provenance": provenance(command=command, load=os.getloadavg())}
    if output is not None:
        write_json(output, result)
    print(json.dumps(result, indent=2))
    return 0


def quality(work: Path) -> dict[str, Any]:
    """Measure how much of the gap to its teacher a dimension-8 student closes on ml-100k, for two teachers.

    Everything compared is tuned with the same number of trials on the validation part of the first seed's split, then
    run on five random splits; the test parts are read once, here.
    """
    _needed("ml-100k")
    runs = {recipe: _tuned_run(recipe, "ml-100k", work, _TRIALS, _QUALITY_SEEDS) for recipe in _QUALITY}
    return {
        "data": "ml-100k, random 80/20 per user, 8 % of each user's items for validation, seeds 0-4",
        "trials_each": _TRIALS,
        "runs": runs,
    }


def beauty(work: Path) -> dict[str, Any]:
    """Measure how much of a large SASRec's quality a student of at most an eighth of its size keeps on Beauty."""
    _needed("amazon-beauty")
    config = load_config(
        recipe="sequential_soft_targets", overrides=[("data.path", "amazon-beauty"), ("seeds", str(_BEAUTY_SEEDS))]
    )
    result = _run(config, work / "beauty")
    return {"data": "amazon-beauty, leave-last-out, full ranking", "runs": {config.recipe: result}}


def train(work: Path) -> dict[str, Any]:
    """Measure training time to a quality, side by side with RecBole where it is installed."""
    from apps.recsys import bench_train

    _needed("ml-100k")
    return bench_train.run(work)


def evaluate(work: Path) -> dict[str, Any]:
    """Measure the full evaluation of 100k users x 100k items at dimension 64."""
    from apps.recsys import bench_evaluate

    return bench_evaluate.run()


def serve(work: Path, *, quick: bool = False, only: Sequence[str] = ()) -> dict[str, Any]:
    """Measure a real server under load, and what it promises beside it: memory, reloads, events, the page."""
    from apps.recsys import bench_serve

    return bench_serve.run(work, quick=quick, only=only)


def teachers(work: Path) -> dict[str, Any]:
    """Measure teachers on ml-100k under the two protocols other libraries report (no student involved).

    Leave-last-out: models fitted on train, selected on validation. Ratio: 80/20 per user with nothing held out for
    validation; the closed forms there use the settings that were chosen with validation in the recipes.
    """
    _needed("ml-100k")
    dataset = load_dataset(find_data("ml-100k"))
    rows = []
    ensemble = load_config(recipe="teacher_ensemble").teacher
    ease = load_config(recipe="relaxed_ranking").teacher
    for name, config in (("ease", ease), ("ensemble of ease and 3 ials", ensemble)):
        fitted = []
        for seed in (0, 1, 2):
            split = ratio(dataset, test=0.2, valid=0.0, seed=seed)
            evaluator = Evaluator(split, "test", ("ndcg@10", "hr@10"))
            fitted.append(evaluator(fit_model(config, split, evaluator, seed=seed).model).means)
        rows.append({"model": name, "protocol": "ratio 80/20, seeds 0-2", **_over_seeds(fitted)})
    split = leave_last_out(dataset)
    validation, test = Evaluator(split, "valid", ("ndcg@10",)), Evaluator(split, "test", ("ndcg@10", "hr@10"))
    sasrec = load_config(recipe="sequential_soft_targets", overrides=_SASREC_ML100K).teacher
    for name, config in (("ease", ease), ("sasrec-64", sasrec)):
        fitted = []
        for seed in (0, 1, 2) if name != "ease" else (0,):
            folder = work / "teachers" / f"{name}-{seed}"
            model = fit_model(config, split, validation, seed=seed, folder=folder, key=f"{config}").model
            fitted.append(test(model).means)
        rows.append({"model": name, "protocol": "leave-last-out", **_over_seeds(fitted)})
    return {"data": "ml-100k, all ratings positive", "rows": rows}


def _over_seeds(fitted: list[Mapping[str, float]]) -> dict[str, Any]:
    result = {}
    for metric in fitted[0]:
        values = [each[metric] for each in fitted]
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        result[metric] = {"mean": float(np.mean(values)), "sd": sd, "seeds": values}
    return result


def _needed(name: str) -> None:
    try:
        find_data(name)
    except UserError as error:
        raise UserError(f"bench: {error}; set KD_DATA to the folder that holds recsys/{name}") from None


def _tuned_run(recipe: str, data: str, work: Path, trials: int, seeds: list[int]) -> dict[str, Any]:
    """Tune everything on the first seed, then run all seeds with what was found."""
    config = load_config(recipe=recipe, overrides=[("data.path", data), ("seeds", "[0]")])
    folder = work / f"tune-{recipe}"
    if not (folder / "tuned.yaml").exists():
        Tuner(config, folder, trials, Announcer()).tune()
    settings = yaml.safe_load((folder / "tuned.yaml").read_text(encoding="utf-8"))
    return _run(build(RecsysConfig, {**settings, "seeds": seeds}), work / recipe)


def _run(config: RecsysConfig, folder: Path) -> dict[str, Any]:
    pipeline = Pipeline(config, folder, Announcer())
    rows = pipeline.run_all()
    write_report(folder)
    return {"summary": summarise(pipeline), "settings": resolved(config), "rows": rows}


def summarise(pipeline: Pipeline) -> dict[str, Any]:
    """Return means over seeds and the student's paired differences, with intervals over users and seeds.

    ``plain`` models had no teacher: student alone and iALS. The best of them is taken by its test mean, the choice
    that flatters the student least.
    """
    metric = pipeline.config.student.trainer.monitor
    evaluations: dict[tuple[str, str], list[Evaluation]] = {}
    for seed in pipeline.config.seeds:
        for role, name, evaluation in pipeline.evaluations(seed, "test"):
            evaluations.setdefault((role, name), []).append(evaluation)
    scores = per_user(evaluations, metric)
    by_name = {f"{role}/{name}": values for (role, name), values in scores.items()}
    means = {name: values.mean(axis=1) for name, values in by_name.items()}
    student = next(name for name in by_name if name.startswith("student/"))
    teacher = next(name for name in by_name if name.startswith("teacher/"))
    plain = [n for n in by_name if n.startswith("student_alone/") or n.startswith(("baseline/ials", "baseline/bpr"))]
    best = max(plain, key=lambda name: float(means[name].mean()))

    def against(other: str) -> dict[str, Any]:
        return paired_bootstrap(by_name[student], by_name[other], generator=np.random.default_rng(0)).as_dict()

    generator = np.random.default_rng(0)
    closed = gap_closed(by_name[student], by_name[best], by_name[teacher], generator=generator)
    return {
        "metric": metric,
        "models": {
            name: {"mean": float(v.mean()), "sd": float(v.std(ddof=1)) if len(v) > 1 else None, "seeds": v.tolist()}
            for name, v in means.items()
        },
        "best_plain": best,
        "gap_closed": closed.as_dict() if closed else None,
        "kept_of_teacher": float(means[student].mean() / means[teacher].mean()),
        "student_minus": {name: against(name) for name in by_name if name != student},
    }


BENCHMARKS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "quality": quality,
    "beauty": beauty,
    "train": train,
    "teachers": teachers,
    "evaluate": evaluate,
    "serve": serve,
}
