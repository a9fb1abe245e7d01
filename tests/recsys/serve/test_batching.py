"""Requests that wait together are answered together, each with its own answer."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

from apps.recsys.serve import batching
from apps.recsys.serve.batching import Batcher
from apps.recsys.serve.model import ServedModel
from apps.recsys.serve.schema import RecommendRequest, ServiceError
from tests.recsys.serve.served import user_ids


@pytest.fixture(scope="module")
def served(model):
    return ServedModel(model)


def alone(served, request):
    plan = served.plan(request)
    return json.loads(served.encode(plan, *served.answer(plan)))


def test_what_arrives_while_a_batch_is_computed_is_the_next_one(served, monkeypatch):
    sizes, go = [], threading.Event()
    encoded = batching._encoded

    def slow(model, plans):
        sizes.append(len(plans))
        go.wait(10)
        return encoded(model, plans)

    monkeypatch.setattr(batching, "_encoded", slow)
    requests = [RecommendRequest(user_id=user, k=k) for k, user in enumerate(user_ids(40), start=1)]

    async def ask():
        batcher = Batcher()
        waiting = [asyncio.create_task(batcher.encoded(served, served.plan(each))) for each in requests]
        await asyncio.sleep(0.05)
        waiting[5].cancel()  # its client is gone
        go.set()
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        batcher.close()
        return answers

    answers = asyncio.run(ask())
    assert sizes == [1, 39]
    assert isinstance(answers.pop(5), asyncio.CancelledError)
    requests.pop(5)
    for request, answer in zip(requests, answers, strict=True):
        assert [each["item_id"] for each in json.loads(answer)] == [each["item_id"] for each in alone(served, request)]


def test_a_failure_reaches_those_who_wait_and_the_next_are_answered(served, monkeypatch):
    encoded, fail = batching._encoded, [True]

    def failing(model, plans):
        if fail.pop() if fail else False:
            raise ValueError("no")
        return encoded(model, plans)

    monkeypatch.setattr(batching, "_encoded", failing)

    async def ask():
        batcher, plan = Batcher(), served.plan(RecommendRequest(k=2))
        first = await asyncio.gather(batcher.encoded(served, plan), return_exceptions=True)
        second = await batcher.encoded(served, plan)
        batcher.close()
        return first[0], second

    first, second = asyncio.run(ask())
    assert isinstance(first, ValueError)
    assert len(json.loads(second)) == 2


def test_too_many_who_wait_are_turned_away(served, monkeypatch):
    monkeypatch.setattr(batching, "_MAX_WAITING", 3)

    async def ask():
        batcher, plan = Batcher(), served.plan(RecommendRequest(k=1))
        answers = await asyncio.gather(*(batcher.encoded(served, plan) for _ in range(6)), return_exceptions=True)
        batcher.close()
        return answers

    answers = asyncio.run(ask())
    turned_away = [each for each in answers if isinstance(each, ServiceError)]
    assert turned_away
    assert all(each.status == 503 for each in turned_away)
    assert all(len(json.loads(each)) == 1 for each in answers if isinstance(each, bytes))


def test_two_models_that_wait_are_not_mixed(served, shared_export):
    other = ServedModel(shared_export(seed=1))

    async def ask():
        batcher = Batcher()
        asked = [(model, RecommendRequest(user_id="104", k=5)) for model in (served, other) * 6]
        answers = await asyncio.gather(*(batcher.encoded(model, model.plan(each)) for model, each in asked))
        batcher.close()
        return asked, answers

    asked, answers = asyncio.run(ask())
    for (model, request), answer in zip(asked, answers, strict=True):
        assert [each["item_id"] for each in json.loads(answer)] == [each["item_id"] for each in alone(model, request)]
