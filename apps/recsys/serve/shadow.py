"""A second model beside the one that answers: it gets the same requests, is compared, and never answers."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

import faiss
import msgspec

from apps.recsys.serve.metrics import Metrics
from apps.recsys.serve.model import ServedModel
from apps.recsys.serve.schema import RecommendRequest, ServiceError

_WAITING = 256
# request, the user's stored items, the JSON list that was answered
_Asked = tuple[RecommendRequest, Sequence[str], bytes]


class Shadow:
    """Compares in a thread of its own; what it has no time for is counted and let go."""

    def __init__(self, model: ServedModel, metrics: Metrics) -> None:
        self.model, self._metrics = model, metrics
        self._queue: queue.Queue[_Asked | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._compare_forever, name="shadow", daemon=True)
        self._thread.start()

    def offer(self, request: RecommendRequest, stored: Sequence[str], answered: bytes) -> None:
        """Hand over a request and the items that were answered, as JSON."""
        try:
            self._queue.put_nowait((request, stored, answered))
        except queue.Full:
            self._metrics.count("kd_shadow_dropped")

    def close(self) -> None:
        """Stop; what waits is let go."""
        with suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        self._queue.put(None)
        self._thread.join()

    def _compare_forever(self) -> None:
        faiss.omp_set_num_threads(1)  # of this thread: the shadow must not take cores from what is answered
        ids = self.model.prepared.items.ids
        while (asked := self._queue.get()) is not None:
            request, stored, answered = asked
            started = time.perf_counter()
            try:
                plan = self.model.plan(request, stored)
                items = self.model.answer(plan)[1]
            except (ServiceError, ValueError):  # a user or an item that this model does not know
                self._metrics.count("kd_shadow_dropped")
                continue
            self._metrics.observe("kd_shadow_seconds", time.perf_counter() - started)
            theirs = {str(item["item_id"]).encode() for item in msgspec.json.decode(answered)}
            common = len({ids[item] for item in items.tolist()} & theirs)
            self._metrics.observe("kd_shadow_overlap", common / max(len(theirs), 1))
