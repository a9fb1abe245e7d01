"""Two processes started by torchrun train as one does, go on where they broke off, and wait for each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdcore import processes
from kdcore.checkpoint import load_state
from kdcore.run import read_json, read_log
from tests.kdcore.two_processes import CASES, BufferedStep, run_cases, train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left."""
    folder = tmp_path_factory.mktemp("two")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [sys.executable, *torchrun, "-m", "tests.kdcore.two_processes", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    (folder / "stdout").write_text(ended.stdout)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process left, with the same global batches."""
    folder = tmp_path_factory.mktemp("one")
    run_cases(folder)
    return folder


def check_equal(a: Path, b: Path) -> None:
    for name in ("final.safetensors", "best.safetensors"):
        left, right = (load_state(folder / name) for folder in (a, b))
        torch.testing.assert_close(left.get("model", left), right.get("model", right), rtol=0, atol=1e-10)
    results = [read_json(folder / "result.json") for folder in (a, b)]
    assert results[0].pop("metrics") == pytest.approx(results[1].pop("metrics"), abs=1e-10)
    assert results[0] == results[1]
    for left, right in zip(*(read_log(folder / "log.jsonl") for folder in (a, b)), strict=True):
        assert left["epoch"] == right["epoch"] and left["step"] == right["step"]
        for part in ("terms", "validation"):
            assert left[part] == pytest.approx(right[part], abs=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does(one: Path, two: Path, case: str) -> None:
    check_equal(one / case, two / case)


def test_two_processes_go_on_where_they_broke_off(two: Path) -> None:
    """To the bit, dropout included: each has a random state of its own, and all of them are in the checkpoint."""
    whole, broken = (two / name for name in ("whole", "broken"))
    assert (whole / "final.safetensors").read_bytes() == (broken / "final.safetensors").read_bytes()
    states = load_state(whole / "last.safetensors")["random"]["cpu"]
    assert states.shape[0] == 2 and not torch.equal(states[0], states[1]), "both drop the same units"
    check_equal(whole, broken)


def test_training_costs_what_all_processes_computed(two: Path) -> None:
    first, other = (read_json(two / f"costs{rank}.json") for rank in (0, 1))
    assert 0 < first["cpu_seconds"] == other["cpu_seconds"] <= first["own"] + other["own"]


def test_one_process_goes_on_with_what_two_began(two: Path, one: Path) -> None:
    assert load_state(two / "left" / "last.safetensors")["progress"]["epoch"] == 1
    step = train(two / "left", BufferedStep())
    assert step.begun == 1
    check_equal(one / "plain", two / "left")


def test_they_wait_for_each_other_and_one_of_them_speaks(two: Path) -> None:
    ranks = [read_json(two / f"rank{rank}.json") for rank in range(2)]
    for about in ranks:
        assert about == {"text": "whole", "answers": [True, False], "late": True}
    assert (two / "stdout").read_text().split().count("spoken") == 1


def test_without_torchrun_everything_is_free(capsys: pytest.CaptureFixture[str]) -> None:
    assert processes.world_size() == 1 and processes.is_first_process()
    assert processes.agree(True) and not processes.agree(False)
    processes.barrier()
    processes.connect()
    assert not torch.distributed.is_initialized()
    with processes.first_process_first(), processes.first_process_speaks():
        print("spoken")
    assert capsys.readouterr().out == "spoken\n"
