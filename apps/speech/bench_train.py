"""What a taught step costs beside a plain CTC step on AN4, and what buckets waste on padding."""

from __future__ import annotations

import json
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
from apps.speech.data.corpora import find_data
from apps.speech.distill import SpeechStep
from apps.speech.knowledge import Pair, needs, terms
from apps.speech.models import new_model
from apps.speech.pipeline import Pipeline
from apps.speech.teachers import teacher_lessons
from kdcore.progress import Announcer

RECIPE = "ctc_sequence_level"
# of a teacher that is trained for this alone
_EPOCHS = 12


def run(
    work: Path, *, data: str = "an4", repeats: int = 45, overrides: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """Measure the median times of steps that take turns on the same batches, on one thread.

    A step is what training repeats: a batch is drawn, with what the teacher said of it out of the cache, and the
    weights move. The teacher is asked before anything is timed; it is the one of ``bench quality``, or one that is
    trained now for so few epochs that its lists are as long as the texts, but not as good.
    """
    find_data(data)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measured(work, data, repeats, overrides)
    finally:
        torch.set_num_threads(threads)


def _measured(work: Path, data: str, repeats: int, overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    trained = work / f"speech-{find_data(data).name}-{RECIPE}"
    if (trained / "report.html").exists():  # the last that a finished run has
        pipeline = Pipeline.reopen(trained, Announcer())
    else:
        config = load_config(recipe=RECIPE, overrides=[("data.path", json.dumps(data)), *overrides])
        teacher = replace(config.teacher, trainer=replace(config.teacher.trainer, max_epochs=_EPOCHS))
        pipeline = Pipeline(replace(config, teacher=teacher), work / "speech-train", Announcer())
    config = pipeline.config
    steps = {
        "ctc": _step(pipeline, config, {}),
        "frame": _step(pipeline, config, {"frame": {}}),
        "sequence of 4": _step(pipeline, config, {"sequence": {"count": 4}}),
    }
    optimizers = {name: step.optimizer() for name, step in steps.items()}
    # each drawn as it is needed, as in training: features are stacked, and what the teacher said is read
    drawn = {name: step.batches(0, torch.Generator().manual_seed(0)) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names, symbols = list(steps), {"hypotheses": list[float](), "texts": list[float]()}
    for place in range(min(repeats, steps["ctc"].batch_count())):
        # who is first with a batch finds cold caches, so that each is as often
        for name in names[place % len(names) :] + names[: place % len(names)]:
            step = steps[name]
            started = time.perf_counter()
            batch = next(drawn[name])
            values = step(batch)
            loss = torch.stack([value * step.weights[term] for term, value in values.items()]).sum()
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            seconds[name].append(time.perf_counter() - started)
            if "hypothesis_lengths" in batch:
                symbols["hypotheses"] += batch["hypothesis_lengths"].flatten().tolist()
                symbols["texts"] += batch["label_lengths"].tolist()
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    lengths = pipeline.prepared.store("train", "clean").lengths
    frames = config.student.optimization.batch_frames
    waste = padding_share(lengths, bucketed(lengths, frames, torch.Generator().manual_seed(0)))
    return {
        "median_ms": {name: value * 1e3 for name, value in medians.items()},
        "ratio": {name: value / medians["ctc"] for name, value in medians.items()},
        "targets": {"frame": 1.25, "sequence of 4": 1.8, "padding_share": 0.1},
        "padding_share": waste,
        # an utterance, of what sequences cost by
        "symbols": {name: statistics.fmean(each) for name, each in symbols.items()},
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
            segmented=wanted.segmented,
        )
        lessons.make()
        pair = Pair(model.classes - 1, model, teacher)
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
