"""The core's benchmark: what it measures is right; how fast it is, is not a test's business."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from apps.bench import losses, memory
from apps.cli import main

NAMES = [
    *("soft_targets", "decoupled", "distance_relations + angle_relations"),
    *("similarity_preserving", "probabilistic_transfer", "contrastive_representation"),
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "BATCH": 6,
        "CLASSES": 7,
        "WIDTH": 5,
        "SAMPLES": 20,
        "NEGATIVES": 4,
        "CONTRAST_WIDTH": 3,
    }.items():
        monkeypatch.setattr(losses, name, value)


@pytest.mark.usefixtures("small")
def test_every_loss_is_timed_beside_the_peers_at_hand() -> None:
    result = losses.measure(2)
    assert [row["loss"] for row in result["rows"]] == NAMES
    for row in result["rows"]:
        assert row["ms"]["kdsuite"] > 0
        others = [value for name, value in row["ms"].items() if name != "kdsuite"]
        assert row["ratio"] == (row["ms"]["kdsuite"] / min(others) if others else None)
    assert all("not installed" in why for why in result["skipped"].values())


@pytest.mark.usefixtures("small")
def test_a_peer_computes_the_same() -> None:
    """Where values can be compared, both sides of a comparison are the same loss."""
    pytest.importorskip("torchdistill")
    # at alpha 0, its quickest form, torchdistill forgets T^2
    factors = {"soft_targets": losses.TEMPERATURE**2, "distance_relations + angle_relations": 1.0}
    for case in losses._cases():
        if case.name in factors:
            theirs = case.peers["torchdistill"]()() * factors[case.name]
            torch.testing.assert_close(case.ours(), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("small")
def test_a_peer_from_a_repository_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def dkd_loss(*given: Any) -> torch.Tensor:
        called.append(len(given))
        return given[0].square().sum()

    for name in ("mdistiller", "mdistiller.distillers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "mdistiller.distillers.DKD", SimpleNamespace(dkd_loss=dkd_loss))
    result = losses.measure(2)
    row = next(row for row in result["rows"] if row["loss"] == "decoupled")
    assert "mdistiller" in row["ms"] and called == [6, 6, 6]


def test_memory_is_measured_in_processes() -> None:
    assert 0 <= memory.in_a_process("relations")["extra_bytes"] < 50e6
    assert memory.in_a_process("imports")["milliseconds"] > 0


def test_the_two_caches_hold_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchdistill")
    monkeypatch.setattr(memory, "ROWS", 100)
    found = memory.full_cache()
    assert found["bytes"] == 100 * memory.CLASSES * 2
    assert found["pickle_bytes"] > 2 * found["bytes"]


def test_a_large_cache_is_summed_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "TOP_ROWS", 5_000)
    found = memory.top_cache()
    assert found["bytes_on_disk"] == 5_000 * memory.TOP * 6
    assert found["checksum"] > 0 and found["above_start_bytes"] < 200e6


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(losses, "measure", lambda repeats: {"rows": [], "skipped": {"a peer": "not installed"}})
    monkeypatch.setattr(memory, "in_a_process", lambda name: {"name": name})
    assert main(["bench", "losses", "--json", str(tmp_path / "losses.json")]) == 0
    result = json.loads((tmp_path / "losses.json").read_text())
    assert result["imports"] == {"name": "imports"}
    assert result["provenance"]["command"][:3] == ["kd", "bench", "losses"]
    assert "a peer: skipped, not installed" in capsys.readouterr().out
    assert main(["bench", "losses", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["imports"] == {"name": "imports"} and "a peer: skipped" in err
    assert main(["bench", "losses", "--repeats", "3"]) == 2
    assert "at least 15" in capsys.readouterr().err


@pytest.mark.parametrize(("what", "some"), [("losses", "soft_targets"), ("teaching", "mutual_learning")])
def test_catalogues(what: str, some: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([what, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in rows]
    assert some in names and len(set(names)) == len(names)
    assert all(row[key] for row in rows for key in ("name", "form", "summary", "needs", "reference"))
    assert main([what]) == 0
    assert some in capsys.readouterr().out
