"""What the demo shows at its end: one user's history and the student's recommendations, with titles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from apps.recsys.data.dataset import Dataset
from apps.recsys.recommend import all_histories, open_run
from apps.recsys.topk import top_k


def show_recommendations(run: Path, console: Console, k: int = 10) -> None:
    """Print the last items of a user with a history of median length and ``k`` recommendations of the student."""
    dataset, model = open_run(run, "student")
    histories = all_histories(dataset)
    counts = histories.counts()
    user = int(np.argsort(counts, kind="stable")[len(counts) // 2])
    items, scores = top_k(model, np.array([user]), k, histories, histories)
    titles = _titles(dataset)
    # titles are data: a bracket in one is no markup
    console.print(f"user {dataset.user_ids[user].as_py()} last had:", markup=False, highlight=False)
    for item in histories.of(user)[-5:]:
        console.print(f"  {titles[item]}", markup=False, highlight=False)
    console.print(f"and the student ({model.label()}) recommends:", markup=False, highlight=False)
    table = Table("rank", "title", "score", box=None)
    for rank, (item, score) in enumerate(zip(items[0], scores[0], strict=True), start=1):
        if item >= 0:
            table.add_row(str(rank), Text(titles[item]), f"{score:.3f}")
    console.print(table)


def _titles(dataset: Dataset) -> list[str]:
    """Return the title of every item, its id where it has none."""
    names = [str(item) for item in dataset.item_ids.to_pylist()]
    features = dataset.item_features
    if features is None or "title" not in features.column_names:
        return names
    return [title or name for title, name in zip(features["title"].to_pylist(), names, strict=True)]
