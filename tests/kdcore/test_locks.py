"""A lock is held by one at a time, says when it is waited for, and is free when its holder is dead."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from kdcore.locks import beside, locked

HOLDER = """
import sys, time
from kdcore.locks import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_who_comes_second_waits_and_says_so(tmp_path: Path) -> None:
    file, said = beside(tmp_path / "new" / "made"), list[str]()
    assert file == tmp_path / "new" / ".made.lock"
    with ExitStack() as first:
        first.enter_context(locked(file, lambda: said.append("first")))

        def waiting() -> None:
            said.append("second")
            first.close()

        with locked(file, waiting):
            assert said == ["second"]
    with locked(file, lambda: said.append("third")):
        pass
    assert said == ["second"] and file.exists()


def test_a_dead_holder_holds_nothing(tmp_path: Path) -> None:
    file, said = tmp_path / "lock", list[str]()
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(file)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"

        def waiting() -> None:
            said.append("waited")
            holder.kill()

        with locked(file, waiting):
            assert said == ["waited"]
    with locked(file, lambda: said.append("again")):
        assert said == ["waited"]


def test_what_fails_leaves_no_folder_that_was_made_for_it(tmp_path: Path) -> None:
    for made, left in (("new/deep/.data.lock", []), ("there/.data.lock", ["there", "there/.data.lock"])):
        if left:
            (tmp_path / "there").mkdir()
        with pytest.raises(RuntimeError), locked(tmp_path / made):
            raise RuntimeError("broke")
        assert sorted(str(each.relative_to(tmp_path)) for each in tmp_path.rglob("*")) == left
    with pytest.raises(RuntimeError), locked(tmp_path / "kept" / ".data.lock"):
        (tmp_path / "kept" / "work").touch()
        raise RuntimeError("broke")
    assert (tmp_path / "kept" / "work").exists()


def test_a_lock_that_was_removed_meanwhile_is_made_again(tmp_path: Path) -> None:
    file = tmp_path / "new" / "lock"
    with ExitStack() as first:
        first.enter_context(locked(file))

        def waiting() -> None:
            file.unlink()
            file.parent.rmdir()
            first.close()

        with locked(file, waiting), open(file) as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_an_error_in_the_block_frees_it(tmp_path: Path) -> None:
    said = list[str]()
    try:
        with locked(tmp_path / "lock"):
            raise RuntimeError("broke")
    except RuntimeError:
        with locked(tmp_path / "lock", lambda: said.append("waited")):
            pass
    assert said == []
