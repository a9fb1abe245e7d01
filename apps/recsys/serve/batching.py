"""Many requests, one pass over the items: whatever arrives while a batch is computed is the next batch."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import faiss

from apps.recsys.serve.model import Plan, ServedModel
from apps.recsys.serve.schema import ServiceError

_MAX_BATCH, _MAX_WAITING = 64, 4096
# a plan that takes longer than this is computed in the thread: the event loop has others to talk to
_INLINE_SECONDS = 3e-4

_Waiting = tuple[ServedModel, Plan, asyncio.Future[bytes]]


class Batcher:
    """Answers plans in one thread, so that the event loop stays free, and in batches, so that a scan serves many."""

    def __init__(self, threads: int = 1) -> None:
        """Take the number of threads that a scan may use; OpenMP keeps it for each thread that starts one."""
        self._pool = ThreadPoolExecutor(1, "recommend", faiss.omp_set_num_threads, (threads,))
        self._waiting: list[_Waiting] = []
        self._busy = False

    @staticmethod
    def inline(model: ServedModel, plan: Plan) -> bool:
        """Return whether a plan is answered faster at once than by handing it to another thread."""
        if plan.to_encode or model.index is None:
            return False
        return plan.order is not None or model.index.query_seconds <= _INLINE_SECONDS

    async def encoded(self, model: ServedModel, plan: Plan) -> bytes:
        """Return the JSON of the items of a plan; ServiceError 503 if too many wait."""
        if len(self._waiting) >= _MAX_WAITING:
            raise ServiceError(503, "overloaded", "too many requests are waiting", headers={"retry-after": "1"})
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting.append((model, plan, future))
        if not self._busy:
            self._busy = True
            self._next()
        return await future

    async def run(self, model: ServedModel, plans: Sequence[Plan]) -> list[bytes]:
        """Return the JSON of the items of a client's own batch."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, _encoded, model, plans)

    def close(self) -> None:
        """Wait for what is being computed."""
        self._pool.shutdown()

    def _next(self) -> None:
        model = self._waiting[0][0]
        taken: list[_Waiting] = []
        left: list[_Waiting] = []
        for each in self._waiting:  # a reload may leave two models waiting
            (taken if each[0] is model and len(taken) < _MAX_BATCH else left).append(each)
        self._waiting = left
        loop = asyncio.get_running_loop()
        done = loop.run_in_executor(self._pool, _encoded, model, [plan for _, plan, _ in taken])
        done.add_done_callback(lambda done: self._finish(done, [future for _, _, future in taken]))

    def _finish(self, done: asyncio.Future[list[bytes]], futures: list[asyncio.Future[bytes]]) -> None:
        if self._waiting:
            self._next()
        else:
            self._busy = False
        error = done.exception()
        for place, future in enumerate(futures):
            if future.done():  # its client is gone
                continue
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(done.result()[place])


def _encoded(model: ServedModel, plans: Sequence[Plan]) -> list[bytes]:
    return [model.encode(plan, *found) for plan, found in zip(plans, model.answer_many(plans), strict=True)]
