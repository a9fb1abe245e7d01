"""The training benchmark on a made-up split, with a stand-in for RecBole's environment."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from apps.recsys.bench_train import CASES, Case, compare, run
from apps.recsys.config import ModelConfig
from apps.recsys.distill import Optimization
from kdcore.config import UserError
from kdcore.trainer_config import TrainerConfig
from tests.recsys.made import split

PEER_NDCG = 0.01
# reads the split it is handed, as the real script does, and answers in its form
STAND_IN = """#!{python}
import json, sys
given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
folder = given["--data"]
rows = []
for part in ("train", "valid", "test"):
    lines = open(folder + "/leave_last_out." + part + ".inter").read().splitlines()
    rows.append([lines[0], *(tuple(map(int, line.split())) for line in lines[1:])])
print("RecBole says something first")
print(json.dumps({{
    "seed": int(given["--seed"]), "cpu_seconds": 50.0, "cpu_seconds_to_best": 40.0, "epochs": 3, "rows": rows,
    "valid": {{"ndcg@10": {ndcg}}}, "test": {{"ndcg@10": 0.5, "hr@10": 0.5}}, "model": given["--model"],
    "settings": json.loads(given["--settings"]),
}}))
"""


def _cases() -> dict[str, Case]:
    factors = ModelConfig(
        kind="mf",
        options={"dimension": 4},
        optimization=Optimization(batch_size=32, learning_rate=0.05),
        trainer=TrainerConfig(max_epochs=3),
    )
    sequences = replace(
        factors,
        kind="sasrec",
        options={"dimension": 4, "length": 5},
        optimization=Optimization(loss="cross_entropy", batch_size=8),
    )
    return {"bpr": Case(factors, CASES["bpr"].peer), "sasrec": Case(sequences)}


def test_both_sides_are_measured_on_the_same_split(tmp_path):
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable, ndcg=PEER_NDCG))
    python.chmod(0o755)
    data, told = split(seed=1), []
    result = run(tmp_path, cases=_cases(), seeds=[0, 1], split=data, peer_python=python, tell=told.append)
    assert told == ["bpr, seed 0", "RecBole BPR, seed 0", "bpr, seed 1", "RecBole BPR, seed 1"] + [
        f"sasrec, seed {seed}" for seed in (0, 1)
    ]
    json.dumps(result, allow_nan=False)
    bpr = result["models"]["bpr"]
    peer = bpr["peer"]["fits"][1]
    assert (peer["seed"], peer["model"], peer["settings"]["learning_rate"]) == (1, "BPR", 0.002)
    for (header, *rows), part in zip(peer["rows"], (data.train, data.valid, data.test), strict=True):
        assert header == "user_id:token\titem_id:token"
        assert [list(row) for row in zip(part.users().tolist(), part.items.tolist(), strict=True)] == rows
    assert bpr["target"] == {"ndcg@10": PEER_NDCG, "source": "measured"}
    for fitted in bpr["fits"]:
        curve = fitted["curve"]
        assert len(curve) == fitted["epochs"] == 3
        assert [point["cpu_seconds"] for point in curve] == sorted(point["cpu_seconds"] for point in curve)
        assert fitted["valid"]["ndcg@10"] == max(point["ndcg@10"] for point in curve)
        assert fitted["cpu_seconds_to_best"] == curve[fitted["best_epoch"]]["cpu_seconds"] <= fitted["cpu_seconds"]
    assert bpr["times_faster"] == pytest.approx(50.0 / bpr["cpu_seconds_to_target"]["mean"])
    assert "peer" not in result["models"]["sasrec"]
    assert set(result["models"]["sasrec"]["summary"]) >= {"test ndcg@10", "test hr@10", "cpu_seconds_to_best"}


def test_without_the_peer_its_numbers_are_quoted_and_nothing_is_compared(tmp_path):
    case = {"bpr": _cases()["bpr"]}
    result = run(tmp_path, cases=case, seeds=[0], split=split(), peer_python=tmp_path / "none", tell=print)
    assert "not installed" in result["peer"] and "setup_recbole.sh" in result["peer"]
    bpr = result["models"]["bpr"]
    assert bpr["target"] == {"ndcg@10": 0.068, "source": "quoted"}
    assert bpr["times_faster"] is None and bpr["peer"]["summary"] is None
    assert bpr["summary"]["cpu_seconds"]["sd"] is None


def test_a_target_that_a_seed_misses_gives_no_ratio():
    def fitted(curve: list[float]) -> dict[str, object]:
        points = [{"cpu_seconds": 1.0 + i, "ndcg@10": value, "hr@10": 0.0} for i, value in enumerate(curve)]
        part = {"ndcg@10": max(curve), "hr@10": 0.0}
        return {"cpu_seconds": 9.0, "cpu_seconds_to_best": 3.0, "epochs": 3, "valid": part, "test": part} | {
            "curve": points
        }

    case, peer = _cases()["bpr"], [fitted([0.4]), fitted([0.6])]
    good, late, never = fitted([0.5, 0.6]), fitted([0.1, 0.2, 0.5]), fitted([0.1, 0.2, 0.3])
    both = compare(case, [good, late], peer)
    assert both["target"]["ndcg@10"] == pytest.approx(0.5)
    assert both["cpu_seconds_to_target"] == {"seeds": [1.0, 3.0], "mean": 2.0, "sd": pytest.approx(2**0.5)}
    assert both["times_faster"] == pytest.approx(4.5)
    missed = compare(case, [good, never], peer)
    assert missed["cpu_seconds_to_target"] == {"seeds": [1.0, None], "mean": None, "sd": None}
    assert missed["times_faster"] is None


def test_what_the_peer_says_when_it_fails_is_passed_on(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such dataset >&2\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(RuntimeError, match="ended with 3: no such dataset"):
        run(tmp_path, cases=_cases(), seeds=[0], split=split(), peer_python=python, tell=print)


def test_no_seeds_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="seeds"):
        run(tmp_path, cases=_cases(), seeds=[], split=split(), tell=print)
