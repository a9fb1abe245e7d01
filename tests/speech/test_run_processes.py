"""A whole run under torchrun, with two processes, ends, and leaves the files and the figures of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_scripts.simulate_speech import simulate
from kdcore.config import dump_yaml, resolved
from kdcore.run import read_json
from tests.speech.small_runs import small

ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs ``one`` and ``two``: what one process left, and what two left."""
    folder = tmp_path_factory.mktemp("processes")
    config = small("ctc_sequence_level", simulate(folder / "data", utterances=24), folder / "of", seeds=[0, 1]).config
    # each process draws what it masks and drops by itself
    teacher, student = (
        replace(each, augment=None, options={**each.options, "dropout": 0.0})
        for each in (config.teacher, config.student)
    )
    config = replace(config, teacher=teacher, student=student)
    (folder / "config.yaml").write_text(dump_yaml(resolved(config)), encoding="utf-8")
    for name, launcher in (("one", []), ("two", TORCHRUN)):
        words = ["-m", "apps.cli", "speech", "run", "--config", str(folder / "config.yaml"), "--json"]
        words = [sys.executable, *launcher, *words, "--out", str(folder / name)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr[-3000:]
        (folder / f"{name}.out").write_text(ended.stdout, encoding="utf-8")
    return folder


def files(root: Path) -> set[str]:
    """Return all files of a run but TensorBoard's, whose names hold the time."""
    found = (file for file in root.rglob("*") if file.is_file() and "tfevents" not in file.name)
    # keys of what teachers said hold their weights, which differ in the last digits
    return {str(file.relative_to(root)) for file in found if "teacher_cache" not in file.parts}


def test_two_processes_leave_the_files_of_one(folder: Path) -> None:
    assert files(folder / "one") == files(folder / "two")
    assert {"config.yaml", "metrics.json", "report.html", "student/model.json"} <= files(folder / "two")


@pytest.mark.parametrize("model", ["shared/teacher", "0/student_alone", "1/student"])
def test_two_processes_train_what_one_trains(folder: Path, model: str) -> None:
    one, two = (load_file(folder / name / "seeds" / model / "model.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_both_are_measured(folder: Path) -> None:
    one, two = (read_json(folder / name / "metrics.json") for name in ("one", "two"))
    named = [(row["model"], row["role"], row["seed"], row["split"]) for row in one]
    assert named == [(row["model"], row["role"], row["seed"], row["split"]) for row in two] and len(named) == 12
    assert len(json.loads((folder / "two.out").read_text(encoding="utf-8"))) == 12, "one of them speaks"
    # one teacher for both seeds
    taught = [row for row in one if row["role"] == "teacher"]
    assert [{**row, "seed": 1} for row in taught[:2]] == taught[2:]
