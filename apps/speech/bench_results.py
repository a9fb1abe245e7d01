"""What benchmarks do with runs: bring one to its end, and sum up what it found over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apps.speech.config import SpeechConfig
from apps.speech.evaluate import Scores, compare
from apps.speech.measure import evaluate
from apps.speech.measurement import DECODINGS
from apps.speech.pipeline import ROLES, Pipeline
from kdcore.progress import Announcer
from kdcore.report import write_report


def complete(config: SpeechConfig, folder: Path) -> tuple[Pipeline, list[dict[str, Any]]]:
    """Return a run that is trained and evaluated on all its seeds, and its rows; what is there already is kept."""
    pipeline = Pipeline(config, folder, Announcer())
    for seed in config.seeds:
        pipeline.lecturer(seed)
        pipeline.distill(seed)
    rows = evaluate(pipeline)
    pipeline.deploy()
    write_report(folder)
    return pipeline, rows


def summary(pipeline: Pipeline, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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
    return {"models": models, "differences": differences(pipeline)}


def differences(pipeline: Pipeline) -> dict[str, Any]:
    """Return the student's error rate minus those of the others: over utterances, and over speakers."""
    found: dict[str, Any] = {}
    for metric in decodings(pipeline.config):
        scores = {role: test_scores(pipeline, role, metric) for role in ROLES}
        for other in ("student_alone", "teacher"):
            for by in ("utterance", "speaker"):
                estimate = compare(scores["student"], scores[other], by=by)
                found[f"{metric} against {other}, by {by}"] = estimate.as_dict()
    return found


def decodings(config: SpeechConfig) -> Sequence[str]:
    """Return the ways in which a run decodes: without a language model only the best path."""
    return DECODINGS if config.decode.order else DECODINGS[:1]


def test_scores(pipeline: Pipeline, role: str, metric: str = "wer") -> list[Scores]:
    """Return what the evaluation of a run found on test for a role, seed by seed."""
    found = []
    for seed in pipeline.config.seeds:
        folder = next(cell.folder for cell in pipeline.cells(seed) if cell.role == role)
        found.append(Scores.load(folder.parent / "evaluation" / f"test-{role}-{metric}-{seed}.jsonl"))
    return found
