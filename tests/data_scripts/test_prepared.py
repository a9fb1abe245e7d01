"""The folder of a prepared data set: complete or absent, whatever happens on the way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data_scripts.prepared import description, is_prepared, preparing
from kdcore.config import UserError

RECORD = {"name": "x", "source": {"a": "b"}}


def fill(out: Path, record: dict = RECORD, text: str = "data") -> None:
    with preparing(out, record) as (folder, details):
        (folder / "file").write_text(text)
        details["rows"] = 3


def test_a_folder_appears_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    assert not is_prepared(out, RECORD)
    fill(out)
    assert is_prepared(out, RECORD) and not is_prepared(out, {"name": "y"})
    assert description(out) == {**RECORD, "rows": 3, "source_fingerprint": description(out)["source_fingerprint"]}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_it_replaces_what_an_earlier_preparation_wrote_and_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", text="old")
    (tmp_path / "out" / "more").write_text("")
    fill(tmp_path / "out", {"name": "y"}, text="new")
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dataset.json", "file"]
    assert len(list(tmp_path.iterdir())) == 1


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    fill(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), preparing(tmp_path / "out", {"name": "y"}) as (folder, _):
        (folder / "file").write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "out" / "file").read_text() == "data" and is_prepared(tmp_path / "out", RECORD)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("about", [None, "{}", "not json", "[1]"])
def test_files_of_others_are_not_touched(tmp_path: Path, about: str | None) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    if about is not None:
        (tmp_path / "dataset.json").write_text(about)
    with pytest.raises(UserError, match="no earlier preparation wrote"):
        fill(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    with pytest.raises(UserError, match="is a file"):
        fill(tmp_path / "thesis.txt")


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = (
        "import os, signal, sys, pathlib\n"
        "from data_scripts.prepared import preparing\n"
        "with preparing(pathlib.Path(sys.argv[1]), {'name': 'y'}) as (folder, _):\n"
        "    (folder / 'file').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(out)], check=False)
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1 and left[0].endswith(".partial")  # nothing that could be taken for the result
    fill(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    out.rename(tmp_path / f".out.{gone.pid}.replaced")
    with pytest.raises(ZeroDivisionError), preparing(out, {"name": "y"}):
        raise ZeroDivisionError
    assert is_prepared(out, RECORD) and len(list(tmp_path.iterdir())) == 1


def test_a_run_that_is_alive_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        busy = tmp_path / f".out.{other.pid}.partial"
        busy.mkdir()
        fill(tmp_path / "out")
        assert busy.is_dir()
        other.communicate(b"\n")
