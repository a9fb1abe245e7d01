"""Under noise: a student whose teacher hears the clean recording against the same student without a teacher."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apps.speech.bench_results import complete, summary, test_scores
from apps.speech.config import load_config
from apps.speech.data.corpora import find_data
from apps.speech.evaluate import Scores, compare
from apps.speech.pipeline import Pipeline

RECIPE = "clean_to_noisy"
SEEDS = (0, 1, 2)
# signal-to-noise ratios in dB, from and below
SLICES = ((0, 2.5), (2.5, 5), (5, 7.5), (7.5, 10))


def run(
    work: Path, *, data: str = "an4", seeds: Sequence[int] = SEEDS, overrides: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """Measure the recipe on the noisy test part, all of it and by signal-to-noise ratio; a negative difference is gain.

    Both students hear the same noisy views in training, with the same updates; eight speakers of the training part,
    as noisy as the test part, validate and choose everything.
    """
    name = find_data(data).name
    given = [("data.path", json.dumps(data)), ("seeds", json.dumps(list(seeds))), *overrides]
    pipeline, rows = complete(load_config(recipe=RECIPE, overrides=given), work / f"speech-{name}-{RECIPE}")
    taught, alone = test_scores(pipeline, "student"), test_scores(pipeline, "student_alone")
    result = summary(pipeline, rows)
    rates = [float(np.mean([each.wer for each in scores])) for scores in (taught, alone)]
    return {
        "data": f"{name}, test heard through {pipeline.config.test_view}; seeds {', '.join(map(str, seeds))}",
        **result,
        "relative_difference": rates[0] / rates[1] - 1 if rates[1] else None,
        "by_snr": _by_snr(pipeline, taught, alone),
        "targets": {"relative_difference": -0.15},
    }


def _by_snr(pipeline: Pipeline, taught: Sequence[Scores], alone: Sequence[Scores]) -> list[dict[str, Any]]:
    """Return rates and the paired difference of each slice of the test part that has words."""
    found = []
    snrs = taught[0].snrs
    for low, high in SLICES:
        inside = (snrs >= low) & (snrs < high)
        if not taught[0].words[inside].sum():
            continue
        mine, others = ([each.part(inside) for each in scores] for scores in (taught, alone))
        found.append(
            {
                "snr_db": [low, high],
                "utterances": int(inside.sum()),
                "student": float(np.mean([each.wer for each in mine])),
                "student_alone": float(np.mean([each.wer for each in others])),
                "difference": compare(mine, others).as_dict(),
            }
        )
    return found
