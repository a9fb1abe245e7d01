"""Train one RecBole model on a fixed split and print what it cost as one line of JSON.

Runs inside the environment that ``benchmarks/peers/setup_recbole.sh`` builds, not in the project's own: RecBole 1.2.1
needs older NumPy, SciPy and pandas. The split arrives as RecBole's benchmark files, so that both sides learn from
the same interactions; CPU seconds are those of ``fit()`` with its validations, without imports, data loading and
checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed


def train(model_name: str, data: Path, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Fit ``model_name`` and return CPU seconds, the validation curve and the test metrics of the best epoch."""
    config = Config(
        model=model_name,
        dataset=data.name,
        config_dict={
            "data_path": str(data.parent),
            "benchmark_filename": ["train", "valid", "test"],
            "load_col": {"inter": ["user_id", "item_id"]},
            "eval_args": {"mode": "full", "order": "RO", "group_by": "user"},
            "metrics": ["Hit", "NDCG"],
            "topk": [10],
            "valid_metric": "NDCG@10",
            "metric_decimal_place": 6,
            "use_gpu": False,
            "show_progress": False,
            "seed": seed,
            **settings,
        },
    )
    init_seed(seed, config["reproducibility"])
    dataset = create_dataset(config)
    train_data, valid_data, test_data = data_preparation(config, dataset)
    init_seed(seed, config["reproducibility"])
    model = get_model(config["model"])(config, train_data.dataset).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    curve: list[dict[str, float]] = []
    best: dict[str, Any] = {"score": -1.0, "epoch": -1, "state": {}}

    def note(epoch: int, score: float) -> None:
        curve.append({"cpu_seconds": round(time.process_time() - started, 3), "ndcg@10": float(score)})
        if score > best["score"]:
            state = {name: value.clone() for name, value in model.state_dict().items()}
            best.update(score=float(score), epoch=epoch, state=state)

    started = time.process_time()
    trainer.fit(train_data, valid_data, verbose=False, saved=False, show_progress=False, callback_fn=note)
    cpu_seconds = time.process_time() - started
    model.load_state_dict(best["state"])
    if hasattr(model, "restore_user_e"):
        model.restore_user_e = model.restore_item_e = None  # LightGCN keeps the last epoch's propagated vectors
    test = trainer.evaluate(test_data, load_best_model=False, show_progress=False)
    return {
        "seed": seed,
        "cpu_seconds": round(cpu_seconds, 3),
        "cpu_seconds_to_best": curve[best["epoch"]]["cpu_seconds"],
        "epochs": len(curve),
        "best_epoch": best["epoch"],
        "valid": {"ndcg@10": best["score"]},
        "test": {"hr@10": float(test["hit@10"]), "ndcg@10": float(test["ndcg@10"])},
        "parameters": sum(value.numel() for value in model.parameters()),
        "users": int(dataset.user_num) - 1,
        "items": int(dataset.item_num) - 1,
        "interactions": [len(part.dataset) for part in (train_data, valid_data, test_data)],
        "load_average_1min": round(os.getloadavg()[0], 2),
        "curve": curve,
    }


def main() -> None:
    """Read the command line, train in a scratch folder (RecBole writes logs beside itself) and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="BPR or LightGCN")
    parser.add_argument("--data", type=Path, required=True, help="folder NAME with NAME.{train,valid,test}.inter")
    parser.add_argument("--settings", required=True, help="RecBole settings as JSON")
    parser.add_argument("--seed", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = given.data.resolve()
    arguments, sys.argv = sys.argv, sys.argv[:1]  # RecBole reads the command line as well
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        result = train(given.model, data, json.loads(given.settings), given.seed)
        os.chdir(data)
    sys.argv = arguments
    print(json.dumps(result))


if __name__ == "__main__":
    main()
