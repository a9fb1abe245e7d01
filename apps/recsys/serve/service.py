"""What the endpoints do: recommend, store events, reload."""

from __future__ import annotations

import asyncio
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from apps.recsys.events import Event, EventStore, EventStoreBusy, EventStoreError
from apps.recsys.serve.batching import Batcher
from apps.recsys.serve.guard import Guard
from apps.recsys.serve.metrics import Metrics
from apps.recsys.serve.model import Plan, ServedModel
from apps.recsys.serve.schema import (
    Batch,
    EventsRequest,
    RecommendRequest,
    Reloaded,
    ReloadRequest,
    ServiceError,
    Stored,
    decode_error,
    invalid,
)
from apps.recsys.serve.settings import ServeSettings
from apps.recsys.serve.shadow import Shadow
from apps.recsys.serve.workers import Crew
from kdcore.config import UserError

_log = logging.getLogger("kdsuite.serve")
_RELOAD_SECONDS = 600.0
_RECOMMEND = msgspec.json.Decoder(RecommendRequest | Batch)
_EVENTS = msgspec.json.Decoder(EventsRequest)
_RELOAD = msgspec.json.Decoder(ReloadRequest)


class Service:
    """The state of one worker: its model, its events, its place among the workers."""

    def __init__(
        self,
        settings: ServeSettings,
        model: ServedModel,
        metrics: Metrics,
        guard: Guard,
        crew: Crew,
        events: EventStore | None = None,
        shadow: Shadow | None = None,
    ) -> None:
        """Take what was opened; the service closes it."""
        self.settings, self.model, self.metrics, self.guard, self.crew = settings, model, metrics, guard, crew
        self.events, self.shadow = events, shadow
        self.batcher = Batcher(settings.threads)
        self.ready = True
        # a reload gives the model to whoever wants to know
        self.on_model = lambda model: None
        self._reloading = asyncio.Lock()
        self._tail = b""
        self._use(model)

    def _use(self, model: ServedModel) -> None:
        self.model = model
        self._tail = b',"model_version":"%b","request_id":"' % model.version.encode()
        self.metrics.model(model.version, model.about["label"], model.index_kind)
        self.on_model(model)

    # -- recommend ---------------------------------------------------------------------------------------------------

    async def recommend(self, body: bytes, request_id: str, key: bytes | None) -> bytes:
        """Answer one request, or a list of them."""
        request = _decoded(_RECOMMEND, body)
        model, tail = self.model, self._tail  # a reload meanwhile changes neither
        if isinstance(request, list):
            results = await self._many(model, request)
            return b'{"results":' + results + tail + request_id.encode("ascii") + b'"}'
        stored = await self.stored(request.user_id)
        plan = model.plan(request, stored)
        if self.batcher.inline(model, plan):
            items = model.encode(plan, *model.answer(plan))
        else:
            items = await self._in_time(self.batcher.encoded(model, plan))
        return self._recommended(request, stored, plan, items, tail, request_id)

    def at_once(self, body: bytes, request_id: str) -> bytes | None:
        """Return the answer to one request, None where it has to be waited for, is a list, or is an error."""
        try:
            request = _RECOMMEND.decode(body)
            if isinstance(request, list):
                return None
            stored: Sequence[str] = ()
            if self.events is not None and request.user_id is not None:
                if not self.events.inline:
                    return None
                stored = self.events.items_of(str(request.user_id))
            model = self.model
            plan = model.plan(request, stored)
        except (msgspec.DecodeError, RecursionError, ValueError, ServiceError, UserError, EventStoreError):
            return None  # the long way says what is wrong
        if not self.batcher.inline(model, plan):
            return None
        items = model.encode(plan, *model.answer(plan))
        return self._recommended(request, stored, plan, items, self._tail, request_id)

    def _recommended(
        self, request: RecommendRequest, stored: Sequence[str], plan: Plan, items: bytes, tail: bytes, request_id: str
    ) -> bytes:
        """Return the whole answer to one request; the shadow, if there is one, is asked the same."""
        if self.shadow is not None:
            self.shadow.offer(request, stored, items)
        return b'{"items":%b,"source":"%b"%b%b"}' % (items, plan.source.encode(), tail, request_id.encode("ascii"))

    async def _many(self, model: ServedModel, requests: list[RecommendRequest]) -> bytes:
        """Return the JSON list of the answers to a client's batch; one that fails does not fail the others."""
        plans: list[Plan | ServiceError] = []
        for request in requests:
            try:
                plans.append(model.plan(request, await self.stored(request.user_id)))
            except ServiceError as error:
                plans.append(error)
        good = [plan for plan in plans if isinstance(plan, Plan)]
        found = iter(await self._in_time(self.batcher.run(model, good)) if good else [])
        parts = []
        for plan in plans:
            if isinstance(plan, ServiceError):
                parts.append(b'{"error":' + msgspec.json.encode(plan.problem()) + b"}")
            else:
                parts.append(b'{"items":' + next(found) + b',"source":"' + plan.source.encode() + b'"}')
        return b"[" + b",".join(parts) + b"]"

    async def stored(self, user_id: str | int | None) -> Sequence[str]:
        """Return the items of a user's stored events, oldest first."""
        if self.events is None or user_id is None:
            return ()
        user = str(user_id)
        try:
            if self.events.inline:
                return self.events.items_of(user)
            return await self._in_time(self.events.items_of_async(user))
        except EventStoreError as error:
            raise ServiceError(503, "events_unavailable", str(error), headers={"retry-after": "1"}) from None
        except UserError:  # an id that no event can have
            return ()

    async def _in_time(self, work):  # type: ignore[no-untyped-def]
        """Await something; ServiceError 503 where it takes too long."""
        try:
            async with asyncio.timeout(self.settings.answer_timeout):
                return await work
        except TimeoutError:
            raise ServiceError(503, "timeout", "no answer in time", headers={"retry-after": "1"}) from None

    # -- events ------------------------------------------------------------------------------------------------------

    async def store(self, body: bytes, request_id: str, key: bytes | None) -> bytes:
        """Store events; the answer comes when they are on disk."""
        request = _decoded(_EVENTS, body)
        if self.events is None:
            raise ServiceError(403, "forbidden", "this service was started with --events none")
        now = time.time()
        events = [
            Event(
                user_id=str(each.user_id),
                item_id=str(each.item_id),
                timestamp=now if each.timestamp is None else each.timestamp,
                kind=each.kind,
                rating=each.rating,
                event_id=each.event_id,
            )
            for each in request.events
        ]
        try:
            new = await self.events.add(events)
        except UserError as error:
            raise invalid(str(error), "events") from None
        except EventStoreBusy as error:
            raise ServiceError(503, "overloaded", str(error), headers={"retry-after": "1"}) from None
        except EventStoreError as error:
            raise ServiceError(503, "events_unavailable", str(error), headers={"retry-after": "1"}) from None
        self.metrics.count("kd_events_stored", by=new)
        return msgspec.json.encode(Stored(len(events), new, self.model.version, request_id))

    # -- reload ------------------------------------------------------------------------------------------------------

    async def reload(self, body: bytes, request_id: str, key: bytes | None) -> bytes:
        """Read the model folder again and answer when every worker serves it; the old model answers until then."""
        self.guard.admin(key)
        _decoded(_RELOAD, body or b"{}")
        if self._reloading.locked():
            raise ServiceError(409, "conflict", "a reload is under way", headers={"retry-after": "1"})
        async with self._reloading:
            previous = self.model.version
            try:
                await self._prepare()
                model = await asyncio.to_thread(self.load)
            except UserError as error:
                self.metrics.count("kd_reloads", "refused")
                raise ServiceError(422, "bad_model", f"the old model goes on: {error}") from None
            number = self.crew.call()
            self.crew.changed()
            self._use(model)
            self.crew.report(number, model.version)
            self.metrics.count("kd_reloads", "done")
            try:
                said = await self.crew.follow(number, _RELOAD_SECONDS)
            except TimeoutError:
                raise ServiceError(503, "timeout", "not every worker has reloaded in time") from None
            failed = next((each["error"] for each in said if each["error"]), None)
            if failed:
                raise ServiceError(503, "partly_reloaded", f"a worker goes on with the old model: {failed}")
        return msgspec.json.encode(Reloaded(len(said), previous, model.version, request_id))

    async def _prepare(self) -> None:
        """Check, prepare and index the new model in another process: this one has requests to answer.

        A file that brings its reader down takes that process with it, not this one.
        """
        words = ["--model", self.settings.model, "--index", self.settings.index, "--recall", str(self.settings.recall)]
        words += ["--cache", self.settings.cache] if self.settings.cache else []
        nice = [found, "-n", "10"] if (found := shutil.which("nice")) else []  # it must not hold up what is answered
        process = await asyncio.create_subprocess_exec(
            *(*nice, sys.executable, "-m", "apps.cli", "recsys", "serve", "--prepare-only", *words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            _, said = await process.communicate()
        except asyncio.CancelledError:
            process.kill()
            raise
        if process.returncode:
            lines = said.decode(errors="replace").strip().splitlines()
            reason = lines[-1].removeprefix("kd: error: ") if lines else f"exit code {process.returncode}"
            raise UserError(reason[:500])

    def load(self) -> ServedModel:
        """Return the model that the folder holds now."""
        settings = self.settings
        return ServedModel(
            Path(settings.model), index=settings.index, cache=settings.cache_folder, recall=settings.recall
        )

    async def keep_up(self, seconds: float = 0.1) -> None:
        """Reload, for ever, whenever another worker was asked to; leave what was counted where the others find it."""
        while True:
            await asyncio.sleep(seconds)
            if self.settings.workers > 1:
                try:
                    self.metrics.save()
                except OSError as error:  # a full disk must not end the loop that reloads
                    _log.warning("metrics of this worker cannot be shared: %s", error)
            if not self._reloading.locked() and self.crew.changed():
                await self._reload_with_the_others()

    async def _reload_with_the_others(self) -> None:
        number, refused = self.crew.target(), None
        try:
            self._use(await asyncio.to_thread(self.load))
        except Exception as error:  # whatever it is, this worker goes on with the model it has, and says so
            _log.warning("reload %d refused: %s", number, error, exc_info=not isinstance(error, UserError))
            refused = str(error)
        self.crew.report(number, self.model.version, refused)

    # -- end ---------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Finish what was begun."""
        self.ready = False
        if self.shadow is not None:
            await asyncio.to_thread(self.shadow.close)
        await asyncio.to_thread(self.batcher.close)
        if self.events is not None:
            await self.events.aclose()
        self.metrics.leave()
        self.crew.leave()


def _decoded(decoder: Any, body: bytes) -> Any:
    """Return a body as the request it should be; ServiceError where it is not."""
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise decode_error(error) from None
