"""A training run killed with SIGKILL, anywhere and any number of times, ends as one that was never killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from kdcore.checkpoint import load_state
from kdcore.run import read_json, read_log

ROOT = Path(__file__).parents[2]
KILLED = -9
# enough for every branch: three epochs of three steps, the best one in the middle, a batch of two rows at the end
SMALL = {"max_epochs": 3}


class Server:
    """Runs of the toy in children of a process that has torch imported; see kill_server."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.kdcore.kill_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def ask(self, folder: Path, **request: Any) -> dict[str, Any]:
        """Return the exit code (negative: the signal) and what the run said on stderr."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"folder": str(folder), "config": SMALL, **request}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def finish(self, folder: Path, **request: Any) -> None:
        """Run to the end and fail if it does not come to it."""
        answer = self.ask(folder, **request)
        assert answer["code"] == 0, answer["stderr"]

    def close(self) -> None:
        self.process.kill()  # it has nothing to finish, and tidying up after torch takes seconds
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@pytest.fixture(scope="module")
def whole(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    server.finish(folder)
    return folder


def flat(value: Any) -> Any:
    """Return a state with lists for tensors, so that two can be compared."""
    if isinstance(value, dict):
        return {name: flat(each) for name, each in value.items()}
    return value.tolist() if isinstance(value, Tensor) else value


def outcome(folder: Path) -> dict[str, Any]:
    """Return everything a run leaves behind, but for times."""
    last = load_state(folder / "last.safetensors")
    progress = {name: value for name, value in last["progress"].items() if name != "log_position"}
    progress["result"] = {name: value for name, value in progress["result"].items() if "seconds" not in name}
    log = read_log(folder / "log.jsonl")
    assert len(log) == (folder / "log.jsonl").read_bytes().count(b"\n"), "a torn line"
    return {
        "files": sorted(file.name for file in folder.iterdir() if file.name != "points"),
        "final": (folder / "final.safetensors").read_bytes(),
        "best": (folder / "best.safetensors").read_bytes(),
        "last": flat({name: last[name] for name in ("module", "optimizer", "random")}),
        "progress": progress,
        "log": [{name: value for name, value in event.items() if name != "time"} for event in log],
        "result": read_json(folder / "result.json"),
    }


def test_the_uninterrupted_run_is_worth_comparing_with(whole: Path) -> None:
    found = outcome(whole)
    assert [event["epoch"] for event in found["log"]] == [0, 1, 2]
    assert found["files"] == ["best.safetensors", "final.safetensors", "last.safetensors", "log.jsonl", "result.json"]
    assert found["result"]["epoch"] in (0, 1), "the best epoch must not be the last one, or best = last proves nothing"
    best, last = load_state(whole / "best.safetensors")["model"], load_state(whole / "last.safetensors")["module"]
    assert any((best[name] != last[f"student.{name}"]).any() for name in best)


def test_every_kill_point_from_an_epochs_last_step_into_the_next(server: Server, whole: Path, tmp_path: Path) -> None:
    """Step, checkpoint, validation, log, checkpoint with new best weights, its second file, begin_epoch: all of it."""
    wanted, total = outcome(whole), int((whole / "points").read_text())
    start = total // 3 - 32
    for at in range(start, start + 34):
        folder = tmp_path / str(at)
        assert server.ask(folder, at=at)["code"] == KILLED
        server.finish(folder)
        assert outcome(folder) == wanted, f"killed at point {at} of {total}"
        shutil.rmtree(folder)


@pytest.mark.parametrize("stride", [27, 31, 38])
def test_killed_again_and_again(server: Server, whole: Path, tmp_path: Path, stride: int) -> None:
    """Every start dies a fixed number of points after it began, so deaths fall everywhere along the run."""
    starts = 0
    while (answer := server.ask(tmp_path, at=stride))["code"] == KILLED:
        starts += 1
        assert starts < 60, "no progress from start to start"
    assert answer["code"] == 0, answer["stderr"]
    assert starts >= 3
    assert outcome(tmp_path) == outcome(whole)


@pytest.mark.parametrize("checkpoint_seconds", [0.0, 0.05])
def test_killed_at_random_moments(server: Server, whole: Path, tmp_path: Path, checkpoint_seconds: float) -> None:
    """The clock decides where the run dies and, with 0.05, where it saves: neither may change what comes out."""
    chance, starts = random.Random(), 0
    config = {**SMALL, "checkpoint_seconds": checkpoint_seconds}
    while server.ask(tmp_path, config=config, after=chance.uniform(0.02, 0.3))["code"] == KILLED and starts < 8:
        starts += 1
    server.finish(tmp_path, config=config)
    assert outcome(tmp_path) == outcome(whole)


def test_full_disk_fails_cleanly_and_the_next_start_goes_on(server: Server, whole: Path, tmp_path: Path) -> None:
    server.ask(tmp_path, at=60)
    before = (tmp_path / "last.safetensors").read_bytes()
    answer = server.ask(tmp_path, file_limit=4096)
    assert answer["code"] == 1
    assert answer["stderr"].startswith("OSError") and "last.safetensors" in answer["stderr"]
    assert (tmp_path / "last.safetensors").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir() if file.name.startswith(".")) == []
    server.finish(tmp_path)
    assert outcome(tmp_path) == outcome(whole)


def test_tensorboard_shows_every_epoch_once(server: Server, tmp_path: Path) -> None:
    """Events of epochs that a killed start wrote and a later one repeats are struck out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = {**SMALL, "tensorboard": True, "checkpoint_seconds": 1e9}
    # without a checkpoint but the last, every start begins at epoch 0; this one dies in epoch 2 with 0 and 1 written
    assert server.ask(tmp_path, config={**config, "checkpoint_seconds": 0.0}, at=10**9)["code"] == 0
    (tmp_path / "last.safetensors").unlink()
    server.finish(tmp_path, config=config)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for tag in ("loss/base", "loss/taught", "validation/error"):
        assert [event.step for event in events.Scalars(tag)] == [0, 1, 2]
    logged = [event["validation"]["error"] for event in read_log(tmp_path / "log.jsonl")]
    assert [event.value for event in events.Scalars("validation/error")] == pytest.approx(logged, abs=1e-6)


def test_tensorboard_keeps_what_a_checkpoint_counts_as_written(server: Server, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = {**SMALL, "tensorboard": True}
    starts = 0
    while server.ask(tmp_path, config=config, at=60)["code"] == KILLED:
        starts += 1
    assert starts >= 2
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("validation/error")] == [0, 1, 2]


def test_a_real_program_killed_and_started_again(whole: Path, tmp_path: Path) -> None:
    """Without fork: the program is started like a user's, killed once it has saved something, and started again."""
    program = (
        "import json, sys, time\n"
        "from pathlib import Path\n"
        "from tests.kdcore import kill_server as toy\n"
        "if sys.argv[2] == 'slow':\n"
        "    step = toy.torch.optim.Adam.step\n"
        "    toy.torch.optim.Adam.step = lambda *a, **k: (time.sleep(0.2), step(*a, **k))[1]\n"
        f"toy.run(Path(sys.argv[1]), json.loads('{json.dumps(SMALL)}'))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([sys.executable, "-c", program, str(tmp_path), "slow"], env=environment)
    while not (tmp_path / "best.safetensors").exists() and first.poll() is None:
        time.sleep(0.02)
    first.kill()
    assert first.wait() == KILLED
    assert not (tmp_path / "result.json").exists()
    subprocess.run([sys.executable, "-c", program, str(tmp_path), "fast"], env=environment, check=True)
    assert outcome(tmp_path) == outcome(whole)
