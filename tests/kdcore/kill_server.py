"""Trains a toy step in processes that die by SIGKILL wherever they are told to.

Importing torch takes seconds, so this program imports it once and forks a child for every run it is asked for: a line
of JSON on stdin is a run, a line of JSON on stdout how it ended. It never computes anything itself, so that its
children start as a fresh process would. A *kill point* is a place where state is about to change or has just changed;
a child numbers those it passes and dies at the one it is given, or when a timer runs out.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from kdcore import checkpoint, trainer
from kdcore.run import EventLog, write_json
from kdcore.trainer import Batch, TeachingStep, Trainer, iterate_rows
from kdcore.trainer_config import TrainerConfig


class Student(nn.Module):
    """A net with everything that has state: dropout (random numbers) and batch normalisation (buffers)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ToyStep(TeachingStep):
    """Regression towards a teacher, with ranks refreshed from the student at every epoch's beginning."""

    def __init__(self, rows: int = 12, batch_size: int = 5, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.student = Student()
        self.weights = {"base": 1.0, "taught": 0.5}
        self.batch_size = batch_size
        source = torch.Generator().manual_seed(99)
        self.x = torch.randn(rows, 6, generator=source)
        self.y = torch.randn(rows, 3, generator=source)
        self.valid = torch.randn(16, 6, generator=source), torch.randn(16, 3, generator=source)
        # what begin_epoch computes: a resumed epoch must go on with these, not with fresh ones
        self.register_buffer("ranks", torch.zeros(rows, dtype=torch.int32))
        self.register_buffer("warm", torch.zeros((), dtype=torch.bool))

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1, fused=True)

    @torch.no_grad()
    def begin_epoch(self, epoch: int, generator: torch.Generator) -> None:
        noise = 0.1 * torch.rand(len(self.x), generator=generator)
        self.ranks.copy_((self.student(self.x).sum(dim=1) + noise).argsort().argsort())
        self.warm.fill_(epoch >= 1)

    def batch_count(self) -> int:
        return -(-len(self.x) // self.batch_size)

    def batches(self, epoch: int, generator: torch.Generator) -> Iterable[Batch]:
        order = torch.randperm(len(self.x), generator=generator)
        for rows in iterate_rows(order, self.batch_size):
            noise = 0.1 * torch.randn(len(rows), 6, generator=generator)
            yield {"x": self.x[rows] + noise, "y": self.y[rows], "row": rows}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"base": len(batch["x"]), "taught": len(batch["x"])}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        out = self.student(batch["x"])
        rank = self.ranks[batch["row"]].float() / len(self.x)
        taught = (out[:, 0] - rank).square().sum() * (2.0 if self.warm else 1.0)
        return {"base": (out - batch["y"]).square().sum(), "taught": taught}

    def validate(self) -> dict[str, float]:
        x, y = self.valid
        return {"error": float((self.student(x) - y).square().mean()), "zero": 0.0}


CONFIG: dict[str, Any] = {
    "max_epochs": 5,
    "patience": 4,
    "monitor": "error",
    "mode": "min",
    "gradient_clip": 1.0,
    "accelerator": "cpu",
    "threads": 1,
    "checkpoint_seconds": 0.0,
    "tensorboard": False,
}


def run(folder: Path, config: dict[str, Any], key: str = "toy") -> None:
    """Train in ``folder`` and write what came of it beside the checkpoints."""
    step = ToyStep()
    result = Trainer(TrainerConfig(**{**CONFIG, **config}), seed=3, folder=folder, key=key).fit(step)
    checkpoint.save_state(folder / "final.safetensors", {"student": step.student.state_dict()})
    about = {"epoch": result.best_epoch, "metrics": result.best_metrics, "epochs": result.epochs, "steps": result.steps}
    write_json(folder / "result.json", about)


class Killer:
    """Counts kill points and dies at number ``at``."""

    def __init__(self, at: int | None) -> None:
        self.at, self.passed = at, 0

    def point(self, torn: Callable[[], None] | None = None) -> None:
        """Pass a kill point; ``torn`` does half of what is about to be done, if this is where to die."""
        self.passed += 1
        if self.passed == self.at:
            if torn is not None:
                torn()
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner: Any, name: str) -> None:
        """Put a kill point before and after a function."""
        function = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            self.point()
            result = function(*args, **options)
            self.point()
            return result

        setattr(owner, name, wrapped)

    def install(self) -> None:
        """Put kill points around every change of state, and inside the writing of files."""
        for owner, name in ((os, "replace"), (os, "fsync"), (ToyStep, "begin_epoch"), (ToyStep, "validate")):
            self.around(owner, name)
        self.around(trainer.Trainer, "_update")
        self.around(torch.optim.Adam, "step")
        save_file, write = checkpoint.save_file, EventLog.write

        def half_saved(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
            data = save(tensors, metadata)
            self.point(lambda: Path(path).write_bytes(data[: len(data) // 2]))
            save_file(tensors, path, metadata)
            self.point()

        def half_written(log: EventLog, event: str, **fields: Any) -> None:
            def torn() -> None:
                with open(log.path, "a", encoding="utf-8") as handle:
                    handle.write('{"time": 1.5, "event": "epo')

            self.point(torn)
            write(log, event, **fields)
            self.point()

        checkpoint.save_file, EventLog.write = half_saved, half_written  # type: ignore[method-assign]


def child(request: dict[str, Any]) -> None:
    """Run one request; never returns."""
    killer = Killer(request.get("at"))
    killer.install()
    if request.get("file_limit"):  # a disk that is full: writing fails with an error, as ENOSPC does
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
    code = 1
    try:
        folder = Path(request["folder"])
        run(folder, request.get("config", {}), request.get("key", "toy"))
        (folder / "points").write_text(str(killer.passed))
        code = 0
    except Exception as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Answer requests until stdin ends."""
    import lightning_fabric  # noqa: F401  imported here, once

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            os.dup2(write, 2)
            child(request)
        os.close(write)
        if request.get("after") is not None:
            time.sleep(request["after"])
            os.kill(pid, signal.SIGKILL)
        with os.fdopen(read, encoding="utf-8") as said:
            text = said.read()
        _, status = os.waitpid(pid, 0)
        answers.write(json.dumps({"code": os.waitstatus_to_exitcode(status), "stderr": text}) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
