"""Recipes on AN4: one teacher, one student alone a seed, and the student of each recipe, five seeds."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jiwer

from apps.speech.bench_results import complete, decodings, summary, test_scores
from apps.speech.config import load_config
from apps.speech.data.batches import neighbours
from apps.speech.data.corpora import find_data
from apps.speech.decode.greedy import greedy
from apps.speech.evaluate import compare
from apps.speech.pipeline import Pipeline
from kdcore.config import UserError
from kdcore.locks import LOCKS

# those that are compared where none is named: sequences beside frames, some five hours of one core
COMPARED = ("ctc_sequence_level", "ctc_frame_level")
# every one that can be named; all under the teacher of the first, with its students alone
RECIPES = (*COMPARED, "ctc_segment_nbest", "ctc_guided")
# of three, Student's t makes intervals 4.3 standard errors wide each way, of five 2.8
SEEDS = (0, 1, 2, 3, 4)
# error rates by best path and with the language model, and the student's relative difference to itself alone
TARGETS = {
    "teacher": {"wer": 0.074, "wer_lm": 0.045},
    "student": {"wer": 0.11, "wer_lm": 0.07},
    "relative_difference": -0.2,
}


def run(
    work: Path,
    only: Sequence[str] = (),
    *,
    data: str = "an4",
    seeds: Sequence[int] = SEEDS,
    overrides: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """Measure sequences beside frames, or ``only`` some of ``RECIPES``; ``overrides`` are settings of all of them.

    Eight speakers of the training part validate and choose everything; the test part is heard once, here.

    Raises:
        UserError: an unknown recipe, or no such data.
    """
    unknown = set(only) - set(RECIPES)
    if unknown:
        raise UserError(f"--only: got {', '.join(sorted(unknown))}, wanted some of {', '.join(RECIPES)}")
    name = find_data(data).name
    base: Path | None = None
    runs, pipelines = {}, {}
    for recipe in [each for each in RECIPES if each in (only or COMPARED)]:
        folder = work / f"speech-{name}-{recipe}"
        if base is not None:
            share(base, folder, seeds)
        given = [("data.path", json.dumps(data)), ("seeds", json.dumps(list(seeds))), *overrides]
        pipelines[recipe], rows = complete(load_config(recipe=recipe, overrides=given), folder)
        runs[recipe] = summary(pipelines[recipe], rows)
        base = base or folder
    about = f"{name}: 8 speakers of the training part validate; seeds {', '.join(map(str, seeds))}"
    found = {"between": between(pipelines), "teacher_on_training": on_training(pipelines)}
    return {"data": about, "runs": runs, **found, "targets": TARGETS}


def on_training(pipelines: Mapping[str, Pipeline]) -> dict[str, dict[str, float]]:
    """Return by recipe the word error rate ``wer``, by best paths, of who teaches on what is taught, and its ``folds``.

    It says how much their lists add to the labels: little, where the teacher was trained on the same recordings.
    """
    found: dict[str, dict[str, float]] = {}
    for recipe, pipeline in pipelines.items():
        lecturer, prepared = pipeline.lecturer(pipeline.config.seeds[0]), pipeline.prepared
        view, texts = pipeline.config.taught_views("train")[0], prepared.texts("train")
        parts, heard = prepared.training_parts, list[str]()
        lengths = prepared.store(parts, view).lengths
        for rows in neighbours(lengths, 0, len(texts)):
            said = lecturer.ask(prepared, parts, view, rows)["log_probs"]
            heard += [prepared.units.decode(greedy(each).ids) for each in said]
        found[recipe] = {"wer": float(jiwer.wer(texts, heard)), "folds": pipeline.config.teacher.folds}
    return found


def between(pipelines: Mapping[str, Pipeline]) -> dict[str, dict[str, Any]]:
    """Return the error rate of the first recipe's student minus that of each other one's, over utterances and seeds."""
    first, *others = pipelines
    found: dict[str, dict[str, Any]] = {}
    for other in others:
        found[f"{first} against {other}"] = {
            metric: compare(
                test_scores(pipelines[first], "student", metric), test_scores(pipelines[other], "student", metric)
            ).as_dict()
            for metric in decodings(pipelines[first].config)
        }
    return found


def share(source: Path, target: Path, seeds: Sequence[int]) -> None:
    """Give a run what it has in common with another: features, the teacher and what it said, students alone.

    A run looks at the keys of what it finds: what is not of its own settings is made again.
    """
    for name in ("features", "seeds/shared", *(f"seeds/{seed}/student_alone" for seed in seeds)):
        if (source / name).exists() and not (target / name).exists():
            partial = (target / name).with_name(f".{Path(name).name}.tmp")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source / name, partial, copy_function=os.link, ignore=LOCKS)
            os.replace(partial, target / name)
