"""Every way of teaching gives the same student with two processes as with one, and a whole run the same files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apps import cli
from apps.recsys.config import load_config
from apps.recsys.distill import RecommenderStep
from apps.recsys.pipeline import Pipeline
from kdcore.run import read_json, read_log
from tests.recsys.tiny_run import write_log

ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# more than one batch an epoch, the last one smaller; several epochs, so that what changes between them counts
SMALL = {"student.trainer.max_epochs": "3", "student.optimization.batch_size": "50", "baselines": "{}"}
SEQUENTIAL = {
    **SMALL,
    "teacher.trainer.max_epochs": "2",
    "teacher.options": "{dimension: 16, heads: 1, length: 8, dropout: 0.0}",
    "student.options": "{dimension: 8, length: 8, dropout: 0.0}",
    "student.alone": "{}",  # which has dropout of its own
    "student.optimization.batch_size": "7",
    "knowledge.sparse_soft_targets.options.length": "10",
}
RECIPES = {
    "relaxed_ranking": SMALL,
    "sequential_soft_targets": SEQUENTIAL,
    # a switch, a table of ranks, items that ask. Not distillation_experts: like dropout, its gates draw noise where
    # the loss is computed, and each process draws its own
    "ranking_distillation": {**SMALL, "knowledge.ranking_distillation.options.warm_up": "1"},
    "collaborative_distillation": SMALL,
    "ir_relaxed_ranking": SMALL,
}
RUN = [*("--recipe", "relaxed_ranking"), *("--seeds", "0,1"), *("--student.trainer.max_epochs", "2"), "--json"]


def everything(out: Path) -> None:
    """Distil with every recipe, then run the whole command.

    The recipes run with plain gradient descent: Adam would hide a gradient of the wrong scale, and blow up the rounding
    of one that is zero but for it (the bias of an attention's keys).
    """
    adam = RecommenderStep.optimizer
    RecommenderStep.optimizer = lambda step: torch.optim.SGD(step.parameters(), lr=0.2)  # type: ignore[method-assign]
    for recipe, settings in RECIPES.items():
        values = {"data.path": str(out.parent / "log.csv"), "seeds": "[0]", **settings}
        Pipeline(load_config(recipe=recipe, overrides=list(values.items())), out / recipe).distill(0)
    RecommenderStep.optimizer = adam  # type: ignore[method-assign]
    code = cli.main(["recsys", "run", *RUN, "--data", str(out.parent / "log.csv"), "--out", str(out / "run")])
    if code:
        raise SystemExit(code)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``one`` and ``two``: what one process left, and what two left."""
    folder = tmp_path_factory.mktemp("runs")
    write_log(folder / "log.csv")
    for name, launcher in (("one", []), ("two", TORCHRUN)):
        (folder / name).mkdir()
        words = [sys.executable, *launcher, "-m", "tests.recsys.test_distill_processes", str(folder / name)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
        assert ended.returncode == 0, ended.stderr[-3000:]
        (folder / f"{name}.out").write_text(ended.stdout)
        (folder / f"{name}.err").write_text(ended.stderr)
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_teach_as_one_does(folder: Path, recipe: str) -> None:
    roots = [folder / name / recipe / "seeds" for name in ("one", "two")]
    for file in ("student/model.safetensors", "student_alone/model.safetensors"):
        models = [next(iter(root.glob(f"0/{file}"))) for root in roots]
        torch.testing.assert_close(load_file(models[0]), load_file(models[1]), rtol=0, atol=1e-5)
    logs = [read_log(root / "0" / "checkpoints" / "student" / "log.jsonl") for root in roots]
    assert len(logs[0]) == 3
    losses = [event["terms"] for event in logs[0]]
    assert all(losses[0][name] != losses[2][name] for name in losses[0]), "nothing was learned, so nothing compared"
    for one, two in zip(*logs, strict=True):
        assert one["step"] == two["step"] > one["epoch"] + 1
        assert len(one["terms"]) >= 2
        for part in ("terms", "validation"):
            assert one[part] == pytest.approx(two[part], abs=1e-5)


def files(root: Path) -> set[str]:
    """Return all files of a run but TensorBoard's, whose names hold the time."""
    return {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file() and "tfevents" not in file.name}


def test_two_processes_leave_the_files_of_one_run(folder: Path) -> None:
    one, two = folder / "one" / "run", folder / "two" / "run"
    assert files(one) == files(two)
    assert {"config.yaml", "metrics.json", "report.html", "student/model.json"} <= files(two)
    events = [len(list(root.rglob("*tfevents*"))) for root in (one, two)]
    assert events[0] == events[1] > 0, "both processes wrote TensorBoard's files"
    for file in one.rglob("log.jsonl"):
        epochs = [[event["epoch"] for event in read_log(log)] for log in (file, two / file.relative_to(one))]
        assert epochs[0] == epochs[1]


def test_two_processes_measure_what_one_measures(folder: Path) -> None:
    one, two = (read_json(folder / name / "run" / "metrics.json") for name in ("one", "two"))
    assert len(one) == len(two) > 0
    for left, right in zip(one, two, strict=True):
        for name in ("model", "role", "seed", "split", "params", "bytes"):
            assert left[name] == right[name]
        assert left["metrics"] == pytest.approx(right["metrics"], abs=1e-6)


def test_one_of_them_speaks(folder: Path) -> None:
    rows = json.loads((folder / "two.out").read_text())
    assert len(rows) == len(read_json(folder / "two" / "run" / "metrics.json"))
    for name in ("one", "two"):
        said = (folder / f"{name}.err").read_text().splitlines()
        assert said.count("seed 1: fitting student (mf)") == 1


if __name__ == "__main__":
    everything(Path(sys.argv[1]))
