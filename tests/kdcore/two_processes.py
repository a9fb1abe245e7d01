"""What test_processes runs under torchrun with two processes, and once more by itself with one."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcore import processes
from kdcore.checkpoint import save_state
from kdcore.run import write_json
from kdcore.trainer import Batch, Trainer
from kdcore.trainer_config import TrainerConfig
from tests.kdcore.test_trainer import LinearStep

# thirteen rows in batches of four: the last batch has one row, so one of two processes has none
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"gradient_clip": 0.1},
    "accumulated": {"accumulate": 2},
    "stopped early": {"patience": 1, "mode": "min", "max_epochs": 30},
}


class BufferedStep(LinearStep):
    """With buffers of all kinds that begin_epoch changes, as knowledge has them."""

    def __init__(self, dropout: float = 0.0, fail_at: int = -1) -> None:
        super().__init__(rows=13)
        self.dropout, self.fail_at, self.made = dropout, fail_at, 0
        self.register_buffer("on", torch.zeros((), dtype=torch.bool))
        self.register_buffer("rank", torch.zeros(2, dtype=torch.int32))

    def begin_epoch(self, epoch: int, generator: torch.Generator) -> None:
        super().begin_epoch(epoch, generator)
        self.on.fill_(epoch > 0)
        self.rank.fill_(int(torch.randint(5, (1,), generator=generator)))

    def batches(self, epoch: int, generator: torch.Generator) -> Iterable[Batch]:
        for batch in super().batches(epoch, generator):
            self.made += 1
            if self.made == self.fail_at:  # between two updates, where the processes are in step
                raise InterruptedError
            yield batch

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        x = torch.nn.functional.dropout(batch["x"], self.dropout, self.training)
        terms = super().forward({**batch, "x": x})
        scale = (1.0 + self.rank.sum()) if self.on else 1.0
        return {"squared": terms["squared"] * scale, "counted": terms["counted"]}


def train(folder: Path, step: LinearStep, **config: Any) -> LinearStep:
    """Train and return the step."""
    base = {"monitor": "score", "max_epochs": 3, "accelerator": "cpu", "tensorboard": False, "checkpoint_seconds": 0}
    result = Trainer(TrainerConfig(**{**base, **config}), seed=4, folder=folder).fit(step)
    if processes.is_first_process():
        save_state(folder / "final.safetensors", step.student.state_dict())
        about = {"epoch": result.best_epoch, "metrics": result.best_metrics, "epochs": result.epochs}
        write_json(folder / "result.json", {**about, "steps": result.steps})
    return step


def run_cases(out: Path) -> None:
    """Train every case in a folder of its own."""
    for name, config in CASES.items():
        train(out / name, BufferedStep(), **config)


def interrupted(out: Path) -> None:
    """With dropout, and so with a random state a process: once through, and once broken off and gone on with."""
    train(out / "whole", BufferedStep(dropout=0.3))
    try:
        train(out / "broken", BufferedStep(dropout=0.3, fail_at=6))
    except InterruptedError:
        again = train(out / "broken", BufferedStep(dropout=0.3))
        assert again.begun == 1, "epoch 1 was begun before the interruption"
    try:  # one process goes on with this
        train(out / "left", BufferedStep(fail_at=6))
    except InterruptedError:
        processes.barrier()


def costs(out: Path) -> None:
    """What training cost, as each process is told, and the CPU seconds that each knows of itself."""
    began = time.process_time()
    result = Trainer(TrainerConfig(monitor="score", max_epochs=2, accelerator="cpu"), seed=4).fit(BufferedStep())
    about = {"cpu_seconds": result.cpu_seconds, "own": time.process_time() - began}
    write_json(out / f"costs{os.environ['RANK']}.json", about)


def waiting(out: Path) -> None:
    """One writes slowly, the other finds it written; what is seen at different times is decided once."""
    file, first = out / "written", processes.is_first_process()
    with processes.first_process_first():
        if first:
            time.sleep(0.5)
            file.write_text("whole")
        text = file.read_text()
    answers = processes.agree(first), processes.agree(not first)
    if not first:
        time.sleep(0.3)
        (out / "late").touch()
    processes.barrier()
    with processes.first_process_speaks():
        print("spoken")
    about = {"text": text, "answers": answers, "late": (out / "late").exists()}
    write_json(out / f"rank{os.environ['RANK']}.json", about)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    waiting(folder)
    costs(folder)
    run_cases(folder)
    interrupted(folder)
