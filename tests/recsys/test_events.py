"""The event store: what is acknowledged stays, whoever writes, whatever is killed, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import socket
import sqlite3
import string
import subprocess
import sys
import tempfile
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apps.recsys.bench_events import kill_rounds, throughput
from apps.recsys.data.dataset import load_dataset
from apps.recsys.events import MAX_CHARACTERS, Event, EventStore, EventStoreBusy, EventStoreError, export_events
from kdcore.config import UserError

try:
    from pytest_postgresql import factories
except ImportError:
    factories = None

ROOT = Path(__file__).resolve().parents[2]
BINARIES = [Path(found).parent for found in [shutil.which("initdb")] if found] + sorted(
    Path("/usr/lib/postgresql").glob("*/bin"), reverse=True
)


@dataclass
class Server:
    """A PostgreSQL server of this test session; the names are those that pytest-postgresql asks for."""

    folder: Path
    port: int
    host: str = "127.0.0.1"
    user: str = "postgres"
    password: str | None = None
    options: str = ""
    maintenance_dbname: str = "postgres"
    template_dbname: str | None = None

    def command(self, name: str, *arguments: str) -> None:
        """Run a program of PostgreSQL, as another user where this is root, whom it refuses."""
        other: dict[str, Any] = {}
        if os.geteuid() == 0:
            other = {"user": "nobody", "group": self.folder.stat().st_gid, "extra_groups": []}
        log = self.folder / "commands.log"
        with open(log, "a", encoding="utf-8") as handle:
            finished = subprocess.run(
                [str(BINARIES[0] / name), *arguments],
                **other,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=handle,  # not a pipe: the server keeps it open
                stderr=subprocess.STDOUT,
                timeout=60,
            )
        if finished.returncode:
            raise RuntimeError(f"{name}: {log.read_text(encoding='utf-8')[-1000:]}")

    def control(self, what: str, mode: str = "fast") -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder} -c fsync=off -c deadlock_timeout=50ms"
        self.command("pg_ctl", "-D", "data", "-w", "-t", "50", "-m", mode, "-o", options, what)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    if factories is None or not BINARIES:
        pytest.skip("needs pytest-postgresql and the binaries of PostgreSQL (initdb, pg_ctl)")
    # not tmp_path: the server's user may not go through a folder of root's
    folder = Path(tempfile.mkdtemp(prefix="kd-postgres-"))
    if os.geteuid() == 0:
        shutil.chown(folder, "nobody")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = Server(folder, free.getsockname()[1])
    try:
        server.command("initdb", "-D", "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "-N")
        server.control("start")
        yield server
    finally:
        if (folder / "data" / "postmaster.pid").exists():
            server.control("stop", "immediate")
        shutil.rmtree(folder, ignore_errors=True)


if factories is not None:
    postgres_running = factories.postgresql_noproc(dbname="events", depends_on="postgres_server")
    postgres_database = factories.postgresql("postgres_running")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new, empty place for events."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'events.db'}"
    server = request.getfixturevalue("postgres_server")
    info = request.getfixturevalue("postgres_database").info
    return f"postgresql+psycopg://{server.user}@{info.host}:{info.port}/{info.dbname}"


@pytest.fixture
def store(url: str) -> Iterator[EventStore]:
    with opened(url) as each:
        yield each


class opened:
    """An open store that is closed at the end of the block."""

    def __init__(self, url: str, **options: Any) -> None:
        self.store = EventStore(url, **options)

    def __enter__(self) -> EventStore:
        return self.store

    def __exit__(self, *_: object) -> None:
        self.store.close()


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def add(store: EventStore, *events: Event) -> int:
    return int(run(store.add(events)))


def clicks(user: str, *items: str) -> list[Event]:
    return [Event(user, item, 1e9 + n, "click") for n, item in enumerate(items)]


def test_items_come_back_oldest_first_and_limited(store: EventStore) -> None:
    assert store.items_of("ann") == []
    assert add(store, *clicks("ann", "a", "b", "a", "c"), *clicks("bob", "z")) == 5
    assert add(store) == 0
    assert store.items_of("ann") == ["a", "b", "a", "c"]
    assert store.items_of("ann", 2) == ["a", "c"]
    assert store.items_of("ann", 0) == []
    assert run(store.items_of_async("bob")) == ["z"]
    assert store.count() == 5
    assert store.inline == (store._backend.__class__.__name__ == "Sqlite")


def test_another_store_sees_what_was_acknowledged_and_reopening_keeps_it(url: str, store: EventStore) -> None:
    with opened(url) as other:
        add(store, *clicks("ann", "a"))
        assert other.items_of("ann") == ["a"]
        add(other, *clicks("ann", "b"))
        assert store.items_of("ann") == ["a", "b"]
    with opened(url) as later:
        assert later.items_of("ann") == ["a", "b"]


def test_concurrent_adds_share_transactions_and_each_gets_its_own_count(store: EventStore) -> None:
    batches: list[int] = []
    write = store._backend.write
    store._backend.write = lambda batch: batches.append(len(batch)) or write(batch)  # type: ignore[func-returns-value,method-assign]

    async def all_at_once() -> list[int]:
        return await asyncio.gather(*(store.add(clicks(f"u{n % 7}", *"abcd"[: 1 + n % 3])) for n in range(300)))

    assert run(all_at_once()) == [1 + n % 3 for n in range(300)]
    assert store.count() == sum(1 + n % 3 for n in range(300))
    assert sum(batches) == 300 and len(batches) < 100


def test_a_repeated_event_id_is_stored_once_for_its_user(store: EventStore) -> None:
    event = Event("ann", "a", 1.0, event_id="key")
    assert add(store, event) == 1
    assert add(store, event) == 0
    assert add(store, Event("ann", "b", 2.0, event_id="key"), Event("ann", "c", 2.0), Event("bob", "a", 1.0)) == 2
    assert add(store, Event("bob", "b", 2.0, event_id="key")) == 1  # a key is its user's own
    assert store.items_of("ann") == ["a", "c"]

    async def at_once() -> list[int]:
        keyed = [Event("eve", f"{n}", 1.0, event_id=f"{n % 5}") for n in range(20)]
        return await asyncio.gather(*(store.add([each, Event("eve", "free", 1.0)]) for each in keyed))

    assert run(at_once()) == [2] * 5 + [1] * 15
    assert store.items_of("eve").count("free") == 20
    long = "k" * MAX_CHARACTERS
    assert [add(store, Event("zoe", "a", 1.0, event_id=each)) for each in (long, long, long[:-1] + "x")] == [1, 0, 1]


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (Event("", "i", 1.0), "user_id: has 0 characters"),
        (Event("u\0", "i", 1.0), "user_id: holds NUL"),
        (Event("u", "\ud800", 1.0), "item_id: holds NUL or half a surrogate"),
        (Event("u", "i" * (MAX_CHARACTERS + 1), 1.0), "item_id: has 513 characters"),
        (Event("u", 7, 1.0), "item_id: got int"),  # type: ignore[arg-type]
        (Event("u", "i", math.nan), "timestamp: wanted a finite"),
        (Event("u", "i", 10**400), "timestamp: wanted a finite"),
        (Event("u", "i", True), "timestamp: got bool"),
        (Event("u", "i", "now"), "timestamp: got str"),  # type: ignore[arg-type]
        (Event("u", "i", 1.0, "\0"), "kind: holds NUL"),
        (Event("u", "i", 1.0, rating=math.inf), "rating: wanted a finite"),
        (Event("u", "i", 1.0, rating=1e39), "rating: got 1e\\+39"),
        (Event("u", "i", 1.0, event_id=""), "event_id: has 0 characters"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name_before_it_can_spoil_a_batch(
    tmp_path: Path, event: Event, message: str
) -> None:
    with opened(str(tmp_path / "events.db")) as store:
        with pytest.raises(UserError, match=message):
            add(store, *clicks("ann", "a"), event)
        assert store.count() == 0


def test_unheard_of_users_of_any_text_have_no_items(store: EventStore) -> None:
    for user in ("nobody", "", "nul\0", "\udcff", "x" * 10_000, "' OR 1=1 --"):
        assert store.items_of(user) == []


def test_longest_ids_of_the_widest_characters_fit(store: EventStore) -> None:
    wide = "".join(chr(0x1F300 + n % 700) for n in range(MAX_CHARACTERS))
    event = Event(wide, wide[::-1], 1.0, wide, event_id=wide)
    assert add(store, event) == 1
    assert store.items_of(wide) == [wide[::-1]]


def held(store: EventStore) -> tuple[threading.Event, threading.Event]:
    """Hold up the writer: it sets the first event when it has a batch, and waits for the second."""
    reached, go_on = threading.Event(), threading.Event()
    write = store._backend.write

    def wait_and_write(batch: Any) -> list[int]:
        reached.set()
        go_on.wait(30)
        return write(batch)

    store._backend.write = wait_and_write  # type: ignore[method-assign]
    return reached, go_on


def test_a_full_queue_refuses_and_takes_again_when_it_is_empty(url: str) -> None:
    with opened(url, capacity=3) as store:
        reached, go_on = held(store)

        async def fill() -> int:
            first = asyncio.ensure_future(store.add(clicks("ann", "a")))
            await asyncio.to_thread(reached.wait, 30)
            second = asyncio.ensure_future(store.add(clicks("ann", "b", "c")))
            await asyncio.sleep(0)
            assert store.waiting == 3
            with pytest.raises(EventStoreBusy, match="3 events wait"):
                await store.add(clicks("ann", "d"))
            go_on.set()
            await asyncio.gather(first, second)
            return await store.add(clicks("ann", *"efghij"))  # more than the capacity, with nothing else waiting

        assert run(fill()) == 6
        assert store.items_of("ann") == list("abcefghij")
        assert store.waiting == 0


def test_a_cancelled_caller_has_its_events_stored_and_closing_writes_what_waits(url: str) -> None:
    store = EventStore(url)
    reached, go_on = held(store)

    async def leave() -> None:
        gone = asyncio.ensure_future(store.add(clicks("ann", "a")))
        await asyncio.to_thread(reached.wait, 30)
        stays = asyncio.ensure_future(store.add(clicks("ann", "b")))
        await asyncio.sleep(0)
        gone.cancel()
        closing = asyncio.ensure_future(store.aclose())
        await asyncio.sleep(0.01)
        go_on.set()
        await closing
        assert await stays == 1
        with pytest.raises(EventStoreError, match="closed"):
            await store.add(clicks("ann", "c"))

    run(leave())
    store.close()
    with opened(url) as later:
        assert later.items_of("ann") == ["a", "b"]


def test_a_loop_that_is_gone_does_not_stop_the_writer(store: EventStore) -> None:
    reached, go_on = held(store)

    async def leave() -> None:
        task = asyncio.ensure_future(store.add(clicks("ann", "a")))
        await asyncio.to_thread(reached.wait, 30)
        task.cancel()

    run(leave())
    go_on.set()
    assert add(store, *clicks("ann", "b")) == 1
    assert store.items_of("ann") == ["a", "b"]


def test_a_full_disk_fails_its_own_adds_whole_and_the_store_goes_on(tmp_path: Path) -> None:
    path = str(tmp_path / "events.db")
    with opened(path) as store:
        add(store, *clicks("ann", "a"))
        connection = store._backend._writer  # type: ignore[attr-defined]
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(EventStoreError, match=r"events\.db: database or disk is full"):
            add(store, *(Event("ann", "x" * 500, 1.0) for _ in range(200)))
        assert store.items_of("ann") == ["a"]
        assert add(store, *clicks("ann", "b")) == 1
        connection.execute("PRAGMA max_page_count = 1000000")
        assert add(store, *(Event("ann", "x" * 500, 1.0) for _ in range(200))) == 200


def test_an_error_of_the_writer_itself_is_told_and_the_store_goes_on(store: EventStore) -> None:
    write = store._backend.write
    store._backend.write = lambda batch: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(EventStoreError, match="division by zero"):
        add(store, *clicks("ann", "a"))
    store._backend.write = write  # type: ignore[method-assign]
    assert add(store, *clicks("ann", "a")) == 1


# in a process of its own; all open the store at once (one makes the schema) and some keys are those of all processes
WRITE_BESIDE = """
import asyncio, sys
from apps.recsys.events import Event, EventStore

url, name, together, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
store = EventStore(url)

async def caller(which):
    for n in range(rounds):
        own, shared = f"{which}-{n}", f"{(which + n) % together}-{n}"
        await store.add([Event(name, own, 1.0), Event("shared", shared, 1.0, event_id=shared)])

async def callers():
    await asyncio.gather(*map(caller, range(together)))
    await store.aclose()

asyncio.run(callers())
"""


def test_processes_that_start_and_write_at_once_lose_nothing(url: str) -> None:
    together, rounds, names = 4, 15, ("p0", "p1", "p2")
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITE_BESIDE, url, each, str(together), str(rounds)], cwd=ROOT)
        for each in names
    ]
    assert [each.wait(60) for each in processes] == [0, 0, 0]
    everything = sorted(f"{which}-{n}" for which in range(together) for n in range(rounds))
    with opened(url) as store:
        for user in (*names, "shared"):
            assert sorted(store.items_of(user)) == everything
        assert store.count() == 4 * len(everything)


def test_nothing_acknowledged_is_lost_when_the_process_is_killed(url: str, tmp_path: Path) -> None:
    kills = 5 if url.startswith("sqlite") else 2
    result = kill_rounds(tmp_path, kills, seed=11, url=url)
    assert result["acknowledged"] > kills
    assert (result["lost"], result["torn"], result["repeated"]) == (0, 0, 0)
    assert result["stored"] >= result["acknowledged"]


def test_throughput_measures(tmp_path: Path) -> None:
    result = throughput(tmp_path, connections=4, seconds=0.2, processes=2)
    assert result["adds"] > 0 and result["items_of_0_us"] > 0


def test_a_server_that_need_not_flush_is_told_to(postgres_server: Server, request: pytest.FixtureRequest) -> None:
    connection = request.getfixturevalue("postgres_database")
    connection.autocommit = True
    connection.execute(f"ALTER DATABASE {connection.info.dbname} SET synchronous_commit = off")
    address = f"postgresql://{connection.info.user}@127.0.0.1:{connection.info.port}/{connection.info.dbname}"
    with opened(address) as store, store._backend._begin() as own:  # type: ignore[attr-defined]
        assert own.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"


def test_a_restarted_server_is_found_again(postgres_server: Server, request: pytest.FixtureRequest) -> None:
    info = request.getfixturevalue("postgres_database").info
    address = f"postgresql://{info.user}:se%40cret@{info.host}:{info.port}/{info.dbname}"
    with opened(address) as store:
        assert add(store, *clicks("ann", "a")) == 1
        postgres_server.control("stop")
        try:
            for work in (lambda: add(store, *clicks("ann", "b")), lambda: store.items_of("ann")):
                with pytest.raises(EventStoreError, match=r"^postgresql://127") as refused:
                    work()
                assert "se@cret" not in str(refused.value) and "\n" not in str(refused.value)
            with pytest.raises(UserError, match="cannot be used as an event store") as unopened:
                EventStore(address)
            assert "cret" not in str(unopened.value) and "\n" not in str(unopened.value)
        finally:
            postgres_server.control("start")
        assert add(store, *clicks("ann", "c")) == 1
        assert store.items_of("ann") == ["a", "c"]


@pytest.mark.parametrize(
    "bad",
    [
        "mysql://u:secret@h/d",
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite:secret",
        "postgresql:secret",
        "postgresql://u:sec@secret@host/d",
        "postgresql://u:sec/secret@host/d",
        "postgresql://u:sec:secret@host/d",
        "postgresql://u:secret@host:port/d",
        "postgresql://host/d?password=secret@x",
        "a\0secret",
    ],
)
def test_a_bad_url_is_one_line_without_the_password(bad: str) -> None:
    pytest.importorskip("sqlalchemy")
    with pytest.raises(UserError, match=r"^events: ") as refused:
        EventStore(bad)
    assert "secret" not in str(refused.value) and "\n" not in str(refused.value)


def test_a_database_of_another_version_or_of_something_else_is_refused(
    request: pytest.FixtureRequest, url: str
) -> None:
    EventStore(url).close()
    if url.startswith("sqlite"):
        execute = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None).execute
        later, foreign = "PRAGMA user_version = 2", "PRAGMA application_id = 5"
    else:
        connection = request.getfixturevalue("postgres_database")
        connection.autocommit = True
        execute = connection.execute
        later, foreign = "UPDATE kd_events_schema SET version = 2", "DROP TABLE kd_events_schema"
    execute(later)
    with pytest.raises(UserError, match="has events of version 2, this release reads version 1"):
        EventStore(url)
    execute(foreign)
    with pytest.raises(UserError, match="something else"):
        EventStore(url)


def refused(path: Path, message: str) -> None:
    for work in (lambda: EventStore(str(path)), lambda: export_events(str(path), path.parent / "out.parquet")):
        with pytest.raises(UserError, match=message) as error:
            work()
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_no_event_store_are_refused_by_name_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "text.db"
    text.write_text("user,item\n" * 200)
    refused(text, "not a database")
    assert text.read_text() == "user,item\n" * 200
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE kd_events (a)")
    connection.close()
    before = other.read_bytes()
    refused(other, "something else")
    assert other.read_bytes() == before
    refused(tmp_path, "is a folder")
    with pytest.raises(UserError, match="cannot be used"):
        EventStore(str(text / "below" / "events.db"))


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    with opened(str(path)) as store:
        add(store, *(Event(f"u{n}", "x" * 300, 1.0) for n in range(300)))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "malformed")
    path.write_bytes(whole[:4096] + b"\x5a" * (len(whole) - 4096))
    with pytest.raises(UserError, match=r"events\.db: .*malformed"):
        export_events(str(path), tmp_path / "out.parquet")
    with opened(str(path)) as store:
        with pytest.raises(EventStoreError, match=r"events\.db: .*malformed"):
            store.items_of("u1")
        with pytest.raises(EventStoreError, match=r"events\.db: .*malformed"):
            add(store, *clicks("ann", "a"))


def exported(url: str, folder: Path) -> tuple[dict[str, Any], Any]:
    out = folder / "log.parquet"
    result = export_events(url, out)
    return result, load_dataset(out)


def rows_of(dataset: Any) -> list[tuple[Any, Any, float]]:
    users, items = dataset.user_ids.take(dataset.user).to_pylist(), dataset.item_ids.take(dataset.item).to_pylist()
    return list(zip(users, items, dataset.timestamp.tolist(), strict=True))


def test_integer_ids_are_exported_as_integers_in_the_order_of_storing(
    url: str, store: EventStore, tmp_path: Path
) -> None:
    largest, least = str(2**63 - 1), str(-(2**63))
    add(
        store, Event("7", "10", 5.0, rating=4.5), Event("0", largest, 3.25, rating=1), Event("-7", least, 4.0, rating=2)
    )
    add(store, Event("7", "10", 6.0, "view", 3.0))
    said: list[str] = []
    result = export_events(url, tmp_path / "log.parquet", progress=said.append)
    assert {name: result[name] for name in ("rows", "users", "items", "with_rating")} == {
        "rows": 4,
        "users": 3,
        "items": 3,
        "with_rating": 4,
    }
    assert said == ["exporting events: 4/4"]
    dataset = load_dataset(tmp_path / "log.parquet")
    assert rows_of(dataset) == [(7, 10, 5.0), (0, 2**63 - 1, 3.25), (-7, -(2**63), 4.0), (7, 10, 6.0)]
    assert dataset.rating.tolist() == [4.5, 1.0, 2.0, 3.0]
    assert result["columns"]["event"] == "string"


@pytest.mark.parametrize(
    "odd", ["x", "007", "+1", "-0", " 1", "1 ", "1.0", "1e3", "٣", "9223372036854775808", "-9223372036854775809", "1\n"]
)
def test_one_id_that_is_no_plain_integer_makes_its_column_text(odd: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'events.db'}"
    with opened(url) as store:
        add(store, Event("1", "2", 0.0), Event("2", odd, 0.0))
    result, dataset = exported(url, tmp_path)
    assert rows_of(dataset) == [(1, "2", 0.0), (2, odd, 0.0)]
    assert "rating" not in result["columns"] and dataset.rating is None


def test_text_ids_and_ratings_that_only_some_events_have(url: str, store: EventStore, tmp_path: Path) -> None:
    odd = ["x", "007", "+1", "-0", " 1", "1.0", "٣", "9223372036854775808", "-9223372036854775809", "1\n", "é😀", "'"]
    add(store, *(Event("5", each, float(n), rating=n or None) for n, each in enumerate(odd)))
    add(store, *(Event(each, "5", 1.5) for each in odd))
    result, dataset = exported(url, tmp_path)
    assert rows_of(dataset) == [("5", each, n) for n, each in enumerate(odd)] + [(each, "5", 1.5) for each in odd]
    assert result["columns"]["given_rating"] == "float" and result["with_rating"] == len(odd) - 1
    for each in odd:
        with opened(url) as again:
            assert again.items_of(each) == ["5"]


def test_every_odd_id_alone_keeps_postgres_from_integers(url: str, store: EventStore, tmp_path: Path) -> None:
    add(store, Event("9223372036854775808", "1\n", 0.0))
    assert rows_of(exported(url, tmp_path)[1]) == [("9223372036854775808", "1\n", 0.0)]


def test_an_empty_store_a_missing_file_or_a_folder_is_no_export(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file|holds no events"):
        export_events(url, tmp_path / "out.parquet")
    assert not (tmp_path / "events.db").exists()
    with opened(url) as store:
        with pytest.raises(UserError, match="holds no events"):
            export_events(url, tmp_path / "out.parquet")
        add(store, *clicks("ann", "a"))
        for out in (tmp_path, tmp_path / "log.csv"):
            with pytest.raises(UserError, match="--out: got"):
                export_events(url, out)
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="cannot be written"):
            export_events(url, tmp_path / "file" / "out.parquet")
    assert sorted(each.name for each in tmp_path.glob("*out*")) == []


def test_an_export_in_several_blocks_is_the_same(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import apps.recsys.event_backends as backends

    monkeypatch.setattr(backends, "BLOCK_ROWS", 7)
    with opened(url) as store:
        add(store, *(Event(f"{n % 3}", f"{n}", float(n)) for n in range(30)))
        said: list[str] = []
        export_events(url, tmp_path / "log.parquet", progress=said.append)
    assert [each.rpartition(" ")[2] for each in said] == ["7/30", "14/30", "21/30", "28/30", "30/30"]
    assert rows_of(load_dataset(tmp_path / "log.parquet")) == [(n % 3, n, n) for n in range(30)]


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40)
IDS = st.one_of(TEXT, st.integers(-(2**70), 2**70).map(str), st.text(string.digits + "+- ", min_size=1, max_size=4))
TIMES = st.floats(allow_nan=False, allow_infinity=False)
RATINGS = st.none() | st.floats(allow_nan=False, allow_infinity=False, width=32)
EVENTS = st.lists(st.builds(Event, IDS, IDS, TIMES, TEXT, RATINGS), min_size=1, max_size=8)


def canonical(ids: list[str]) -> list[Any]:
    def plain(text: str) -> bool:
        try:
            return str(int(text)) == text and -(2**63) <= int(text) < 2**63
        except ValueError:
            return False

    return [int(each) for each in ids] if all(plain(each) for each in ids) else list(ids)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS)
def test_ids_and_times_survive_the_round_trip(url: str, tmp_path: Path, events: list[Event]) -> None:
    empty(url)
    with opened(url) as store:
        assert add(store, *events) == len(events)
        for user in {each.user_id for each in events}:
            assert store.items_of(user) == [each.item_id for each in events if each.user_id == user]
    _, dataset = exported(url, tmp_path)
    users, items = canonical([each.user_id for each in events]), canonical([each.item_id for each in events])
    assert rows_of(dataset) == list(zip(users, items, [each.timestamp for each in events], strict=True))
    if dataset.rating is not None:
        assert dataset.rating.tolist() == [each.rating for each in events]


def empty(url: str) -> None:
    """Take all events out, as the same file or database serves many examples."""
    with opened(url) as store:
        if url.startswith("sqlite"):
            store._backend._writer.execute("DELETE FROM kd_events")  # type: ignore[attr-defined]
        else:
            with store._backend._begin() as connection:  # type: ignore[attr-defined]
                connection.exec_driver_sql("TRUNCATE kd_events")
