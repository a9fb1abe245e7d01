"""Where events are kept: a SQLite file, or a PostgreSQL database. ``apps.recsys.events`` is the way to them."""

from __future__ import annotations

import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

from kdcore.config import UserError

BLOCK_ROWS = 1 << 17
READERS = 4  # threads, and connections, that read from PostgreSQL for one process
_VERSION = 1
_APPLICATION = 0x6B644556  # "kdEV" in the header of the SQLite file
_WAIT_SECONDS = 30.0  # for other processes that write the same SQLite file
_READ_SECONDS = 5.0
_CONNECT_SECONDS = 5
_STATEMENT_SECONDS = 15
_ADVISORY_LOCK = 7_738_146_014  # any number, the same in every process
_DEADLOCKS = ("40P01", "40001")

Row = tuple[str, str, float, str, float | None, str | None]  # user, item, timestamp, kind, rating, key
Block = Sequence[Sequence[Any]]  # of (id, *row)
T = TypeVar("T")


class EventStoreError(RuntimeError):
    """The store could not do it now: disk full, server away, closed. Nothing was acknowledged."""


class EventStoreBusy(EventStoreError):
    """Too much is waiting to be written already; the client should come back later."""


@dataclass(frozen=True)
class Facts:
    """What an export must know of all rows before it writes the first."""

    rows: int
    rated: int
    users: int
    items: int
    integer_users: bool
    integer_items: bool


class Backend(Protocol):
    """What ``EventStore`` needs of a database; ``name`` is for messages, never with a password."""

    name: str
    inline: bool

    def write(self, batch: Sequence[Sequence[Row]]) -> list[int]:
        """Commit all durably in one transaction; return how many rows of each part were new."""

    def items_of(self, user_id: str, limit: int) -> list[str]:
        """Return the newest items of a user, oldest first."""

    def count(self) -> int:
        """Return the number of events."""

    def reading(self) -> AbstractContextManager[tuple[Facts, Iterator[Block]]]:
        """Give one state of the store: its facts, and its rows in blocks, in the order they were stored."""

    def close(self) -> None:
        """Close all connections."""


def open_backend(url: str, *, create: bool) -> Backend:
    """Open the database of a URL or the file of a path; UserError if it cannot be used, or is not there to be read."""
    scheme, separator, rest = url.partition("://")
    if "\0" in url:
        raise UserError("events: the path or URL holds NUL")
    if not separator and not url.startswith(("sqlite:", "postgres:", "postgresql:", "postgresql+psycopg:")):
        return Sqlite(url, create)
    if separator and scheme == "sqlite":
        if not rest.startswith("/") or rest in ("/", "/:memory:"):
            raise UserError("events: a SQLite URL names a file, as in sqlite:///events.db or sqlite:////var/events.db")
        return Sqlite(rest[1:], create)
    if separator and scheme in ("postgres", "postgresql", "postgresql+psycopg"):
        return Postgres(rest, create)
    raise UserError("events: wanted a file, sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE")


def one_line(error: BaseException | str) -> str:
    """Return the message of an error as one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


class Sqlite:
    """A file in WAL mode: readers never wait for the writer; one process writes at a time, the others queue up."""

    inline = True
    _COLUMNS = "user_id, item_id, timestamp, kind, rating, event_key"
    _INSERT = f"INSERT INTO kd_events ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
    _ITEMS = "SELECT item_id FROM kd_events WHERE user_id = ? ORDER BY id DESC LIMIT ?"
    _BLOCK = f"SELECT id, {_COLUMNS} FROM kd_events WHERE id > ? AND id <= ? ORDER BY id LIMIT ?"
    _SCHEMA = (
        "CREATE TABLE kd_events (id INTEGER PRIMARY KEY, user_id TEXT NOT NULL, item_id TEXT NOT NULL,"
        " timestamp REAL NOT NULL, kind TEXT NOT NULL, rating REAL, event_key TEXT)",
        # with the item in it, a user's history is read from the index alone
        "CREATE INDEX kd_events_user ON kd_events (user_id, id, item_id)",
        "CREATE UNIQUE INDEX kd_events_key ON kd_events (user_id, event_key) WHERE event_key IS NOT NULL",
        f"PRAGMA application_id = {_APPLICATION}",
        f"PRAGMA user_version = {_VERSION}",
    )

    def __init__(self, path: str, create: bool) -> None:
        self.name = path
        self._path = os.path.abspath(os.path.expanduser(path))
        self._threads = threading.local()
        self._connections: list[sqlite3.Connection] = []
        if os.path.isdir(self._path):
            raise UserError(f"{path}: is a folder, wanted a file such as {os.path.join(path, 'events.db')}")
        if not create and not os.path.exists(self._path):
            raise UserError(f"{path}: no such file")
        try:
            if create:
                os.makedirs(os.path.dirname(self._path), exist_ok=True)
            self._writer = self._connect("rwc" if create else "rw", 0.0)
            _patiently(partial(self._prepare, create))
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise UserError(f"{path}: cannot be used as an event store: {one_line(error)}") from None
        except UserError:
            self.close()
            raise

    def _connect(self, mode: str, patience: float) -> sqlite3.Connection:
        uri = f"file:{quote(self._path)}?mode={mode}"
        connection = sqlite3.connect(uri, patience, uri=True, isolation_level=None, check_same_thread=False)
        self._connections.append(connection)
        return connection

    def _prepare(self, create: bool) -> None:
        """Make the schema unless it is there; of processes that start together one does, the others find it."""
        run = self._writer.execute
        with self._transaction("DEFERRED"):  # all that it looks at is of one moment
            empty = self._is_empty()
        if empty and not create:
            raise UserError(f"{self.name}: holds no events")
        if not create:
            return
        mode = run("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise UserError(f"{self.name}: SQLite cannot keep a write-ahead log there (a network file system?)")
        run("PRAGMA synchronous = FULL")  # flush at every commit: what is acknowledged survives a power cut
        if empty:
            with self._transaction():
                if self._is_empty():
                    for statement in self._SCHEMA:
                        run(statement)

    def _is_empty(self) -> bool:
        """Return whether the file is a database without anything in it; UserError if it is none of this version."""
        read = [f"PRAGMA {name}" for name in ("application_id", "user_version")]
        application, version = (self._writer.execute(each).fetchone()[0] for each in read)
        if application != _APPLICATION:
            if application or version or self._writer.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
                raise UserError(f"{self.name}: is a database of something else, not an event store")
            return True
        if version != _VERSION:
            raise UserError(f"{self.name}: has events of version {version}, this release reads version {_VERSION}")
        return False

    @contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[None]:
        _patiently(partial(self._writer.execute, f"BEGIN {kind}"))
        try:
            yield
            self._writer.execute("COMMIT")
        finally:
            if self._writer.in_transaction:
                with suppress(sqlite3.Error):
                    self._writer.execute("ROLLBACK")

    def write(self, batch: Sequence[Sequence[Row]]) -> list[int]:
        """Commit durably in one transaction, after those of other processes."""
        stored = []
        try:
            with self._transaction():
                for rows in batch:
                    before = self._writer.total_changes
                    self._writer.executemany(self._INSERT, rows)
                    stored.append(self._writer.total_changes - before)
        except sqlite3.Error as error:
            raise EventStoreError(f"{self.name}: {one_line(error)}") from None
        return stored

    def _reader(self) -> sqlite3.Connection:
        try:
            connection: sqlite3.Connection = self._threads.reader
        except AttributeError:
            connection = self._threads.reader = self._connect("rw", _READ_SECONDS)
        return connection

    def items_of(self, user_id: str, limit: int) -> list[str]:
        """Return the newest items of a user, oldest first."""
        try:
            rows = self._reader().execute(self._ITEMS, (user_id, max(limit, 0))).fetchall()
        except UnicodeEncodeError:  # half a surrogate pair: no id that was ever stored
            return []
        except sqlite3.Error as error:
            raise EventStoreError(f"{self.name}: {one_line(error)}") from None
        rows.reverse()
        return [item for (item,) in rows]

    def count(self) -> int:
        """Return the number of events."""
        try:
            return int(self._reader().execute("SELECT COUNT(*) FROM kd_events").fetchone()[0])
        except sqlite3.Error as error:
            raise EventStoreError(f"{self.name}: {one_line(error)}") from None

    @contextmanager
    def reading(self) -> Iterator[tuple[Facts, Iterator[Block]]]:
        """Give one state of the store, by short reads."""
        # ids only grow, so that short reads up to the last id are one state; one long read would keep the log growing
        try:
            run = self._reader().execute
            last = run("SELECT COALESCE(MAX(id), 0) FROM kd_events").fetchone()
            odd = (
                "SELECT NOT EXISTS(SELECT 1 FROM kd_events WHERE id <= ? AND CAST(CAST({0} AS INTEGER) AS TEXT) <> {0})"
            )
            rows, rated = run("SELECT COUNT(*), COUNT(rating) FROM kd_events WHERE id <= ?", last).fetchone()
            users, items = (
                run(f"SELECT COUNT(DISTINCT {each}) FROM kd_events WHERE id <= ?", last).fetchone()[0]
                for each in ("user_id", "item_id")
            )
            plain = [bool(run(odd.format(each), last).fetchone()[0]) for each in ("user_id", "item_id")]
            yield Facts(rows, rated, users, items, *plain), self._blocks(last[0])
        except sqlite3.Error as error:
            raise UserError(f"{self.name}: cannot be read: {one_line(error)}") from None

    def _blocks(self, last: int) -> Iterator[Block]:
        first = 0
        while block := self._reader().execute(self._BLOCK, (first, last, BLOCK_ROWS)).fetchall():
            first = block[-1][0]
            yield block

    def close(self) -> None:
        """Close all connections."""
        for connection in self._connections:
            connection.close()


def _patiently(step: Callable[[], T]) -> T:
    """Do it, again and again for a while if another process has the SQLite file; not SQLite's own, slower waiting."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            return step()
        except sqlite3.OperationalError as error:
            held = error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
            if not held or time.monotonic() > deadline:
                raise
        time.sleep(random.uniform(0.0002, 0.001))


class Postgres:
    """A database on a server, through a pool that notices when the server was restarted."""

    inline = False

    def __init__(self, address: str, create: bool) -> None:
        try:
            import psycopg
            import sqlalchemy as sa
            from sqlalchemy.dialects import postgresql
        except ImportError as error:
            raise UserError(f"events: PostgreSQL needs SQLAlchemy and psycopg ({error})") from None
        self._sa = sa
        self._failures = (sa.exc.SQLAlchemyError, psycopg.Error)
        url = _parsed(address)
        given = [url.password, *(value for key, value in url.query.items() if "password" in key)]
        self._secrets = [str(each) for each in given if each]
        self.name = f"postgresql://{url.host or 'localhost'}{f':{url.port}' if url.port else ''}/{url.database or ''}"
        patience = {"connect_timeout": _CONNECT_SECONDS, "tcp_user_timeout": 1000 * _STATEMENT_SECONDS}
        self._engine = sa.create_engine(
            url,
            pool_pre_ping=True,
            pool_size=READERS + 1,
            pool_timeout=_CONNECT_SECONDS,
            hide_parameters=True,
            connect_args={name: value for name, value in patience.items() if name not in url.query},
        )
        # without a transaction around it, a read is two trips to the server shorter
        self._one_statement = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        sa.event.listen(self._engine, "connect", _on_connect)
        self._events, self._schema = _tables(sa)
        insert = postgresql.insert(self._events).on_conflict_do_nothing()
        self._insert = insert.returning(self._events.c.user_id, self._events.c.event_key)
        try:
            self._prepare(create)
        except UserError:
            self.close()
            raise
        except self._failures as error:
            self.close()
            raise UserError(f"{self.name}: cannot be used as an event store: {self._cause(error)}") from None

    def _prepare(self, create: bool) -> None:
        sa = self._sa
        with self._engine.begin() as connection:
            # released with the transaction: the next process finds all of the schema, or makes it itself
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
            there = [sa.inspect(connection).has_table(each.name) for each in (self._events, self._schema)]
            if there == [True, False]:
                raise UserError(f"{self.name}: has a table {self._events.name} of something else")
            if not all(there):
                if not create:
                    raise UserError(f"{self.name}: holds no events")
                self._events.metadata.create_all(connection)
                connection.execute(self._schema.insert().values(version=_VERSION))
            version = connection.execute(sa.select(sa.func.max(self._schema.c.version))).scalar()
            if version != _VERSION:
                raise UserError(f"{self.name}: has events of version {version}, this release reads version {_VERSION}")

    def _cause(self, error: BaseException) -> str:
        text = str(getattr(error, "orig", None) or error)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return one_line(text)

    @contextmanager
    def _begin(self, engine: Any = None) -> Iterator[Any]:
        try:
            with (engine or self._engine).begin() as connection:
                yield connection
        except self._failures as error:
            raise EventStoreError(f"{self.name}: {self._cause(error)}") from error

    def write(self, batch: Sequence[Sequence[Row]]) -> list[int]:
        """Commit; a deadlock (two processes, the same keys in another order) is tried again."""
        names = [each.name for each in self._events.c][1:]
        values = [dict(zip(names, row, strict=True)) for rows in batch for row in rows]
        for attempt in range(6):
            try:
                with self._begin() as connection:
                    stored = {tuple(each) for each in connection.execute(self._insert, values)}
                break
            except EventStoreError as error:
                code = getattr(getattr(error.__cause__, "orig", None), "sqlstate", None)
                if code not in _DEADLOCKS or attempt == 5:
                    raise EventStoreError(str(error)) from None
        return [sum(_is_new(row, stored) for row in rows) for rows in batch]

    def items_of(self, user_id: str, limit: int) -> list[str]:
        """Return the newest items of a user, oldest first."""
        if "\0" in user_id or any("\ud800" <= each <= "\udfff" for each in user_id):
            return []  # no id that was ever stored
        table = self._events.c
        query = self._sa.select(table.item_id).where(table.user_id == user_id)
        with self._begin(self._one_statement) as connection:
            rows = connection.execute(query.order_by(table.id.desc()).limit(max(limit, 0))).all()
        return [item for (item,) in reversed(rows)]

    def count(self) -> int:
        """Return the number of events."""
        with self._begin() as connection:
            return int(connection.execute(self._sa.select(self._sa.func.count(self._events.c.id))).scalar())

    @contextmanager
    def reading(self) -> Iterator[tuple[Facts, Iterator[Block]]]:
        """Give one state of the store, in one transaction: a server lets others write meanwhile."""
        sa, table = self._sa, self._events.c
        try:
            with self._engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
                connection.execute(sa.text("SET LOCAL statement_timeout = 0"))
                distinct = [sa.func.count(each.distinct()) for each in (table.user_id, table.item_id)]
                plain = [
                    sa.func.coalesce(sa.func.bool_and(_is_integer(sa, each)), False)
                    for each in (table.user_id, table.item_id)
                ]
                query = sa.select(sa.func.count(), sa.func.count(table.rating), *distinct, *plain).select_from(
                    self._events
                )
                facts = Facts(*connection.execute(query).one())
                rows = sa.select(self._events).order_by(table.id).execution_options(yield_per=BLOCK_ROWS)
                yield facts, connection.execute(rows).partitions()
        except self._failures as error:
            raise UserError(f"{self.name}: cannot be read: {self._cause(error)}") from None

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def _parsed(address: str) -> Any:
    """Return the SQLAlchemy URL; UserError, without the text, where part of a password could pass for a host."""
    import sqlalchemy as sa

    userinfo, at, _ = address.rpartition("@")
    hint = "wanted postgresql://USER:PASSWORD@HOST:PORT/DATABASE, in a password %40 for @, %2F for / and so on"
    if at and (set(userinfo) & set("@/?#[] ") or userinfo.count(":") > 1):
        raise UserError(f"events: not a database URL; {hint}")
    try:
        return sa.make_url(f"postgresql+psycopg://{address}")
    except (sa.exc.ArgumentError, ValueError):
        raise UserError(f"events: not a database URL; {hint}") from None


def _on_connect(connection: Any, _record: Any) -> None:
    """Bound how long a statement takes, and have a commit wait for the disk whatever the server's default."""
    settings = {"statement_timeout": f"{_STATEMENT_SECONDS}s", "idle_in_transaction_session_timeout": "0"}
    with connection.cursor() as cursor:
        for name, value in settings.items():
            cursor.execute("SELECT set_config(%s, %s, false)", (name, value))
        cursor.execute(
            "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
        )
    connection.commit()


def _tables(sa: Any) -> tuple[Any, Any]:
    metadata = sa.MetaData()
    text = sa.Text(collation="C")  # ids are compared by their bytes, as everywhere else
    events = sa.Table(
        "kd_events",
        metadata,
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("user_id", text, nullable=False),
        sa.Column("item_id", text, nullable=False),
        sa.Column("timestamp", sa.Double, nullable=False),
        sa.Column("kind", text, nullable=False),
        sa.Column("rating", sa.Double),
        sa.Column("event_key", text),
    )
    sa.Index("kd_events_user", events.c.user_id, events.c.id)
    keyed = events.c.event_key.is_not(None)
    sa.Index("kd_events_key", events.c.user_id, events.c.event_key, unique=True, postgresql_where=keyed)
    return events, sa.Table("kd_events_schema", metadata, sa.Column("version", sa.Integer, nullable=False))


def _is_new(row: Row, stored: set[tuple[Any, ...]]) -> bool:
    """Return whether the row was stored; of rows with one key, only the first was."""
    key = (row[0], row[5])
    if row[5] is not None and key not in stored:
        return False
    if row[5] is not None:
        stored.remove(key)
    return True


def _is_integer(sa: Any, column: Any) -> Any:
    """Return the condition str(int(id)) == id, within 64 bits."""
    number = sa.case((column.regexp_match("^(0|-?[1-9][0-9]{0,18})$"), sa.cast(column, sa.Numeric)))
    return sa.func.coalesce(number.between(-(2**63), 2**63 - 1), False)
