"""Interactions that a server took in, kept durably: SQLite beside it, or PostgreSQL by URL; exported as Parquet.

``add`` returns when its events are committed and flushed to disk. Calls that wait at the same time share one
transaction (group commit), so the cost of a flush is divided among them. What any process committed is seen by every
other one at once. A store belongs to the process that opened it: open it after a fork, not before.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.recsys.event_backends import (
    READERS,
    Block,
    EventStoreBusy,
    EventStoreError,
    Facts,
    Row,
    one_line,
    open_backend,
)
from kdcore.config import UserError
from kdcore.run import atomic_path

__all__ = ["MAX_CHARACTERS", "Event", "EventStore", "EventStoreBusy", "EventStoreError", "export_events"]

MAX_CHARACTERS = 512  # of an id or kind; PostgreSQL's index holds no more than 2,704 bytes of a row
_LARGEST_RATING = 3.4028234663852886e38  # of 32 bits, as in the canonical log
_BATCH_EVENTS = 2_000


@dataclass(frozen=True, slots=True)
class Event:
    """One interaction; ``timestamp`` in seconds since the epoch.

    ``event_id`` is the client's key for this event: of several events of a user with the same one, the first is stored.
    """

    user_id: str
    item_id: str
    timestamp: float
    kind: str = "interaction"
    rating: float | None = None
    event_id: str | None = None


def _row(event: Event) -> Row:
    """Return the event as it is stored; UserError with the name of a field no store or log could hold."""
    for name, text in (("user_id", event.user_id), ("item_id", event.item_id), ("kind", event.kind)):
        _check_text(name, text)
    timestamp = _finite("timestamp", event.timestamp)
    rating = None if event.rating is None else _finite("rating", event.rating)
    if rating is not None and abs(rating) > _LARGEST_RATING:
        raise UserError(f"rating: got {rating:g}, wanted a number of 32 bits")
    key = event.event_id
    if key is not None:
        _check_text("event_id", key)
        if len(key) > 64:  # user and key share an index, see MAX_CHARACTERS
            key = f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"
    return event.user_id, event.item_id, timestamp, event.kind, rating, key


def _check_text(name: str, text: str) -> None:
    if not isinstance(text, str):
        raise UserError(f"{name}: got {type(text).__name__}, wanted text")
    if not 1 <= len(text) <= MAX_CHARACTERS:
        raise UserError(f"{name}: has {len(text)} characters, wanted 1 to {MAX_CHARACTERS}")
    if not _storable(text):
        raise UserError(f"{name}: holds NUL or half a surrogate pair, wanted Unicode text")


def _storable(text: str) -> bool:
    if "\0" in text:
        return False
    return text.isascii() or not any("\ud800" <= each <= "\udfff" for each in text)


def _finite(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name}: got {type(value).__name__}, wanted a number")
    with suppress(OverflowError):
        if math.isfinite(number := float(value)):
            return number
    raise UserError(f"{name}: wanted a finite number")


class _Waiting:
    """One call of ``add`` and the future that its caller awaits."""

    __slots__ = ("future", "loop", "rows")

    def __init__(self, rows: list[Row], loop: asyncio.AbstractEventLoop) -> None:
        self.rows, self.loop, self.future = rows, loop, loop.create_future()

    def resolve(self, outcome: int | EventStoreError) -> None:
        if self.future.done():  # the caller was cancelled: its events are stored all the same
            return
        if isinstance(outcome, int):
            self.future.set_result(outcome)
        else:
            self.future.set_exception(outcome)


class EventStore:
    """Events of users, in the SQLite file or PostgreSQL database of ``url``; made if it is not there yet.

    ``url`` is ``sqlite:///events.db`` (``sqlite:////var/events.db`` where the path is absolute), a plain path, or
    ``postgresql://user:password@host/database``. ``capacity`` is the number of events that may wait to be written.

    Raises:
        UserError: a bad URL, a file that cannot be written or is no event store, a server that refuses.
    """

    def __init__(self, url: str, *, capacity: int = 20_000) -> None:
        self._backend = open_backend(url, create=True)
        self.inline = self._backend.inline  # whether items_of is quick enough to be called on an event loop
        self._capacity = capacity
        self._queue: deque[_Waiting] = deque()
        self._waiting_events = 0
        self._ready = threading.Condition()
        self._closed = False
        self._readers = None if self.inline else ThreadPoolExecutor(READERS, "events-read")
        self._writer = threading.Thread(target=self._write_forever, name="events-write", daemon=True)
        self._writer.start()

    @property
    def waiting(self) -> int:
        """Number of events accepted and not yet committed."""
        return self._waiting_events

    async def add(self, events: Sequence[Event]) -> int:
        """Store events and return when they are committed durably: all of them, or none if it raises.

        Returns how many are new: an ``event_id`` that the user sent before is acknowledged, not stored again. A caller
        that is cancelled has its events stored.

        Raises:
            UserError: an event that cannot be stored, by the name of the field; nothing of this call is.
            EventStoreBusy: too much is waiting.
            EventStoreError: the database failed, or the store is closed.
        """
        rows = [_row(event) for event in events]
        if not rows:
            return 0
        waiting = _Waiting(rows, asyncio.get_running_loop())
        with self._ready:
            if self._closed:
                raise EventStoreError(f"{self._backend.name}: the event store is closed")
            if self._waiting_events and self._waiting_events + len(rows) > self._capacity:
                raise EventStoreBusy(f"{self._backend.name}: {self._waiting_events} events wait to be written already")
            self._queue.append(waiting)
            self._waiting_events += len(rows)
            self._ready.notify()
        return int(await waiting.future)

    def items_of(self, user_id: str, limit: int = 1000) -> list[str]:
        """Return the newest ``limit`` items of a user, oldest first, repeats kept, as any process committed them."""
        return self._backend.items_of(user_id, limit)

    async def items_of_async(self, user_id: str, limit: int = 1000) -> list[str]:
        """Return what ``items_of`` does, in a thread where it has to wait for a server."""
        if self._readers is None:
            return self._backend.items_of(user_id, limit)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, self._backend.items_of, user_id, limit)

    def count(self) -> int:
        """Return the number of events; it looks at all of them."""
        return self._backend.count()

    def close(self) -> None:
        """Write what was accepted, then close; safe to call twice."""
        with self._ready:
            self._closed = True
            self._ready.notify()
        self._writer.join()
        if self._readers is not None:
            self._readers.shutdown()
        self._backend.close()

    async def aclose(self) -> None:
        """Close without holding up the event loop."""
        await asyncio.to_thread(self.close)

    def _write_forever(self) -> None:
        while batch := self._take():
            outcomes: Sequence[int | EventStoreError]
            try:
                outcomes = self._backend.write([each.rows for each in batch])
            except EventStoreError as error:
                outcomes = [error] * len(batch)
            except Exception as error:  # whatever it is, this thread has to go on
                outcomes = [EventStoreError(f"{self._backend.name}: {one_line(error)}")] * len(batch)
            with self._ready:
                self._waiting_events -= sum(len(each.rows) for each in batch)
            for loop in {each.loop for each in batch}:
                done = [(each, outcome) for each, outcome in zip(batch, outcomes, strict=True) if each.loop is loop]
                with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    loop.call_soon_threadsafe(_resolve, done)

    def _take(self) -> list[_Waiting]:
        """Return all that waits, up to a bound, to be written together; nothing when the store is closed and empty."""
        with self._ready:
            while not self._queue and not self._closed:
                self._ready.wait()
            batch: list[_Waiting] = []
            events = 0
            while self._queue and (not batch or events + len(self._queue[0].rows) <= _BATCH_EVENTS):
                batch.append(self._queue.popleft())
                events += len(batch[-1].rows)
            return batch


def _resolve(done: Sequence[tuple[_Waiting, int | EventStoreError]]) -> None:
    for waiting, outcome in done:
        waiting.resolve(outcome)


def export_events(url: str, out: Path, *, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Write all events as a canonical log, in the order they were stored; return what was written.

    Columns: ``user_id``, ``item_id`` (int64 where every id of the column is a plain integer, else text),
    ``timestamp`` in seconds, ``event`` the kind, and ``rating`` if every event has one. Where only some have, the
    column is named ``given_rating``, with nulls: a log with ratings has one in every row. Repeated pairs are kept.
    Memory does not grow with the number of events; a server may go on adding, those events are left out.

    Raises:
        UserError: no events, a store that cannot be read, an ``out`` that cannot be written.
    """
    import pyarrow.parquet as pq

    if out.suffix != ".parquet" or out.is_dir():
        raise UserError(f"--out: got {out}, wanted a file such as {out.with_suffix('') / 'interactions.parquet'}")
    backend = open_backend(url, create=False)
    try:
        with backend.reading() as (facts, blocks):
            if not facts.rows:
                raise UserError(f"{backend.name}: holds no events")
            schema = _schema(facts)
            with atomic_path(out) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
                done = 0
                for block in blocks:
                    writer.write_table(_table(block, schema))
                    done += len(block)
                    if progress is not None:
                        progress(f"exporting events: {done}/{facts.rows}")
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or one_line(error)}") from None
    finally:
        backend.close()
    return {
        "rows": facts.rows,
        "users": facts.users,
        "items": facts.items,
        "with_rating": facts.rated,
        "columns": {name: str(kind) for name, kind in zip(schema.names, schema.types, strict=True)},
        "out": str(out),
    }


def _schema(facts: Facts) -> Any:
    import pyarrow as pa

    fields = [
        ("user_id", pa.int64() if facts.integer_users else pa.string()),
        ("item_id", pa.int64() if facts.integer_items else pa.string()),
        ("timestamp", pa.float64()),
        ("event", pa.string()),
    ]
    if facts.rated:
        fields.append(("rating" if facts.rated == facts.rows else "given_rating", pa.float32()))
    return pa.schema(fields)


def _table(block: Block, schema: Any) -> Any:
    import pyarrow as pa

    _, users, items, times, kinds, ratings, _ = zip(*block, strict=True)
    texts: Iterable[Any] = (pa.array(each, pa.string()) for each in (users, items))
    columns = [*texts, pa.array(times, pa.float64()), pa.array(kinds, pa.string()), pa.array(ratings, pa.float32())]
    return pa.table([each.cast(kind) for each, kind in zip(columns, schema.types, strict=False)], schema=schema)
