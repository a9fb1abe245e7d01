"""The wing's benchmarks: each is one command, resumable, and writes JSON."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from apps.speech import fitting
from apps.speech.config import SpeechConfig, load_config
from apps.speech.data.batches import bucketed, padding_share
from apps.speech.data.parts import find_data
from apps.speech.distill import SpeechStep
from apps.speech.evaluate import Scores, compare
from apps.speech.knowledge import Pair, needs, terms
from apps.speech.measure import DECODINGS, evaluate
from apps.speech.models import new_model
from apps.speech.pipeline import ROLES, Pipeline
from apps.speech.teachers import teacher_lessons
from kdcore.config import UserError
from kdcore.progress import Announcer
from kdcore.report import write_report
from kdcore.run import provenance, write_json

# every recipe under the teacher of the first, with its students alone
_QUALITY = ("ctc_sequence_level", "ctc_frame_level", "ctc_segment_nbest", "ctc_guided")
_SEEDS = [0, 1, 2]


def run_bench(what: str, output: Path | None, work: Path, only: Sequence[str] = ()) -> int:
    """Run one benchmark and print its result as JSON; ``output`` also takes it, atomically.

    ``only`` are some of the recipes of ``quality``.
    """
    if what == "train" and only:
        raise UserError("--only: is for bench quality, got bench train")
    result = quality(work, only) if what == "quality" else train(work)
    command = ["kd", "speech", "bench", what, *(["--only", ",".join(only)] if only else [])]
    command += ["--json", f"benchmarks/results/{output.name}"] if output else []
    result = {**result, "benchmark": f"speech {what}", "provenance": provenance(command=command, load=os.getloadavg())}
    if output is not None:
        write_json(output, result)
    print(json.dumps(result, indent=2))
    return 0


def quality(work: Path, only: Sequence[str] = ()) -> dict[str, Any]:
    """Measure recipes on AN4: one teacher, one student alone a seed, and the student of each recipe, three seeds.

    Eight speakers of the training part validate and choose everything; the test part is heard once, here.
    """
    unknown = set(only) - set(_QUALITY)
    if unknown:
        raise UserError(f"--only: got {', '.join(sorted(unknown))}, wanted some of {', '.join(_QUALITY)}")
    find_data("an4")
    base: Path | None = None
    runs = {}
    for recipe in [name for name in _QUALITY if not only or name in only]:
        folder = work / f"speech-an4-{recipe}"
        if base is not None:
            _share(base, folder)
        overrides = [("data.path", '"an4"'), ("seeds", json.dumps(_SEEDS))]
        pipeline = Pipeline(load_config(recipe=recipe, overrides=overrides), folder, Announcer())
        for seed in _SEEDS:
            pipeline.teach(seed)
            pipeline.distill(seed)
        rows = evaluate(pipeline)
        pipeline.deploy()
        write_report(folder)
        runs[recipe] = _summary(pipeline, rows)
        base = base or folder
    return {"data": "AN4: 66 speakers train, 8 validate, 10 test; seeds 0, 1, 2", "runs": runs}


def _share(source: Path, target: Path) -> None:
    """Give a run what it has in common with another: data, features, the teacher and what it said, students alone.

    A run looks at the keys of what it finds: what is not of its own settings is made again.
    """
    for name in ("data", "features", "seeds/shared", *(f"seeds/{seed}/student_alone" for seed in _SEEDS)):
        if (source / name).exists() and not (target / name).exists():
            shutil.copytree(source / name, target / name, copy_function=os.link)


def _summary(pipeline: Pipeline, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation over seeds of every model on test, and the student's differences."""
    models: dict[str, Any] = {}
    for role in ROLES:
        mine = [row for row in rows if row["role"] == role and row["split"] == "test"]
        names = sorted(set.intersection(*(set(row["metrics"]) for row in mine)))
        values = {name: [row["metrics"][name] for row in mine] for name in names}
        models[role] = {
            "model": mine[0]["model"],
            "parameters": mine[0]["params"],
            "train_cpu_seconds": [row["train_cpu_seconds"] for row in mine],
            "metrics": {
                name: {"mean": statistics.fmean(each), "sd": statistics.stdev(each) if len(each) > 1 else None}
                for name, each in values.items()
            },
        }
    return {"models": models, "differences": _differences(pipeline)}


def _differences(pipeline: Pipeline) -> dict[str, Any]:
    """Return the student's error rate minus those of the others: over utterances, and over speakers."""
    found: dict[str, Any] = {}
    for metric in DECODINGS:
        scores = {role: _scores(pipeline, role, metric) for role in ROLES}
        for other in ("student_alone", "teacher"):
            for by in ("utterance", "speaker"):
                estimate = compare(scores["student"], scores[other], by=by)
                found[f"{metric} against {other}, by {by}"] = estimate.as_dict()
    return found


def _scores(pipeline: Pipeline, role: str, metric: str) -> list[Scores]:
    found = []
    for seed in pipeline.config.seeds:
        folder = next(cell.folder for cell in pipeline.cells(seed) if cell.role == role)
        found.append(Scores.load(folder.parent / "evaluation" / f"test-{role}-{metric}-{seed}.jsonl"))
    return found


def train(work: Path, repeats: int = 15) -> dict[str, Any]:
    """Measure what a taught step costs beside a plain CTC step on AN4, and what buckets waste on padding.

    The teacher is an untrained one of the recipe's size: what it said is in the cache, and costs nothing by then. The
    steps take turns on the same batches, on one thread.
    """
    find_data("an4")
    torch.set_num_threads(1)
    config = load_config(recipe="ctc_sequence_level", overrides=[("data.path", '"an4"')])
    untrained = replace(config.teacher, trainer=replace(config.teacher.trainer, max_epochs=1))
    config = replace(config, teacher=untrained)
    pipeline = Pipeline(config, work / "speech-train", Announcer())
    steps = {
        "ctc": _step(pipeline, config, {}),
        "frame": _step(pipeline, config, {"frame": {}}),
        "sequence of 4": _step(pipeline, config, {"sequence": {"count": 4}}),
    }
    batches = list(steps["ctc"].batches(0, torch.Generator().manual_seed(0)))[:repeats]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    plans = {
        name: list(step.batches(0, torch.Generator().manual_seed(0)))[: len(batches)] for name, step in steps.items()
    }
    optimizers = {name: step.optimizer() for name, step in steps.items()}
    for place in range(len(batches)):
        for name, step in steps.items():
            started = time.perf_counter()
            values = step(plans[name][place])
            loss = torch.stack([value * step.weights[term] for term, value in values.items()]).sum()
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    lengths = pipeline.prepared.store("train", "clean").lengths
    frames = config.student.optimization.batch_frames
    waste = padding_share(lengths, bucketed(lengths, frames, torch.Generator().manual_seed(0)))
    return {
        "median_ms": {name: value * 1e3 for name, value in medians.items()},
        "ratio": {name: value / medians["ctc"] for name, value in medians.items()},
        "targets": {"frame": 1.25, "sequence of 4": 1.8, "padding_share": 0.1},
        "padding_share": waste,
    }


def _step(pipeline: Pipeline, config: SpeechConfig, knowledge: Mapping[str, Mapping[str, Any]]) -> SpeechStep:
    """Return a student's step with some knowledge, of the same weights and views as every other."""
    torch.manual_seed(0)
    prepared = pipeline.prepared
    views = [pair.student for pair in config.views]
    model = new_model(config.student.kind, prepared.units.blank + 1, config.student.options)
    model.set_statistics(*(torch.from_numpy(each) for each in prepared.store("train", views[0]).statistics()))
    lessons = None
    given = []
    if knowledge:
        wanted, teacher = needs(knowledge), pipeline.teach(0)
        lessons = teacher_lessons(
            [(teacher, pair.teacher) for pair in config.views],
            prepared,
            pipeline.run.path / "seeds" / "shared" / "teacher_cache",
            posteriors=wanted.posteriors,
            attention=wanted.attention,
            layers=wanted.teacher_layers,
            n_best=wanted.n_best,
            cuts=wanted.cuts,
        )
        pair = Pair(model.classes - 1, model.width, teacher.width)
        given = [term for name, options in knowledge.items() for term in terms(name, options, 1.0, pair)]
    return SpeechStep(
        model,
        prepared.training(views),
        fitting.validator(prepared.store("valid", config.test_view), prepared.texts("valid"), prepared.units),
        epochs=1,
        terms=given,
        optimization=config.student.optimization,
        augment=config.student.augment,
        lessons=lessons,
    )
