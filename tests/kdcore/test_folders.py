"""A folder appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcore.config import UserError
from kdcore.folders import check_target, replacing


def ours(folder: Path) -> bool:
    return (folder / "ours").exists()


def test_an_earlier_one_gives_way_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    for turn in ("first", "second"):
        with replacing(out, ours) as folder:
            (folder / "ours").write_text(turn)
            (folder / "inner").mkdir()
            (folder / "inner" / "file").write_text(turn)
            assert not out.exists() or (out / "ours").read_text() == "first"
        assert (out / "ours").read_text() == (out / "inner" / "file").read_text() == turn
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "ours").write_text("kept")
    with pytest.raises(RuntimeError), replacing(out, ours) as folder:
        (folder / "ours").write_text("half")
        raise RuntimeError
    assert (out / "ours").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_others_wrote_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no export wrote"), replacing(out, ours) as folder:
        (folder / "ours").touch()
        out.mkdir()
        (out / "letter").touch()
    assert [path.name for path in out.iterdir()] == ["letter"]


def test_targets(tmp_path: Path) -> None:
    check_target(tmp_path / "absent", ours)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", ours)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        check_target(tmp_path / "file", ours)
