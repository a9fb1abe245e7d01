"""What test_codistillation runs under torchrun: replicas that share a folder and nothing else.

First each trains to its end (``together``); then (``dead``) the second leaves in the middle of its second epoch,
without a word.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from kdcore.run import write_json
from kdcore.teaching import CodistillationStep, solo_fabric
from tests.kdcore.teaching.problems import FAST, accuracy, blobs, fit, network, score

EPOCHS = 4


class Replica(CodistillationStep):
    """A replica that waits for its peer's first file, so that slow machines test the same, and may die."""

    dies = False

    def begin_epoch(self, epoch: int, generator: torch.Generator) -> None:
        if epoch == 1:
            peer, ends = self._file(self.others[0]), time.monotonic() + 60
            while not peer.exists() and time.monotonic() < ends:
                time.sleep(0.01)
        super().begin_epoch(epoch, generator)

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        for number, batch in enumerate(super().batches(epoch, generator)):
            if self.dies and epoch == 1 and number == 2:
                os._exit(0)  # not 1: torchrun would end the other
            yield batch


def train(out: Path, rank: int, peers: int, *, dies: bool) -> None:
    """Train this process's replica and write what came of it."""
    data, held = blobs(80, seed=rank), blobs(90, seed=9)
    step = Replica(
        lambda: network(seed=rank),
        data,
        folder=out / "shared",
        rank=rank,
        peers=peers,
        validate=accuracy(held),
        learning=FAST,
    )
    step.dies = dies
    before = score(step.student, held)
    # of different lengths: one that waited for the other would wait for ever
    result = fit(step, EPOCHS + rank, folder=out / f"run{rank}", seed=rank, fabric=solo_fabric(), patience=0)
    about = {"known": step.known.tolist(), "before": before, "after": score(step.student, held)}
    write_json(out / f"rank{rank}.json", {**about, "epochs": result.epochs})


if __name__ == "__main__":
    number, of = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    train(Path(sys.argv[1]) / "together", number, of, dies=False)
    train(Path(sys.argv[1]) / "dead", number, of, dies=number == 1)
