"""What the demo shows at its end: one user's history and the student's recommendations, with titles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from apps.recsys.data.dataset import Dataset
from apps.recsys.recommend import all_histories, open_run
from apps.recsys.topk import top_k


def show_recommendations(run: Path, console: Console, k: int = 10) -> None:
    """Print the last items of a typical user and ten recommendations of the student."""
    dataset, model = open_run(run, "student")
    histories = all_histories(dataset)
    counts = histories.counts()
    user = int(np.argsort(counts, kind="stable")[len(counts) // 2])
    items, scores = top_k(model, np.array([user]), k, histories, histories)
    titles = _titles(dataset)
    console.print(f"user {dataset.user_ids[user].as_py()} last had:")
    for item in histories.of(user)[-5:]:
        console.print(f"  {titles[item]}", highlight=False)
    table = Table("rank", "recommended", "score", title=f"and is recommended by {model.label()}", box=None)
    for rank, (item, score) in enumerate(zip(items[0], scores[0], strict=True), start=1):
        table.add_row(str(rank), titles[item], f"{score:.3f}")
    console.print(table)


def _titles(dataset: Dataset) -> list[str]:
    features = dataset.item_features
    if features is not None and "title" in features.column_names:
        return [str(title) for title in features["title"].to_pylist()]
    return [str(item) for item in dataset.item_ids.to_pylist()]
