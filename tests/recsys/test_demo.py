"""The demo ends with ten recommendations a person can read."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from apps.recsys.data.dataset import load_dataset
from apps.recsys.demo import show_recommendations
from apps.recsys.models.store import load_model
from apps.recsys.recommend import all_histories
from apps.recsys.topk import top_k
from tests.recsys.tiny_run import make_run


def test_ten_recommendations_with_titles(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    text = io.StringIO()
    show_recommendations(run, Console(file=text, width=100))
    lines = [line.strip() for line in text.getvalue().splitlines() if line.strip()]
    dataset, model = load_dataset(run / "data"), load_model(run / "student")
    features = dataset.item_features
    assert features is not None
    ids = dataset.item_ids.to_pylist()
    titles = [title or name for title, name in zip(features["title"].to_pylist(), ids, strict=True)]
    user = dataset.user_ids.to_pylist().index(lines[0].split()[1])
    histories = all_histories(dataset)
    assert lines[0].endswith("last had:")
    assert lines[1:6] == [titles[item] for item in histories.of(user)[-5:]]
    assert lines[6] == "and the student (mf-8) recommends:" and lines[7].split() == ["rank", "title", "score"]
    items, _ = top_k(model, [user], 10, histories, histories)
    assert [line.split(maxsplit=1)[1].rpartition(" ")[0].strip() for line in lines[8:]] == [titles[i] for i in items[0]]
    assert [int(line.split()[0]) for line in lines[8:]] == list(range(1, 11))
