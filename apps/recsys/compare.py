"""The student against everything else in a run, user by user and seed by seed: what ``comparisons.json`` holds."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from apps.recsys.evaluate import Evaluation
from kdcore.statistics import Estimate, gap_closed, paired_bootstrap

# (role, model name) -> evaluation of every seed, in the same order of seeds
Evaluations = Mapping[tuple[str, str], list[Evaluation]]


def compare(evaluations: Evaluations, metric: str, *, n_resamples: int = 10_000) -> list[dict[str, Any]]:
    """Return the paired difference of the student and each other model, and the share of its gap to the teacher.

    Users are resampled and seeds' luck is added (``kdcore.statistics``). A ratio split gives a user other test items
    for every seed; the users are the same, and only those tested with every seed are compared.
    """
    scores = per_user(evaluations, metric)
    student = next(key for key in scores if key[0] == "student")
    teacher = next(key for key in scores if key[0] == "teacher")
    rows = []
    for other in scores:
        if other == student:
            continue
        generator = np.random.default_rng(0)  # fixed: the same run gives the same intervals
        estimate = paired_bootstrap(scores[student], scores[other], generator=generator, n_resamples=n_resamples)
        row = {"metric": metric, "split": "test", "a": _side(student), "b": _side(other), **_fields(estimate)}
        if other != teacher:
            share = gap_closed(
                scores[student], scores[other], scores[teacher], generator=generator, n_resamples=n_resamples
            )
            if share is not None:
                row["gap_closed"] = {"value": share.value, "low": share.low, "high": share.high}
        rows.append(row)
    return rows


def per_user(evaluations: Evaluations, metric: str) -> dict[tuple[str, str], np.ndarray]:
    """Return float64 [seeds, users] of each model over the users that every evaluation has."""
    tested = [evaluation.users for each in evaluations.values() for evaluation in each]
    everywhere = functools.reduce(functools.partial(np.intersect1d, assume_unique=True), tested)
    return {
        key: np.stack([e.per_user[metric][np.searchsorted(e.users, everywhere)] for e in each])
        for key, each in evaluations.items()
    }


def _side(key: tuple[str, str]) -> dict[str, str]:
    return {"role": key[0], "model": key[1]}


def _fields(estimate: Estimate) -> dict[str, Any]:
    fields = estimate.as_dict()
    fields["difference"] = fields.pop("value")
    return fields
