"""Codistillation: what a replica is taught by stale peers, and two real processes that share a folder and no more."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdcore.checkpoint import load_state
from kdcore.run import read_json, read_log
from kdcore.teaching import CodistillationStep, Schedule, solo_fabric
from tests.kdcore.teaching.problems import FAST, accuracy, batch_of, blobs, fit, improves, kl, network
from tests.kdcore.teaching.two_replicas import EPOCHS

ROOT = Path(__file__).parents[3]
DATA, HELD = blobs(80), blobs(90, seed=1)


def make(folder: Path, rank: int = 0, *, peers: int = 2, seed: int | None = None, **options: Any) -> CodistillationStep:
    return CodistillationStep(
        lambda: network(seed=rank if seed is None else seed, norm=True),
        DATA,
        folder=folder,
        rank=rank,
        peers=peers,
        validate=accuracy(HELD),
        learning=FAST,
        **options,
    )


def begin(step: CodistillationStep, epoch: int) -> None:
    step.begin_epoch(epoch, torch.Generator())


def test_until_a_peer_is_known_its_term_is_zero(tmp_path: Path) -> None:
    step = make(tmp_path).train()
    begin(step, 0)
    assert step.known.tolist() == [False]
    term = step(batch_of(step))["peers"]
    assert term.item() == pytest.approx(0.0, abs=1e-5)
    found = torch.autograd.grad(term, list(step.student.parameters()))
    assert max(float(each.abs().max()) for each in found) < 1e-5
    improves(step, HELD)


def test_taught_by_the_mean_of_stale_peers(tmp_path: Path) -> None:
    peers = [make(tmp_path, rank, peers=3) for rank in range(3)]
    for peer in peers[1:]:
        begin(peer, 0)
    step = make(tmp_path, 0, peers=3, temperature=2.0)
    begin(step, 0)
    assert step.known.tolist() == [True, True]
    with torch.no_grad():  # what a peer learns after it wrote is not seen
        peers[1].student[0].weight.add_(1.0)
    step.train()
    batch = batch_of(step)
    said = [make(tmp_path, rank, peers=3).student.eval()(batch["inputs"]) for rank in (1, 2)]
    mean = torch.stack([torch.softmax(each.double() / 2.0, 1) for each in said]).mean(0)
    own = step.student(batch["inputs"])
    torch.testing.assert_close(
        step(batch)["peers"].double(), kl(2.0 * mean.log(), own, 2.0).sum(), rtol=1e-4, atol=1e-4
    )


def test_no_gradient_and_no_statistics_in_stale_peers(tmp_path: Path) -> None:
    begin(make(tmp_path, 1), 0)
    step = make(tmp_path).train()
    begin(step, 0)
    before = {name: value.clone() for name, value in step.stale.state_dict().items()}
    sum(step(batch_of(step)).values()).backward()  # type: ignore[union-attr]
    assert all(parameter.grad is None for parameter in step.stale.parameters())
    torch.testing.assert_close(dict(step.stale.state_dict()), before, rtol=0, atol=0)
    learned = {id(p) for group in step.optimizer().param_groups for p in group["params"]}
    assert learned == {id(parameter) for parameter in step.student.parameters()}


def test_exchanges_every_so_often(tmp_path: Path) -> None:
    peer, step = make(tmp_path, 1), make(tmp_path, exchange_every=2)
    begin(peer, 0)
    begin(step, 0)
    for epoch, newest in ((1, False), (2, True)):
        with torch.no_grad():
            peer.student[0].weight.add_(1.0)
        begin(peer, epoch)
        begin(step, epoch)
        assert torch.equal(step.stale[0][0].weight, peer.student[0].weight) == newest  # type: ignore[index]


def test_the_file_is_the_replicas_weights_and_the_reader_copes_with_tied_ones(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.head = nn.Linear(4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            answer: Tensor = self.head(self.second(self.first(inputs).relu()))
            return answer

    steps = [
        CodistillationStep(Tied, DATA, folder=tmp_path, rank=rank, peers=2, validate=accuracy(HELD)) for rank in (1, 0)
    ]
    for step in steps:
        begin(step, 0)
    written = load_file(tmp_path / "peer-1.safetensors")
    torch.testing.assert_close(written, dict(steps[0].student.state_dict()))
    torch.testing.assert_close(dict(steps[1].stale[0].state_dict()), written)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["peer-0.safetensors", "peer-1.safetensors"]


def test_a_file_that_is_no_peer_is_named(tmp_path: Path) -> None:
    step = make(tmp_path)
    (tmp_path / "peer-1.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"peer-1.safetensors: not a peer's weights \("):
        begin(step, 0)
    save_file({"other": torch.zeros(2)}, tmp_path / "peer-1.safetensors")
    with pytest.raises(ValueError, match=r"peer-1.safetensors: not a peer's weights \(.*[Mm]issing key"):
        begin(step, 0)
    assert step.known.tolist() == [False]


class Interrupted(CodistillationStep):
    fail_at, made = -1, 0

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        for batch in super().batches(epoch, generator):
            self.made += 1
            if self.made == self.fail_at:
                raise InterruptedError
            yield batch


def interrupted(folder: Path, fail_at: int = -1) -> Interrupted:
    step = Interrupted(
        lambda: network(norm=True, dropout=0.2),
        DATA,
        folder=folder / "shared",
        rank=0,
        peers=2,
        validate=accuracy(HELD),
        learning=FAST,
        weight=Schedule(0.2, 1.0, "linear", epochs=2),
    )
    step.fail_at = fail_at
    return step


def test_resumed_with_the_peers_it_knew(tmp_path: Path) -> None:
    """The peer's file changes while the process is dead: what was read before is what counts to the epoch's end."""
    for name in ("whole", "broken"):
        (tmp_path / name / "shared").mkdir(parents=True)
        save_file(network(seed=4, norm=True, dropout=0.2).state_dict(), tmp_path / name / "shared/peer-1.safetensors")
    fit(interrupted(tmp_path / "whole"), 2, folder=tmp_path / "whole/run", checkpoint_seconds=0)
    with pytest.raises(InterruptedError):
        fit(interrupted(tmp_path / "broken", 8), 2, folder=tmp_path / "broken/run", checkpoint_seconds=0)
    save_file(network(seed=5, norm=True, dropout=0.2).state_dict(), tmp_path / "broken/shared/peer-1.safetensors")
    fit(interrupted(tmp_path / "broken"), 2, folder=tmp_path / "broken/run", checkpoint_seconds=0)
    whole, broken = (load_state(tmp_path / name / "run/last.safetensors") for name in ("whole", "broken"))
    for part in ("module", "optimizer", "random"):
        torch.testing.assert_close(whole[part], broken[part], rtol=0, atol=0)


@pytest.mark.parametrize(
    "wrong", [{"rank": 2}, {"rank": -1}, {"peers": 1}, {"exchange_every": 0}], ids=lambda wrong: next(iter(wrong))
)
def test_bad_options_are_named(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"rank, peers, exchange_every: wanted 0 <= rank < peers"):
        make(tmp_path, **{"rank": 0, **wrong})


def test_temperature_is_checked(tmp_path: Path) -> None:
    begin(make(tmp_path, 1), 0)
    step = make(tmp_path, temperature=0.0)
    begin(step, 0)
    with pytest.raises(ValueError, match=r"peers: temperature: wanted a finite number > 0, got 0.0"):
        step(batch_of(step))


def test_a_fabric_of_one_leaves_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    fabric = solo_fabric()
    assert (fabric.world_size, fabric.global_rank, fabric.is_global_zero) == (1, 0, True)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left."""
    folder = tmp_path_factory.mktemp("two")
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [sys.executable, *words, "-m", "tests.kdcore.teaching.two_replicas", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


def test_two_processes_teach_each_other(two: Path) -> None:
    for rank in range(2):
        about = read_json(two / "together" / f"rank{rank}.json")
        assert about["known"] == [True] and about["epochs"] == EPOCHS + rank
        assert about["after"] > 0.8 > about["before"]
        log = read_log(two / "together" / f"run{rank}" / "log.jsonl")
        assert log[1]["terms"]["peers"] > 0, "from the second epoch on each has read the other"
    weights = [load_state(two / f"together/run{rank}/best.safetensors")["model"]["0.weight"] for rank in range(2)]
    assert not torch.equal(*weights), "replicas of their own, not one averaged network"


def test_a_dead_peer_stops_nobody(two: Path) -> None:
    assert not (two / "dead" / "rank1.json").exists()
    about = read_json(two / "dead" / "rank0.json")
    assert about["epochs"] == EPOCHS and about["known"] == [True] and about["after"] > 0.8
    last = read_log(two / "dead" / "run0" / "log.jsonl")[-1]["terms"]
    assert last["peers"] > 0, "what it last said still counts"
