"""The recipes on AN4: one teacher, one student alone a seed, and the student of each recipe, three seeds."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apps.speech.bench_results import complete, summary
from apps.speech.config import load_config
from apps.speech.data.corpora import find_data
from kdcore.config import UserError

# every recipe under the teacher of the first, with its students alone
RECIPES = ("ctc_sequence_level", "ctc_frame_level", "ctc_segment_nbest", "ctc_guided")
SEEDS = (0, 1, 2)


def run(
    work: Path,
    only: Sequence[str] = (),
    *,
    data: str = "an4",
    seeds: Sequence[int] = SEEDS,
    overrides: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """Measure the recipes, or ``only`` some; ``overrides`` are settings of all of them.

    Eight speakers of the training part validate and choose everything; the test part is heard once, here.

    Raises:
        UserError: an unknown recipe, or no such data.
    """
    unknown = set(only) - set(RECIPES)
    if unknown:
        raise UserError(f"--only: got {', '.join(sorted(unknown))}, wanted some of {', '.join(RECIPES)}")
    name = find_data(data).name
    base: Path | None = None
    runs = {}
    for recipe in [each for each in RECIPES if not only or each in only]:
        folder = work / f"speech-{name}-{recipe}"
        if base is not None:
            share(base, folder, seeds)
        given = [("data.path", json.dumps(data)), ("seeds", json.dumps(list(seeds))), *overrides]
        runs[recipe] = summary(*complete(load_config(recipe=recipe, overrides=given), folder))
        base = base or folder
    about = f"{name}: 8 speakers of the training part validate; seeds {', '.join(map(str, seeds))}"
    return {"data": about, "runs": runs}


def share(source: Path, target: Path, seeds: Sequence[int]) -> None:
    """Give a run what it has in common with another: data, features, the teacher and what it said, students alone.

    A run looks at the keys of what it finds: what is not of its own settings is made again.
    """
    for name in ("data", "features", "seeds/shared", *(f"seeds/{seed}/student_alone" for seed in seeds)):
        if (source / name).exists() and not (target / name).exists():
            shutil.copytree(source / name, target / name, copy_function=os.link)
