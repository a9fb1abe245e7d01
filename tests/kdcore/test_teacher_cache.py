"""A teacher's outputs on disk always equal a fresh computation, whoever wrote them and whoever was killed doing it."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcore import teacher_cache
from kdcore.config import UserError
from kdcore.run import write_json
from kdcore.teacher_cache import CacheEntry, TeacherCache

ROOT = Path(__file__).parents[2]
FIELDS: dict[str, tuple[str, tuple[int, ...]]] = {"items": ("int32", (3,)), "scores": ("float32", (3,))}

# argv: folder, log of computed blocks, kill point (0: none), rows, seconds a block takes
WRITER = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from kdcore import run, teacher_cache
from tests.kdcore.test_teacher_cache import FIELDS, answers
folder, log, at, rows, seconds = sys.argv[1], sys.argv[2], *map(float, sys.argv[3:])
passed = 0
def point():
    global passed
    passed += 1
    if passed == at:
        os.kill(os.getpid(), signal.SIGKILL)
def around(owner, name):
    function = getattr(owner, name)
    def wrapped(*args, **options):
        point()
        result = function(*args, **options)
        point()
        return result
    setattr(owner, name, wrapped)
for owner, name in ((os, "replace"), (os, "fsync"), (os, "posix_fallocate"), (np.lib.format, "open_memmap"),
                    (teacher_cache, "write_json"), (np.memmap, "flush")):
    around(owner, name)
def compute(start, stop):
    point()
    time.sleep(seconds)
    with open(log, "a") as handle:
        handle.write(f"{start} {stop}\\n")
    point()
    return answers(start, stop)
entry = teacher_cache.TeacherCache(folder).get_or_compute(
    data="d", teacher="t", kind="k", n_rows=int(rows), fields=FIELDS, compute=compute, block_rows=10)
print(passed)
"""


def answers(start: int, stop: int, salt: int = 0) -> dict[str, np.ndarray]:
    """Return what a teacher says of some rows: no row is zero, and none is like another."""
    rows = np.arange(start, stop)[:, None] * 3 + np.arange(3) + 1 + salt
    return {"items": rows.astype(np.int32), "scores": np.where(rows % 7 == 0, -np.inf, rows / 8).astype(np.float32)}


def get(folder: Path, n_rows: int = 25, rebuild: bool = False, **options: Any) -> CacheEntry:
    base = {"data": "d", "teacher": "t", "kind": "k", "fields": FIELDS, "compute": answers, "block_rows": 10}
    return TeacherCache(folder, rebuild=rebuild).get_or_compute(n_rows=n_rows, **{**base, **options})


def never(start: int, stop: int) -> dict[str, np.ndarray]:
    raise AssertionError(f"computed rows {start} to {stop} again")


def check(entry: CacheEntry, n_rows: int = 25, salt: int = 0) -> None:
    wanted = answers(0, n_rows, salt)
    for name, values in wanted.items():
        assert np.array_equal(entry[name], values)
        assert entry[name].dtype == values.dtype
        assert isinstance(entry[name], np.memmap) and not entry[name].flags.writeable
    assert entry.nbytes == sum(values.nbytes for values in wanted.values())


def start_writer(folder: Path, log: Path, at: int = 0, rows: int = 25, seconds: float = 0) -> subprocess.Popen[str]:
    words = [str(folder), str(log), str(at), str(rows), str(seconds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )


@settings(max_examples=25, deadline=None)
@given(
    n_rows=st.integers(0, 40),
    block_rows=st.integers(1, 50),
    fails=st.lists(st.integers(0, 40), max_size=3),
    other=st.integers(1, 50),
)
def test_equals_a_fresh_computation_whatever_was_interrupted(
    tmp_path_factory: pytest.TempPathFactory, n_rows: int, block_rows: int, fails: list[int], other: int
) -> None:
    """Failures between blocks, and other block sizes after them, leave nothing wrong behind and nothing done twice."""
    folder = tmp_path_factory.mktemp("cache")
    computed: list[int] = []
    for row in [*fails, None]:

        def compute(start: int, stop: int, row: int | None = row) -> dict[str, np.ndarray]:
            if row is not None and start <= row < stop:
                raise InterruptedError
            computed.extend(range(start, stop))
            return answers(start, stop)

        try:
            entry = get(folder, n_rows, block_rows=block_rows if row is None else other, compute=compute)
        except InterruptedError:
            continue
    check(entry, n_rows)
    assert computed == list(range(n_rows))
    check(get(folder, n_rows, compute=never), n_rows)


@pytest.fixture(scope="module")
def kill_points(tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many kill points an undisturbed writer passes."""
    folder = tmp_path_factory.mktemp("count")
    writer = start_writer(folder / "cache", folder / "log")
    said, _ = writer.communicate(timeout=60)
    assert writer.returncode == 0
    check(get(folder / "cache", compute=never))
    return int(said)


def test_killed_writers(kill_points: int, tmp_path: Path) -> None:
    """Killed around every fifth place where something reaches the disk; the next writer wastes at most one block."""
    first = random.Random().randrange(1, 6)
    for at in range(first, kill_points + 1, 5):
        folder, log = tmp_path / str(at), tmp_path / f"{at}.log"
        writer = start_writer(folder, log, at)
        assert writer.wait(timeout=60) == -signal.SIGKILL, at
        computed: list[int] = []

        def compute(start: int, stop: int, computed: list[int] = computed) -> dict[str, np.ndarray]:
            computed.append(start)
            return answers(start, stop)

        check(get(folder, compute=compute))
        before = [int(line.split()[0]) for line in log.read_text().splitlines()] if log.exists() else []
        assert sorted(set(before + computed)) == [0, 10, 20]
        assert len(before + computed) <= 4, f"killed at {at}: {before}, then {computed}"


def test_two_writers_at_once_and_one_of_them_killed(tmp_path: Path) -> None:
    """They wait for each other: every block is computed once; the lock of a dead one is free."""
    folder, log = tmp_path / "cache", tmp_path / "log"
    both = [start_writer(folder, log, seconds=0.05, rows=65) for _ in range(2)]
    assert [writer.wait(timeout=60) for writer in both] == [0, 0]
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["0", "10", "20", "30", "40", "50", "60"]
    check(get(folder, 65, compute=never), 65)

    folder, log = tmp_path / "other", tmp_path / "other.log"
    both = [start_writer(folder, log, seconds=0.1, rows=65) for _ in range(2)]
    while not log.exists():
        assert both[0].poll() is None or both[1].poll() is None
        time.sleep(0.02)
    holder = both[random.Random().randrange(2)]  # the one that computes, or the one that waits
    holder.kill()
    codes = sorted(writer.wait(timeout=60) for writer in both)
    assert codes == [-signal.SIGKILL, 0]
    assert len(log.read_text().splitlines()) in (7, 8)
    check(get(folder, 65, compute=never), 65)


@pytest.mark.parametrize(
    "change",
    [
        {"data": "e"},
        {"teacher": "u"},
        {"kind": "l"},
        {"n_rows": 24},
        {"fields": {**FIELDS, "items": ("int64", (3,))}},
        # what one says with data another says with teacher
        {"data": "dt", "teacher": ""},
        {"data": "", "teacher": "dt"},
    ],
)
def test_another_question_is_another_entry(tmp_path: Path, change: dict[str, Any]) -> None:
    check(get(tmp_path))
    other = get(tmp_path, **{"compute": lambda start, stop: answers(start, stop, salt=100), **change})
    check(get(tmp_path, compute=never))
    assert other["items"][0, 0] == 101
    assert len([file for file in tmp_path.iterdir() if not file.name.startswith(".")]) == 2


def test_block_size_is_no_part_of_the_question(tmp_path: Path) -> None:
    get(tmp_path, block_rows=3)
    check(get(tmp_path, block_rows=7, compute=never))


def test_progress_counts_rows(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    get(tmp_path, progress=lambda done, total: heard.append((done, total)))
    assert heard == [(10, 25), (20, 25), (25, 25)]


@pytest.mark.parametrize("name", ["entry.json", "items.npy", "scores.npy"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "other"])
def test_a_damaged_entry_is_refused_and_made_again_on_request(tmp_path: Path, name: str, damage: str) -> None:
    file = get(tmp_path).folder / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "gone":
        file.unlink()
    elif name == "entry.json":
        file.write_text("{}")
    else:
        np.save(file, np.zeros((25, 2), np.float32))
    with pytest.raises(
        UserError, match=rf"{tmp_path}.*not a teacher's outputs as asked for \(.+\); delete it"
    ) as error:
        get(tmp_path, compute=never)
    if damage != "gone" and name != "entry.json":
        assert name in str(error.value)
    check(get(tmp_path, rebuild=True))
    check(get(tmp_path, compute=never))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"items": np.zeros((10, 3), np.int32)}, "got fields"),
        (
            {"items": np.zeros((10, 3), np.int32), "scores": np.zeros((9, 3), np.float32)},
            r"'scores' has shape \(9, 3\)",
        ),
        (
            {"items": np.zeros((10, 3), np.int32), "scores": np.full((10, 3), np.nan)},
            "30 of 30 values of 'scores' are NaN",
        ),
        ({"items": np.zeros((10, 3), np.float32), "scores": np.zeros((10, 3))}, "'items' has dtype float32"),
        ({"items": np.full((10, 3), 1 << 31), "scores": np.zeros((10, 3))}, "'items' has values beyond int32"),
    ],
)
def test_wrong_answers_are_refused(tmp_path: Path, values: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get(tmp_path, compute=lambda start, stop: values)
    check(get(tmp_path))


def test_wrong_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="object"):
        get(tmp_path, fields={"items": ("object", ())})
    for wrong in ({"n_rows": -1}, {"block_rows": 0}):
        with pytest.raises(ValueError, match="wanted at least 0 and 1"):
            get(tmp_path, **wrong)


def test_no_room_on_the_disk_is_an_error_before_anything_is_computed(tmp_path: Path) -> None:
    """A hole in a mapped file on a full disk would kill the process at the first write into it."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="no room for the teacher's outputs"):
            get(tmp_path, 10_000, compute=never)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [file for file in tmp_path.iterdir() if not file.name.endswith(".lock")] == []
    check(get(tmp_path))


def ragged_answers(start: int, stop: int) -> dict[str, np.ndarray]:
    """Return rows of row % 4 values each, and how many."""
    counts = np.arange(start, stop) % 4
    values = np.concatenate([np.empty(0, np.int32), *(np.arange(n) + 10 * (start + at) for at, n in enumerate(counts))])
    return {"counts": counts.astype(np.int64), "values": values.astype(np.int32)}


def get_ragged(folder: Path, n_rows: int = 25, **options: Any) -> CacheEntry:
    fields: dict[str, tuple[str, tuple[int, ...]]] = {"counts": ("<i8", ())}
    return get(folder, n_rows, **{"fields": fields, "ragged": {"values": "<i4"}, "compute": ragged_answers, **options})


def check_ragged(entry: CacheEntry, n_rows: int = 25) -> None:
    for name, values in ragged_answers(0, n_rows).items():
        assert np.array_equal(entry[name], values) and not (len(values) and entry[name].flags.writeable)
    assert (entry.folder / "values.values").stat().st_size == 4 * len(entry["values"])


@pytest.mark.parametrize("dies", ["computing", "writing", "telling"])
def test_ragged_rows_go_on_after_the_blocks_that_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    """What a killed writer left behind its last whole block is written over, not counted."""
    calls = {"compute": 0, "told": 0}

    def compute(start: int, stop: int) -> dict[str, np.ndarray]:
        calls["compute"] += 1
        if calls["compute"] == 2 and dies != "telling":
            if dies == "writing":
                (partial,) = tmp_path.glob(".*.partial")
                with open(partial / "values.values", "ab") as handle:
                    handle.write(b"half a blo")
            raise InterruptedError
        return ragged_answers(start, stop)

    def told(path: Path, value: Any) -> None:
        calls["told"] += 1
        if calls["told"] == 2 and dies == "telling":
            raise InterruptedError
        write_json(path, value)

    monkeypatch.setattr(teacher_cache, "write_json", told)
    with pytest.raises(InterruptedError):
        get_ragged(tmp_path, compute=compute)
    computed: list[int] = []

    def after(start: int, stop: int) -> dict[str, np.ndarray]:
        computed.append(start)
        return ragged_answers(start, stop)

    check_ragged(get_ragged(tmp_path, compute=after))
    assert computed == [10, 20]
    check_ragged(get_ragged(tmp_path, compute=never))


def test_ragged_rows_that_are_damaged_are_refused_and_made_again(tmp_path: Path) -> None:
    for name, text in (("values.values", b"abcde"), ("done.json", b"25"), ("done.json", b"{}")):
        (get_ragged(tmp_path).folder / name).write_bytes(text)
        with pytest.raises(UserError, match=f"{name}.*delete it"):
            get_ragged(tmp_path, compute=never)
        check_ragged(get_ragged(tmp_path, rebuild=True))
    check_ragged(get_ragged(tmp_path, n_rows=0, compute=never), 0)
    check_ragged(get_ragged(tmp_path, n_rows=1), 1)  # its one row holds nothing


def test_wrong_ragged_answers_and_questions_are_refused(tmp_path: Path) -> None:
    good = ragged_answers(0, 10)
    for values, message in (
        (good["values"][None], r"'values' has shape \(1, 13\), wanted \(13,\)"),
        (good["values"].astype(np.float32), "'values' has dtype float32"),
        (good["values"].astype(np.int64) + (1 << 31), "'values' has values beyond int32"),
    ):
        with pytest.raises(ValueError, match=message):
            get_ragged(tmp_path, compute=lambda start, stop, values=values: {**good, "values": values})
    with pytest.raises(ValueError, match="among the fields too"):
        get_ragged(tmp_path, ragged={"counts": "<i4"})
    with pytest.raises(ValueError, match="object"):
        get_ragged(tmp_path, ragged={"values": "object"})
