"""A lock is held by one at a time, says when it is waited for, and is free when its holder is dead."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

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


def test_an_error_in_the_block_frees_it(tmp_path: Path) -> None:
    said = list[str]()
    try:
        with locked(tmp_path / "lock"):
            raise RuntimeError("broke")
    except RuntimeError:
        with locked(tmp_path / "lock", lambda: said.append("waited")):
            pass
    assert said == []
