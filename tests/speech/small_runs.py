"""Runs of recipes with tiny models, one epoch and little data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apps.speech.config import load_config, read_recipe
from apps.speech.measure import evaluate
from apps.speech.pipeline import Pipeline
from kdcore.config import dump_yaml
from kdcore.report import write_report

TRAINER = {"max_epochs": 1, "patience": 0, "monitor": "cer", "mode": "min", "threads": 1, "tensorboard": False}
# tiny models by kind
SIZES: dict[str, dict[str, Any]] = {
    "bilstm": {"channels": [2, 4], "width": 16, "hidden": 16, "layers": 1},
    "attention": {
        **{"channels": [2, 4], "width": 16, "hidden": 16, "layers": 1},
        **{"embedding": 8, "decoder": 12, "filters": 2, "kernel": 3},
    },
    "conformer": {"channels": [2, 4], "width": 16, "heads": 2, "feed_forward": 16, "kernel": 3},
    "chunked_conformer": {"channels": [2, 4], "width": 16, "heads": 2, "feed_forward": 16, "kernel": 3},
    "conv_rnn": {"channels": [2, 4], "width": 16, "hidden": 16, "convolutions": 1, "layers": 1},
}


def small(recipe: str, source: Path, folder: Path, **changes: Any) -> Pipeline:
    """Return a run of a recipe with tiny models and one epoch."""
    values = read_recipe(recipe)
    teacher, student = values["teacher"], values["student"]
    members = [_tiny(member) for member in teacher.get("members", [teacher])]
    values["teacher"] = {**teacher, "members": members} if "members" in teacher else members[0]
    values["student"] = _tiny(student)
    if recipe == "lstm_to_cnn":
        values["student"]["options"] |= {"layers": 0, "convolutions": 2}
    values["views"] = values.get("views", [{}])[:2]
    values["decode"] = {"beam": 4, "lm_weights": [1.0], "word_scores": [0.0]}
    values["data"] = {"path": str(source)}
    file = folder / "config.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dump_yaml({**values, **changes}), encoding="utf-8")
    return Pipeline(load_config(file=file), folder / "run")


def _tiny(model: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in model.items() if name in ("kind", "guided", "labels", "alone", "quantize")}
    sizes = dict(SIZES[model["kind"]])
    return {**kept, "options": sizes, "trainer": TRAINER, "optimization": {"batch_frames": 1500}}


def run(pipeline: Pipeline) -> list[dict[str, Any]]:
    for seed in pipeline.config.seeds:
        pipeline.teach(seed)
        pipeline.distill(seed)
    rows = evaluate(pipeline)
    pipeline.deploy()
    write_report(pipeline.run.path)
    return rows
