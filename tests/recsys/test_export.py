"""An exported folder answers as the run does, on a machine that has no torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file

from apps.recsys import export as room
from apps.recsys.data.dataset import load_dataset
from apps.recsys.data.histories import Histories
from apps.recsys.export import export, is_export
from apps.recsys.models.ensemble import Ensemble
from apps.recsys.models.store import load_model, save_model
from apps.recsys.recommend import all_histories, recommend
from apps.recsys.runtime import ExportedRecommender, pad_histories
from kdcore.config import UserError
from kdcore.run import read_json
from tests.recsys.tiny_run import N_ITEMS, N_USERS, SEQUENTIAL, make_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("export")
    return {
        "mf": make_run(base / "mf", seeds="[0, 1]"),
        "sasrec": make_run(base / "sasrec", "sequential_soft_targets", overrides=SEQUENTIAL),
    }


@pytest.fixture(scope="module")
def exports(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("exports")
    return {
        "mf": export(runs["mf"], "student", base / "mf"),
        "ease": export(runs["mf"], "teacher", base / "ease"),
        "sasrec": export(runs["sasrec"], "student", base / "sasrec"),
    }


SOURCES = {"mf": ("mf", "student"), "ease": ("mf", "teacher"), "sasrec": ("sasrec", "student")}

# what stands where torch would be: the import system asks it first
NO_TORCH = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "lightning_fabric", "pyarrow", "scipy", "pandas"):
            raise ImportError(f"{name} is not on this machine")

sys.meta_path.insert(0, Blocker())
try:
    import torch
except ImportError:
    pass
else:
    sys.exit("the blocker does not block")
"""

PLAIN = """
import json
from pathlib import Path
import numpy as np
import onnxruntime
from safetensors.numpy import load_file

def lists(folder, k, exclude_seen):
    folder = Path(folder)
    names = ("model", "users", "items")
    about, users, items = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in names)
    seen = load_file(folder / "seen.safetensors")
    session = onnxruntime.InferenceSession(str(folder / "scorer.onnx"), providers=["CPUExecutionProvider"])
    inputs = {each.name for each in session.get_inputs()}
    result = {}
    for index, user in enumerate(users):
        had = seen["items"][seen["indptr"][index]:seen["indptr"][index + 1]]
        if "user_vector" in inputs:
            fed = {"user_vector": load_file(folder / "vectors.safetensors")["user_vectors"][index:index + 1]}
        else:
            history = had[-about["history_length"]:] if about["history_length"] else had
            fed = {"history": history[None].astype(np.int64), "lengths": np.array([len(history)])}
        fed = {name: value for name, value in fed.items() if name in inputs}
        fed["k"] = np.array([k + len(had)])
        best, scores = (each[0] for each in session.run(["top_items", "top_scores"], fed))
        kept = [(items[i], float(s)) for i, s in zip(best, scores) if not (exclude_seen and i in had)]
        result[user] = kept[:k]
    return result
"""

BY_RUNTIME = """
from apps.recsys.runtime import ExportedRecommender

def lists(folder, k, exclude_seen):
    model = ExportedRecommender(folder)
    return {
        user: [(each.item_id, each.score) for each in model.recommend(user, k=k, exclude_seen=exclude_seen)]
        for user in model.user_ids
    }
"""


def without_torch(program: str, folder: Path, exclude_seen: bool) -> dict[str, list[tuple[str, float]]]:
    """Run a program that defines lists() in a process in which torch cannot be imported."""
    code = f"{NO_TORCH}\n{program}\nprint(json.dumps(lists({str(folder)!r}, 10, {exclude_seen})))"
    code = "import json\n" + code
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return {user: [tuple(pair) for pair in pairs] for user, pairs in json.loads(done.stdout).items()}


@pytest.mark.parametrize("program", [PLAIN, BY_RUNTIME], ids=["plain", "runtime"])
@pytest.mark.parametrize("name", SOURCES)
def test_same_lists_without_torch(
    runs: dict[str, Path], exports: dict[str, Path], tmp_path: Path, name: str, program: str
) -> None:
    for exclude_seen in (True, False):
        got = without_torch(program, exports[name], exclude_seen)
        source, role = SOURCES[name]
        recommend(runs[source], role, "all", 10, exclude_seen, tmp_path / "recs.parquet")
        wanted: dict[str, list[tuple[str, float]]] = {}
        for row in pq.read_table(tmp_path / "recs.parquet").to_pylist():
            wanted.setdefault(row["user_id"], []).append((row["item_id"], row["score"]))
        assert len(wanted) == N_USERS and list(got) == list(wanted)
        for user, expected in wanted.items():
            assert [item for item, _ in got[user]] == [item for item, _ in expected], user
            np.testing.assert_allclose([s for _, s in got[user]], [s for _, s in expected], rtol=1e-4, atol=1e-5)


def test_vectors_give_the_scores(runs: dict[str, Path], exports: dict[str, Path]) -> None:
    for name in ("mf", "sasrec"):
        source, role = SOURCES[name]
        dataset, model = load_dataset(runs[source] / "data"), load_model(runs[source] / role)
        vectors = load_file(exports[name] / "vectors.safetensors")
        scores = vectors["user_vectors"] @ vectors["item_vectors"].T + vectors.get("item_bias", 0)
        with torch.no_grad():
            wanted = model.scores(torch.arange(dataset.n_users), all_histories(dataset)).numpy()
        np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-5)
    assert not (exports["ease"] / "vectors.safetensors").exists()
    names = {"user_vectors", "item_vectors", "item_bias", "fold_in"}
    assert set(load_file(exports["mf"] / "vectors.safetensors")) == names


@pytest.mark.parametrize("name", ["ease", "sasrec"])
def test_a_raw_history_of_any_length(runs: dict[str, Path], exports: dict[str, Path], name: str) -> None:
    source, role = SOURCES[name]
    model: Any = load_model(runs[source] / role)
    runtime = ExportedRecommender(exports[name])
    generator = np.random.default_rng(1)
    for length in (0, 1, 2, 8, 9, 30):
        history = generator.choice(N_ITEMS, size=length, replace=False)
        one = Histories(np.array([0, length]), history.astype(np.int32), N_ITEMS)
        with torch.no_grad():
            scores = model.scores(torch.tensor([0]), one)[0].numpy()
        open_items = [item for item in range(N_ITEMS) if item not in set(history.tolist())]
        wanted = sorted(open_items, key=lambda item: (-float(scores[item]), item))[:5]
        got = runtime.recommend(history=[runtime.item_ids[item] for item in history], k=5)
        assert [each.score for each in got] == pytest.approx([float(scores[item]) for item in wanted], abs=1e-4)
        if length:  # without a history every score is equal up to rounding
            assert [each.item_id for each in got] == [runtime.item_ids[item] for item in wanted]


def test_batches_do_not_mix(exports: dict[str, Path]) -> None:
    session = onnxruntime.InferenceSession(str(exports["sasrec"] / "scorer.onnx"))
    histories = [np.array([3, 1, 2]), np.array([], dtype=np.int64), np.arange(8), np.array([5])]
    padded, lengths = pad_histories(histories, N_ITEMS, 8)
    k = np.array([4])
    together = session.run(["scores", "top_items"], {"history": padded, "lengths": lengths, "k": k})
    for row, history in enumerate(histories):
        alone, length = pad_histories([history], N_ITEMS, 8)
        scores, items = session.run(["scores", "top_items"], {"history": alone, "lengths": length, "k": k})
        np.testing.assert_allclose(together[0][row], scores[0], rtol=1e-5, atol=1e-6)
        assert len(history) == 0 or together[1][row].tolist() == items[0].tolist()


def test_metadata(runs: dict[str, Path], exports: dict[str, Path]) -> None:
    about = read_json(exports["mf"] / "model.json")
    rows = read_json(runs["mf"] / "metrics.json")
    dataset = load_dataset(runs["mf"] / "data")
    assert about["metrics"] == [row for row in rows if row["role"] == "student"]
    assert {row["seed"] for row in about["metrics"]} == {0, 1} and about["seed"] in (0, 1)
    assert (about["kind"], about["users"], about["items"], about["dimension"]) == ("mf", N_USERS, N_ITEMS, 8)
    assert about["data"]["fingerprint"] == dataset.fingerprint
    assert about["training"]["recipe"] == "relaxed_ranking" and about["training"]["provenance"]["versions"]["torch"]
    assert 0 <= about["parity"]["max_abs_difference"] < 1e-4 and about["parity"]["users"] == N_USERS
    for file in exports["mf"].iterdir():
        if file.name == "model.json":
            continue
        content = file.read_bytes()
        noted = about["files"].pop(file.name)
        assert noted == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert not about["files"]
    versions = {read_json(folder / "model.json")["model_version"] for folder in exports.values()}
    assert len(versions) == 3


def test_ids_titles_and_seen(runs: dict[str, Path], exports: dict[str, Path]) -> None:
    dataset = load_dataset(runs["mf"] / "data")
    folder = exports["mf"]
    assert read_json(folder / "users.json") == dataset.user_ids.to_pylist()
    assert read_json(folder / "items.json") == dataset.item_ids.to_pylist()
    titles = dict(zip(read_json(folder / "items.json"), read_json(folder / "titles.json"), strict=True))
    assert titles["物7"] is None and titles["物8"] == "[bold]Title 8"
    features = pq.read_table(folder / "items.parquet")
    assert dict(zip(features["item_id"].to_pylist(), features["title"].to_pylist(), strict=True)) == titles
    seen, histories = load_file(folder / "seen.safetensors"), all_histories(dataset)
    np.testing.assert_array_equal(seen["indptr"], histories.indptr)
    np.testing.assert_array_equal(seen["items"], histories.items)
    best = ExportedRecommender(folder).recommend("ü3", k=1)[0]
    assert best.title == titles[best.item_id]


def test_ids_of_either_type_in_blocks(tmp_path: Path) -> None:
    for ids in (pa.array([5, -7, 2**62]), pa.array(['a"b', "ü\u2028", "", "7"]), pa.array([], pa.string())):
        room._write_ids(tmp_path / "ids.json", ids, block=2)
        assert read_json(tmp_path / "ids.json") == ids.to_pylist()


def test_same_run_same_bytes(runs: dict[str, Path], exports: dict[str, Path], tmp_path: Path) -> None:
    for name, (source, role) in SOURCES.items():
        again = export(runs[source], role, tmp_path / name)
        names = sorted(file.name for file in again.iterdir())
        assert names == sorted(file.name for file in exports[name].iterdir())
        for file in names:
            assert (again / file).read_bytes() == (exports[name] / file).read_bytes(), file


def test_no_paths_of_this_machine(exports: dict[str, Path]) -> None:
    for folder in exports.values():
        content = (folder / "scorer.onnx").read_bytes()
        assert str(ROOT).encode() not in content and b".py" not in content


def test_replaces_an_export_and_nothing_else(runs: dict[str, Path], exports: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()  # empty: taken
    export(runs["mf"], "student", target)
    (target / "stale.bin").write_text("of an earlier export")
    first = read_json(target / "model.json")["model_version"]
    export(runs["mf"], "student_alone", target)
    assert read_json(target / "model.json")["model_version"] != first and not (target / "stale.bin").exists()
    assert [each.name for each in tmp_path.iterdir()] == ["out"]

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds files that no export wrote"):
        export(runs["mf"], "student", mine)
    with pytest.raises(UserError, match="holds files that no export wrote"):  # a run has a model.json, too, below
        export(runs["mf"], "student", runs["mf"] / "student")
    with pytest.raises(UserError, match="is a file, wanted a folder"):
        export(runs["mf"], "student", mine / "thesis.txt")
    assert (mine / "thesis.txt").read_text() == "years of work" and (runs["mf"] / "student" / "model.json").exists()
    assert not is_export(runs["mf"] / "student") and is_export(exports["mf"])


def test_a_failure_leaves_the_old_export(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = export(runs["mf"], "student", tmp_path / "out")
    before = {file.name: file.read_bytes() for file in target.iterdir()}

    def failing(*arguments: object) -> None:
        raise RuntimeError("lights out")

    monkeypatch.setattr(room, "_checksums", failing)
    for out in (target, tmp_path / "new"):
        with pytest.raises(RuntimeError, match="lights out"):
            export(runs["mf"], "student_alone", out)
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before


def test_an_ensemble_is_refused_with_alternatives(runs: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(runs["mf"], copy)
    members = [load_model(copy / "teacher"), load_model(copy / "student")]
    shutil.rmtree(copy / "teacher")
    save_model(Ensemble(members), copy / "teacher")
    with pytest.raises(UserError, match="wanted --model student or student_alone"):
        export(copy, "teacher", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runtime_refuses_what_it_cannot_answer(exports: dict[str, Path], tmp_path: Path) -> None:
    by_vector, by_history = ExportedRecommender(exports["mf"]), ExportedRecommender(exports["sasrec"])
    for call, message in (
        (lambda: by_vector.recommend("nobody"), "unknown user 'nobody'"),
        (lambda: by_vector.recommend(), "either user_id or history"),
        (lambda: by_vector.recommend("ü1", history=["物1"]), "either user_id or history"),
        (lambda: by_vector.recommend(history=["x"]), "unknown item 'x'"),
        (lambda: by_history.recommend(history=["物1", "x"]), "unknown item 'x'"),
        (lambda: by_history.recommend("ü1", k=0), "k: got 0, wanted 1 to 40"),
        (lambda: ExportedRecommender(tmp_path), "model.json is missing"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    (tmp_path / "model.json").write_text('{"format": "kdsuite-recommender/99"}')
    with pytest.raises(UserError, match="format 'kdsuite-recommender/99'"):
        ExportedRecommender(tmp_path)
    assert len(by_history.recommend("ü1", k=N_ITEMS)) == N_ITEMS - 12
