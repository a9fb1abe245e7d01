"""Finished runs small enough for a test: 30 users, 40 items with titles, two epochs, through the real pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from apps.recsys.config import load_config
from apps.recsys.pipeline import Pipeline

N_USERS, N_ITEMS, PER_USER = 30, 40, 12
EPOCHS = [("student.trainer.max_epochs", "2")]
SEQUENTIAL = [
    *EPOCHS,
    ("teacher.trainer.max_epochs", "2"),
    ("teacher.options.dimension", "16"),
    ("teacher.options.length", "8"),
    ("student.options.length", "8"),
    ("student.options.dimension", "8"),
]


def write_log(path: Path, *, titles: bool = True) -> Path:
    """Write a CSV log with Unicode ids and, beside it, titles in ``items.parquet``; return the CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    lines = ["user_id,item_id,timestamp,rating"]
    for user in range(N_USERS):
        for item in generator.choice(N_ITEMS, size=PER_USER, replace=False):
            lines.append(f"ü{user},物{item},{1_000_000_000 + len(lines)},{generator.integers(1, 6)}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if titles:
        ids = [f"物{item}" for item in range(N_ITEMS)]
        # one title is missing, and one looks like markup
        names = [None if item == 7 else f"[bold]Title {item}" for item in range(N_ITEMS)]
        pq.write_table(
            pa.table({"item_id": ids, "title": pa.array(names, pa.string())}), path.with_name("items.parquet")
        )
    return path


def make_run(
    folder: Path, recipe: str = "relaxed_ranking", *, seeds: str = "[0]", overrides: list[tuple[str, str]] | None = None
) -> Path:
    """Run a recipe on the tiny log and return the run directory."""
    log = write_log(folder / "data" / "log.csv")
    settings = [("data.path", str(log)), ("seeds", seeds), *(EPOCHS if overrides is None else overrides)]
    pipeline = Pipeline(load_config(recipe=recipe, overrides=settings), folder / "run")
    pipeline.run_all()
    return folder / "run"
