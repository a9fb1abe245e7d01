"""How long training takes to a quality on ml-100k, side by side with RecBole where that is installed.

CPU seconds are those of the whole process from the first batch on, validation after every epoch included, imports and
data loading excluded; RecBole's ``fit()`` is measured in the same way, on the same split, in its own environment
(``benchmarks/peers/setup_recbole.sh`` builds it). One thread each, one after the other.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apps.recsys.config import ModelConfig
from apps.recsys.data.dataset import load_dataset
from apps.recsys.data.splits import PARTS, Split, leave_last_out
from apps.recsys.data.store import find_data
from apps.recsys.distill import Optimization
from apps.recsys.evaluate import Evaluation, Evaluator, evaluate
from apps.recsys.fitting import new_model, teaching_step
from apps.recsys.models.base import Recommender
from apps.recsys.models.factors import LightGCN
from kdcore.config import UserError, resolved
from kdcore.progress import Announcer
from kdcore.run import write_text
from kdcore.trainer import Trainer
from kdcore.trainer_config import TrainerConfig

METRICS = ("ndcg@10", "hr@10")
SEEDS = (0, 1, 2)
_ROOT = Path(__file__).resolve().parents[2]
PEER_PYTHON = _ROOT / "runs" / "peers" / "recbole" / "bin" / "python"
_PEER_SCRIPT = _ROOT / "benchmarks" / "peers" / "recbole_train.py"
_PEER_SETUP = "benchmarks/peers/setup_recbole.sh"


@dataclass(frozen=True)
class Peer:
    """How RecBole trains the same kind of model, and what it needed elsewhere (quoted, never compared)."""

    model: str
    settings: Mapping[str, Any]
    quoted: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One model to train, and its peer if there is one."""

    config: ModelConfig
    peer: Peer | None = None


_RECBOLE = {"embedding_size": 64, "train_batch_size": 2048, "epochs": 60, "stopping_step": 10}

# ours were chosen on the validation part of seeds 0-2; the peer's settings are the ones of its quoted numbers
CASES: Mapping[str, Case] = {
    "bpr": Case(
        ModelConfig(
            kind="mf",
            options={"dimension": 64, "bias": False},
            optimization=Optimization(loss="bpr", batch_size=4096, learning_rate=0.01, weight_decay=1e-5),
            trainer=TrainerConfig(max_epochs=60, patience=10),
        ),
        Peer("BPR", {**_RECBOLE, "learning_rate": 0.002}, {"cpu_seconds": 18.7, "ndcg@10": 0.068}),
    ),
    "lightgcn": Case(
        ModelConfig(
            kind="lightgcn",
            options={"dimension": 64, "layers": 3, "scale": 0.3},
            optimization=Optimization(loss="bpr", batch_size=8192, learning_rate=0.02),
            trainer=TrainerConfig(max_epochs=60, patience=10),
        ),
        Peer("LightGCN", {**_RECBOLE, "learning_rate": 0.005, "n_layers": 3}, {"cpu_seconds": 69.9, "ndcg@10": 0.061}),
    ),
    "sasrec": Case(
        ModelConfig(
            kind="sasrec",
            options={"dimension": 64, "layers": 2, "heads": 1, "length": 50, "dropout": 0.3},
            optimization=Optimization(loss="cross_entropy", batch_size=64, learning_rate=0.002),
            trainer=TrainerConfig(max_epochs=60, patience=8),
        )
    ),
}


def run(
    work: Path,
    *,
    cases: Mapping[str, Case] = CASES,
    seeds: Sequence[int] = SEEDS,
    split: Split | None = None,
    peer_python: Path = PEER_PYTHON,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train every case with every seed, and its peer beside it, and compare CPU seconds to the peer's final quality.

    ``work`` takes the split in the peer's format; ``split`` is ml-100k, leave-last-out, if None. Where the peer is not
    installed its quoted quality is the target and no ratio is given.

    Raises UserError if the data are not there, RuntimeError if the peer's process fails.
    """
    tell = tell or Announcer()
    load = os.getloadavg()
    if split is None:
        split = leave_last_out(load_dataset(find_data("ml-100k")))
    if not seeds:
        raise UserError("seeds: got none, wanted at least one")
    data = _write_benchmark_files(split, work / "recbole" / "leave_last_out")
    installed = peer_python.exists() and _PEER_SCRIPT.exists()
    threads = torch.get_num_threads()
    models = {}
    try:
        torch.set_num_threads(1)
        first = next(iter(cases.values())).config
        # what the first fit of a process imports is nobody's training time
        fit(replace(first, trainer=replace(first.trainer, max_epochs=1)), split, 0)
        for name, case in cases.items():
            own, other = [], []
            for seed in seeds:  # side by side, so that both meet the same machine
                tell(f"{name}, seed {seed}")
                own.append(fit(case.config, split, seed))
                if installed and case.peer is not None:
                    tell(f"RecBole {case.peer.model}, seed {seed}")
                    other.append(_fit_peer(case.peer, data, seed, peer_python))
            models[name] = compare(case, own, other)
    finally:
        torch.set_num_threads(threads)
    return {
        "data": f"ml-100k, {split.kind}, full ranking" if split.kind == "leave_last_out" else split.kind,
        "split": split.fingerprint,
        "seeds": list(seeds),
        "threads": 1,
        "peer": "RecBole 1.2.1, measured" if installed else f"RecBole not installed: {_PEER_SETUP} builds it; quoted",
        "load_average": {"before": [round(x, 2) for x in load], "after": [round(x, 2) for x in os.getloadavg()]},
        "models": models,
    }


class _TimedEvaluator(Evaluator):
    """Notes the CPU seconds at which each validation was done."""

    def __init__(self, split: Split) -> None:
        super().__init__(split, "valid", METRICS)
        self.started = time.process_time()
        self.curve: list[dict[str, float]] = []

    def __call__(self, model: Recommender, *, progress: Callable[[int, int], None] | None = None) -> Evaluation:
        evaluation = super().__call__(model, progress=progress)
        spent = round(time.process_time() - self.started, 3)
        self.curve.append({"cpu_seconds": spent, **evaluation.values})
        return evaluation


def fit(config: ModelConfig, split: Split, seed: int) -> dict[str, Any]:
    """Fit once on this process's CPU and return CPU seconds, the validation curve and the selected epoch's metrics.

    Raises UserError for settings that make no model.
    """
    trainer = replace(config.trainer, threads=1, accelerator="cpu", validate_every=1, tensorboard=False)
    config = replace(config, trainer=trainer)
    evaluator = _TimedEvaluator(split)
    model = new_model(config, split, seed)
    step = teaching_step(config, model, split, evaluator)
    loop = Trainer(trainer, seed=seed, description=config.kind)
    evaluator.started = time.process_time()
    result = loop.fit(step)
    cpu_seconds = time.process_time() - evaluator.started
    final = model.finalize() if isinstance(model, LightGCN) else model
    return {
        "seed": seed,
        "cpu_seconds": round(cpu_seconds, 3),
        "cpu_seconds_to_best": evaluator.curve[result.best_epoch]["cpu_seconds"],
        "epochs": result.epochs,
        "best_epoch": result.best_epoch,
        "valid": dict(result.best_metrics),
        "test": evaluate(final, split, "test", METRICS).values,
        "parameters": sum(value.numel() for value in model.parameters()),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "curve": evaluator.curve,
    }


def compare(case: Case, own: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarise the fits of one case; ``other`` are the peer's, empty where there is none or it is not installed.

    The target is the mean of the peer's best validation NDCG@10. ``cpu_seconds_to_target`` is None for a seed that
    never reaches it, and ``times_faster`` (mean of the peer's whole fit over the mean to the target) is None then, and
    wherever the peer was not measured here.
    """
    result: dict[str, Any] = {"settings": resolved(case.config), "summary": _summary(own), "fits": list(own)}
    if case.peer is None:
        return result
    quality = _moments([each["valid"]["ndcg@10"] for each in other])["mean"] if other else case.peer.quoted["ndcg@10"]
    reached = [
        next((point["cpu_seconds"] for point in each["curve"] if point["ndcg@10"] >= quality), None) for each in own
    ]
    all_reached = all(seconds is not None for seconds in reached)
    taken = _moments([seconds for seconds in reached if seconds is not None]) if all_reached else None
    summary = _summary(other) if other else None
    result["target"] = {"ndcg@10": quality, "source": "measured" if other else "quoted"}
    result["cpu_seconds_to_target"] = {"seeds": reached, **(taken or {"mean": None, "sd": None})}
    result["times_faster"] = summary["cpu_seconds"]["mean"] / taken["mean"] if summary and taken else None
    result["peer"] = {
        "model": case.peer.model,
        "settings": dict(case.peer.settings),
        "quoted": dict(case.peer.quoted),
        "summary": summary,
        "fits": list(other),
    }
    return result


def _summary(fits: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return mean and standard deviation over seeds of what was measured."""
    values = {name: [each[name] for each in fits] for name in ("cpu_seconds", "cpu_seconds_to_best", "epochs")}
    for part in ("valid", "test"):
        for metric in fits[0][part]:
            values[f"{part} {metric}"] = [each[part][metric] for each in fits]
    return {name: _moments(each) for name, each in values.items()}


def _moments(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean and the standard deviation with n - 1, None for a single value."""
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def _write_benchmark_files(split: Split, folder: Path) -> Path:
    """Write the split as RecBole's benchmark files, NAME.{train,valid,test}.inter in a folder of the same name."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        histories = getattr(split, part)
        rows = (f"{user}\t{item}" for user, item in zip(histories.users(), histories.items, strict=True))
        write_text(folder / f"{folder.name}.{part}.inter", "\n".join(["user_id:token\titem_id:token", *rows]) + "\n")
    return folder


def _fit_peer(peer: Peer, data: Path, seed: int, python: Path) -> dict[str, Any]:
    command = [str(python), str(_PEER_SCRIPT), "--model", peer.model, "--data", str(data.resolve())]
    command += ["--settings", json.dumps(dict(peer.settings)), "--seed", str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"RecBole ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])
