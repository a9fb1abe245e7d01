"""Files of a run: the old one or the new one, whatever happens in between."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import stat
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcore.config import UserError
from kdcore.run import (
    EventLog,
    RunDirectory,
    atomic_path,
    belongs,
    deploy_model,
    fingerprint,
    gather_logs,
    metric_row,
    provenance,
    read_json,
    read_log,
    write_json,
    write_text,
)

ROOT = Path(__file__).parents[2]
# writes b"new" 100 000 times over the file it is given, and dies at a kill point: within, or around the rename
WRITER = """
import os, signal, sys
from kdcore import run
where, path = sys.argv[1:]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
replace = os.replace
def hooked(a, b):
    if where == "before rename": die()
    replace(a, b)
    if where == "after rename": die()
os.replace = hooked
with run.atomic_path(path) as temporary:
    if where == "before writing": die()
    with open(temporary, "wb") as handle:
        handle.write(b"new" * 50_000)
        handle.flush()
        if where == "within": die()
        handle.write(b"new" * 50_000)
"""


@pytest.mark.parametrize("where", ["before writing", "within", "before rename", "after rename", "never"])
def test_killed_writer_leaves_old_or_new_and_the_next_one_tidies_up(tmp_path: Path, where: str) -> None:
    target = tmp_path / "file[1].bin"  # brackets: the name is no pattern
    target.write_bytes(b"old")
    ended = subprocess.run([sys.executable, "-c", WRITER, where, str(target)], cwd=ROOT)
    assert ended.returncode == (0 if where == "never" else -signal.SIGKILL)
    assert target.read_bytes() == (b"new" * 100_000 if where in ("after rename", "never") else b"old")
    left = {file.name for file in tmp_path.iterdir()} - {target.name}
    assert bool(left) == (where != "never"), "the kill was to leave something for the next writer to remove"
    (tmp_path / ".file[2].bin.0123.tmp").mkdir()  # another file's: not ours to remove
    write_text(target, "newest")
    assert {file.name for file in tmp_path.iterdir()} == {target.name, ".file[2].bin.0123.tmp"}
    assert target.read_text() == "newest"


def test_a_living_writer_keeps_its_temporary_file(tmp_path: Path) -> None:
    target = tmp_path / "a"
    with atomic_path(target) as slow:
        slow.write_text("slow")
        write_text(target, "quick")
        assert slow.exists()
    assert target.read_text() == "slow"


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a"):
        pass  # nothing was written, so there is nothing to rename
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_many_writers_of_one_file(tmp_path: Path) -> None:
    """Every reader sees one writer's text whole, and nothing is left over."""
    target, torn = tmp_path / "a", []
    write_text(target, "0" * 1000)

    def write(name: str) -> None:
        for _ in range(20):
            write_text(target, name * 1000)
            text = target.read_text()
            torn.extend([text] if len(text) != 1000 or len(set(text)) != 1 else [])

    threads = [threading.Thread(target=write, args=(name,)) for name in "123"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torn == []
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ä": [1, None]})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"x": math.nan})
    assert read_json(tmp_path / "a.json") == {"ä": [1, None]}


# -- fingerprints ------------------------------------------------------------------------------------------------------

ONE = np.arange(6, dtype=np.int32)


@pytest.mark.parametrize(
    "other",
    [
        (ONE.astype(np.int64),),
        (ONE.reshape(2, 3),),
        (ONE[:5], ONE[5:]),
        (ONE.tobytes(),),
        (ONE[::-1],),
        (str(ONE),),
        (),
        (None,),
        (np.empty((0, 6), np.int32),),
    ],
)
def test_fingerprint_tells_apart(other: tuple) -> None:
    assert fingerprint(*other) != fingerprint(ONE)


def test_fingerprint_is_of_values_not_of_memory() -> None:
    assert fingerprint(ONE.reshape(2, 3).T.copy()) == fingerprint(np.asfortranarray(ONE.reshape(2, 3).T))
    assert fingerprint({"a": 1, "b": Path("x")}) == fingerprint({"b": "x", "a": np.int64(1)})
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert fingerprint(b"x") != fingerprint("x")
    assert fingerprint("null") != fingerprint(None)
    assert len(fingerprint(np.array(["2020-01-01"], dtype="datetime64[D]"))) == 16


def test_fingerprint_refuses_what_it_cannot_see_into() -> None:
    with pytest.raises(TypeError, match="array of objects"):
        fingerprint(np.array([object()]))
    with pytest.raises(TypeError, match="ndarray in a mapping"):
        fingerprint({"a": np.zeros(10_000)})


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_fingerprint_has_no_seams(a: list[bytes], b: list[bytes]) -> None:
    assert (fingerprint(*a) == fingerprint(*b)) == (a == b)


# -- logs --------------------------------------------------------------------------------------------------------------


def test_log_is_cut_back_to_a_position(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "deep" / "log.jsonl", {"seed": 3})
    log.truncate(100)  # nothing there: nothing to cut
    assert log.position() == 0
    log.write("epoch", epoch=0)
    position = log.position()
    log.write("epoch", epoch=1)
    log.sync()
    log.truncate(position)
    log.write("epoch", epoch=1, text="again")
    assert [(event["epoch"], event["seed"]) for event in read_log(log.path)] == [(0, 3), (1, 3)]


def test_log_has_no_numbers_that_json_lacks(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "log.jsonl")
    log.write("epoch", terms={"a": math.inf, "b": {"c": math.nan}}, d=1.5)
    event = json.loads(log.path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (event["terms"], event["d"]) == ({"a": None, "b": {"c": None}}, 1.5)


@settings(max_examples=50)
@given(texts=st.lists(st.text(), max_size=4), cut=st.integers(0, 40))
def test_log_torn_anywhere_reads_as_its_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], cut: int
) -> None:
    """Also inside a character of several bytes, and with line separators that only Unicode knows."""
    log = EventLog(tmp_path_factory.mktemp("log") / "log.jsonl")
    for text in [*texts, "last \u2028 é 物"]:
        log.write("note", text=text)
    data = log.path.read_bytes()
    kept = data[: max(len(data) - cut - 2, 0)]
    log.path.write_bytes(kept)
    found = read_log(log.path)
    assert [event["text"] for event in found] == texts[: len(found)]
    assert len(found) >= kept.count(b"\n")


def test_no_log_is_no_events(tmp_path: Path) -> None:
    assert read_log(tmp_path / "none") == []


# -- the directory -----------------------------------------------------------------------------------------------------


def test_configuration_comes_back_as_it_was(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path / "a" / "b")
    assert run.read_config() is None
    assert run.read_metrics() == []
    config = {"name": "no", "rate": 1e-5, "path": "12:30", "list": [1, None, True], "empty": {}}
    run.write_config(config)
    assert run.read_config() == config
    (run.path / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml, line 1"):
        run.read_config()


def test_a_folder_with_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path)
    assert run.refuse_other({"a": 1}) is False
    run.write_config({"a": {"b": 1, "c": 2}, "d": 3})
    assert run.refuse_other({"d": 3, "a": {"c": 2, "b": 1}}) is True
    with pytest.raises(UserError, match=r"other settings \(a\.c, e\); choose another --out"):
        run.refuse_other({"a": {"b": 1, "c": 5}, "d": 3, "e": 1})


@dataclass(frozen=True)
class Settings:
    """Of a run; an earlier version did not have ``folds`` and had ``depth``."""

    name: str = "one"
    folds: int = 0


def test_settings_that_came_after_a_run_are_its_defaults(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path)
    run.write_config({"name": "two"})
    assert run.refuse_other({"name": "two", "folds": 0}, Settings) is True
    with pytest.raises(UserError, match=r"other settings \(folds\)"):
        run.refuse_other({"name": "two", "folds": 3}, Settings)
    run.write_config({"name": "two", "depth": 1})
    with pytest.raises(UserError, match=r"other settings \(.*depth"):
        run.refuse_other({"name": "two", "folds": 0}, Settings)


def test_a_deployed_model_is_whole_and_kept_while_it_is_the_same(tmp_path: Path) -> None:
    source, target = tmp_path / "seeds" / "0", tmp_path / "student"
    source.mkdir(parents=True)
    (source / "weights").write_text("one")
    write_json(source / "model.json", {"key": "one"})
    assert belongs(source, "one") and not belongs(source, "two") and not belongs(target, "one")
    deploy_model(source, target)
    (target / "mark").touch()
    deploy_model(source, target)
    assert (target / "mark").exists()
    (source / "weights").write_text("two")
    write_json(source / "model.json", {"key": "two"})
    deploy_model(source, target)
    assert (target / "weights").read_text() == "two" and not (target / "mark").exists()
    (target / "model.json").unlink()  # torn by a kill
    deploy_model(source, target)
    assert belongs(target, "two") and sorted(each.name for each in tmp_path.iterdir()) == [
        ".student.lock",
        "seeds",
        "student",
    ]


def test_logs_are_gathered_in_order_without_what_is_torn(tmp_path: Path) -> None:
    (tmp_path / "a").write_text('{"event": "epoch", "epoch": 0}\n{"event": "to')
    (tmp_path / "b").write_text('{"event": "epoch", "epoch": 1}\n')
    gather_logs([tmp_path / "b", tmp_path / "a", tmp_path / "none"], tmp_path / "log.jsonl")
    assert [event["epoch"] for event in read_log(tmp_path / "log.jsonl")] == [1, 0]


def test_metric_rows(tmp_path: Path) -> None:
    options = {"domain": "recsys", "recipe": "r", "model": "m", "seed": 0, "split": "test", "params": 1, "bytes": 4}
    row = metric_row(role="student", metrics={"ndcg@10": np.float32(0.5)}, **options)  # type: ignore[arg-type]
    assert row["latency_ms"] == {"p50": None, "p99": None}
    RunDirectory.open(tmp_path).write_metrics([row])
    assert RunDirectory.open(tmp_path).read_metrics() == [row]
    with pytest.raises(ValueError, match="role: got 'pupil', wanted one of teacher"):
        metric_row(role="pupil", metrics={}, **options)  # type: ignore[arg-type]


def test_provenance_says_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/kd", "recsys", "run"])
    about = provenance(seeds=[1])
    assert about["command"] == ["kd", "recsys", "run"]
    assert about["seeds"] == [1]
    assert {"python", "numpy", "torch", "lightning-fabric"} <= set(about["versions"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"x\.json: line 1, column 1: Expecting value"),
        (b'{"a": 1', r"x\.json: line 1, column 8: Expecting"),
        (b"\xff", r"x\.json: not UTF-8 text"),
        (b"[" * 100_000, r"x\.json: nested too deeply"),
        (b"5", r"x\.json: got int, wanted dict"),
        (b"[]", r"x\.json: got list, wanted dict"),
    ],
)
def test_a_damaged_json_file_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_json(tmp_path / "x.json", dict)


def test_what_is_no_file_is_not_written_over(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(UserError, match="is a device or a pipe, wanted the name of a file"):
            write_text(path, "text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    write_text(tmp_path / "file", "old")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "new").symlink_to("../made")
    write_text(tmp_path / "link", "new")
    write_text(tmp_path / "folder" / "new", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"
    assert (tmp_path / "made").read_text() == "new" and [*(tmp_path / "folder").iterdir()] == [tmp_path / "folder/new"]


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as error, atomic_path(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(tmp_path / "a")
