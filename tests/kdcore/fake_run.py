"""A made-up run directory for the tests of the report: the shape of a real one, numbers from a generator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from kdcore.run import EventLog, RunDirectory, metric_row, write_json

# model, role, parameters, seeds, mean NDCG@10: a teacher, a student, its controls and what else one would try.
MODELS = (
    ("ials-256", "teacher", 2_540_000, 3, 0.4221),
    ("mf-8", "student", 22_682, 3, 0.4150),
    ("mf-8", "student_alone", 22_682, 3, 0.3902),
    ("ials-8", "baseline", 22_680, 3, 0.3961),
    ("popularity", "baseline", 3_706, 1, 0.2520),
    ("item-knn", "baseline", 0, 1, 0.3990),
    ("ials-64", "baseline", 620_000, 3, 0.4163),
)


def rows(models: Any = MODELS, metric: str = "ndcg@10", seed: int = 0) -> list[dict[str, Any]]:
    """Return rows for ``metrics.json`` with valid and test splits."""
    generator = np.random.default_rng(seed)
    found = []
    for split in ("valid", "test"):
        for model, role, params, n_seeds, mean in models:
            for run in range(n_seeds):
                value = mean + generator.normal(0, 0.0012) + (0.006 if split == "valid" else 0)
                found.append(
                    metric_row(
                        domain="recsys",
                        recipe="ranking-distillation",
                        model=model,
                        role=role,
                        seed=run,
                        split=split,
                        params=params,
                        bytes=4 * params + 1200 if params else 9_800_000,
                        metrics={metric: value, "recall@10": value * 1.4, "mrr": value * 0.8},
                        latency_ms={"p50": 0.08 + params / 1e6, "p99": 0.3 + 2.2 * params / 1e6},
                        train_seconds=12 + params / 4000,
                    )
                )
    return found


def write_fake_run(folder: Path, *, epochs: int = 40, simulated: bool = True) -> Path:
    """Write a complete run directory and return its path."""
    run = RunDirectory.open(folder)
    run.write_metrics(rows())
    run.write_config({"recipe": "ranking-distillation", "seed": 0, "student": {"kind": "mf", "dim": 8}, "top_n": 10})
    provenance = {
        "command": ["kd", "recsys", "run", "--recipe", "ranking-distillation", "--out", "runs/a run"],
        "started": "2025-03-04T05:06:07+0000",
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "machine": {"processor": "a processor", "cores": 2},
        "data": {"name": "interactions", "fingerprint": "00112233445566ff"},
        "simulated": simulated,
    }
    write_json(folder / "provenance.json", provenance)
    _write_log(folder / "log.jsonl", epochs)
    write_json(folder / "slices.json", {"metric": "ndcg@10", "slices": _slices()})
    return folder


def _write_log(path: Path, epochs: int) -> None:
    generator = np.random.default_rng(1)
    lines = []
    for model, role, final, speed in (
        ("ials-256", "teacher", 0.428, 6.0),
        ("mf-8", "student_alone", 0.396, 12.0),
        ("mf-8", "student", 0.421, 9.0),
    ):
        for seed in range(3):
            for epoch in range(1, epochs + 1):
                progress = 1 - np.exp(-epoch * 40 / epochs / speed)
                terms = {"bpr": 0.69 - 0.42 * progress + generator.normal(0, 0.003)}
                if role == "student":
                    terms["ranking"] = 2.1 * np.exp(-epoch * 40 / epochs / 14) + 0.01 + abs(generator.normal(0, 0.002))
                value = final * (0.4 + 0.6 * progress) + generator.normal(0, 0.0015)
                event = {"event": "epoch", "role": role, "model": model, "seed": seed, "epoch": epoch}
                lines.append(event | {"step": 100 * epoch, "terms": terms, "validation": {"ndcg@10": value}})
    log = EventLog(path)
    log.write("start", message="not an epoch")
    with open(path, "a", encoding="utf-8") as handle:
        handle.writelines(json.dumps(line) + "\n" for line in lines)


def _slices() -> list[dict[str, Any]]:
    generator = np.random.default_rng(2)
    axes = {
        "user activity": [("1-10", 812, 0.74), ("11-50", 2604, 0.95), ("51-200", 2010, 1.06), ("over 200", 614, 1.15)],
        "item popularity": [("lowest third", 431, 0.22), ("middle third", 1730, 0.6), ("top third", 3879, 1.22)],
    }
    return [
        {"axis": axis, "slice": name, "n": n, "role": role, "model": model, "seed": seed, "value": value}
        for axis, slices in axes.items()
        for name, n, factor in slices
        for model, role, _, n_seeds, mean in MODELS[:4]
        for seed in range(n_seeds)
        for value in [mean * factor + generator.normal(0, 0.004)]
    ]
