"""The service as its clients meet it: a real server on loopback, real connections, well-behaved ones and others."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest

from apps.recsys.runtime import ExportedRecommender
from kdcore.run import read_json
from tests.recsys.serve.served import exported, running

KEY, OTHER, ADMIN = "k" * 20, "o" * 20, "a" * 24


@pytest.fixture(scope="module")
def server(model):
    with running(model) as served, httpx.Client(base_url=served.url, timeout=20) as client:
        served.client = client
        yield served


@pytest.fixture
def client(server):
    return server.client


def recommend(client, **asked):
    return client.post("/v1/recommend", json=asked)


def bearer(key):
    return {"authorization": f"Bearer {key}"}


# -- answers -----------------------------------------------------------------------------------------------------------


def test_the_served_answer_is_the_library_s(client, model):
    library = ExportedRecommender(model)
    for user in library.user_ids:
        answer = recommend(client, user_id=user, k=6).json()
        wanted = library.recommend(user, k=6)
        assert [item["item_id"] for item in answer["items"]] == [each.item_id for each in wanted]
        assert [item["score"] for item in answer["items"]] == pytest.approx([each.score for each in wanted], rel=1e-4)
        assert answer["source"] == "user"
        assert answer["model_version"] == library.model_version


def test_every_answer_has_a_request_id_and_takes_the_client_s(client):
    first, second = recommend(client, user_id="100"), recommend(client, user_id="100")
    assert first.json()["request_id"] == first.headers["x-request-id"] != second.headers["x-request-id"]
    mine = client.post("/v1/recommend", json={"k": 1}, headers={"x-request-id": "mine-7"})
    assert mine.json()["request_id"] == mine.headers["x-request-id"] == "mine-7"
    for bad in ("with space", "x" * 200, 'quote"and\\'):
        theirs = client.post("/v1/recommend", json={"k": 1}, headers={"x-request-id": bad})
        assert theirs.status_code == 200
        assert theirs.json()["request_id"] == theirs.headers["x-request-id"]
    for path in ("/healthz", "/v1/model", "/nowhere"):
        answer = client.get(path, headers={"x-request-id": "mine-8"})
        assert answer.json()["request_id"] == answer.headers["x-request-id"] == "mine-8"


def test_a_list_is_answered_in_order_and_one_mistake_spoils_only_itself(client):
    asked = [{"user_id": "100", "k": 3}, {"user_id": "nobody"}, {"history": ["i1"], "k": 2}, {"k": 1}]
    answer = client.post("/v1/recommend", json=asked)
    assert answer.status_code == 200
    results = answer.json()["results"]
    assert [len(each.get("items", [])) for each in results] == [3, 0, 2, 1]
    assert results[1]["error"]["code"] == "unknown_user"
    assert results[0]["items"] == recommend(client, user_id="100", k=3).json()["items"]
    assert [each.get("source") for each in results] == ["user", None, "history", "popular"]


def test_many_at_once_get_their_own_answers(client, server, model):
    library = ExportedRecommender(model)
    wanted = {user: [each.item_id for each in library.recommend(user, k=5)] for user in library.user_ids}

    def ask(user):
        with httpx.Client(base_url=server.url, timeout=20) as own:
            return [recommend(own, user_id=user, k=5).json()["items"] for _ in range(3)]

    with ThreadPoolExecutor(8) as pool:
        for user, answers in zip(wanted, pool.map(ask, wanted), strict=True):
            for items in answers:
                assert [item["item_id"] for item in items] == wanted[user]


# -- what is wrong is said ---------------------------------------------------------------------------------------------

BODIES = [
    (b"", 400),
    (b"{", 400),
    (b"\xff\xfe", 400),
    (b"null", 422),
    (b'"text"', 422),
    (b"[]", 422),
    (b'{"user_id": 1.5}', 422),
    (b'{"user_id": true}', 422),
    (b'{"user_id": ""}', 422),
    (b'{"user_id": null, "k": 0}', 422),
    (b'{"k": -1}', 422),
    (b'{"k": 1000000000}', 422),
    (b'{"k": 1e400}', 422),
    (b'{"k": "5"}', 422),
    (b'{"k": 99999999999999999999999}', 422),
    (b'{"nonsense": 1}', 422),
    (b'{"history": [[]]}', 422),
    (b'{"history": ["i1", {}]}', 422),
    (b'{"segment": {"gender": 1}}', 422),
    (b'{"categories": []}', 422),
    (b'{"user_id": "\\ud800"}', 400),
    (b"[" * 50_000, 400),
    (b'{"a":' * 50_000, 400),
    (json.dumps({"history": ["i1"] * 10_001}).encode(), 422),
    (json.dumps([{"k": 1}] * 257).encode(), 422),
    (json.dumps({"user_id": "x" * 513}).encode(), 422),
    (b'{"user_id": "nobody"}', 404),
    (b'{"history": ["nothing"]}', 404),
]


@pytest.mark.parametrize(("body", "status"), BODIES, ids=[str(place) for place in range(len(BODIES))])
def test_a_bad_body_is_refused_in_one_shape(client, body, status):
    answer = client.post("/v1/recommend", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (status, 400, 422) if status in (400, 422) else answer.status_code == status
    said = answer.json()
    assert set(said) >= {"error", "request_id", "model_version"}
    assert said["error"]["code"]
    assert said["error"]["message"]
    assert answer.headers["content-type"] == "application/json"


def test_the_field_at_fault_is_named(client):
    for asked, field in (
        ({"k": 0}, "k"),
        ({"history": ["i1", 2.5]}, "history[1]"),
        ([{"k": 1}, {"user_id": []}], "[1].user_id"),
    ):
        assert client.post("/v1/recommend", json=asked).json()["error"]["field"] == field


def test_methods_types_and_paths(client):
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS"):
        answer = client.request(method, "/v1/recommend")
        assert answer.status_code == 405
        assert answer.headers["allow"] == "POST"
        assert answer.json()["error"]["code"] == "method_not_allowed"
    assert client.post("/healthz").status_code == 405
    assert client.post("/healthz").json()["error"]["code"] == "method_not_allowed"
    assert client.post("/v1/recommend", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    for path in ("/nowhere", "/../etc/passwd", "/v1/recommend/", "/%00", "/v1/history?user_id=nobody"):
        answer = client.get(path)
        assert answer.status_code == 404, path
        assert answer.json()["error"]["code"] == "not_found"
    answer = client.get("/v1/items", params={"limit": 0})
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == "limit"


def test_a_huge_body_is_refused_whether_it_says_so_or_not(client):
    body = b'{"history": [' + b'"i1",' * 400_000 + b'"i1"]}'
    answer = client.post("/v1/recommend", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "too_large"

    def chunks():
        for _ in range(300):
            yield b" " * 10_000

    # a server that refuses may close before all is sent: the client then sees the answer or a closed connection
    with suppress(httpx.TransportError):
        answer = client.post("/v1/recommend", content=chunks(), headers={"content-type": "application/json"})
        assert answer.status_code == 413
    assert recommend(client, k=1).status_code == 200


def raw(server, data, *, seconds=10.0, pause=0.0):
    """Send bytes as they are, and return everything that comes back until the connection closes."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        for part in data if isinstance(data, list) else [data]:
            connection.sendall(part)
            time.sleep(pause)
        received = b""
        while True:
            try:
                part = connection.recv(65536)
            except (ConnectionResetError, BrokenPipeError):
                return received
            if not part:
                return received
            received += part


def test_what_is_not_http_is_answered_and_closed(server):
    for data in (
        b"\x16\x03\x01 garbage\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST /v1/recommend HTTP/1.1\r\ncontent-length: x\r\n\r\n",
    ):
        received = raw(server, data)
        assert received.startswith(b"HTTP/1.1 400")
        assert b'"bad_http"' in received


def test_endless_headers_are_refused(server):
    received = raw(server, b"GET / HTTP/1.1\r\n" + b"x-filler: " + b"y" * 100_000)
    assert received == b"" or received.startswith(b"HTTP/1.1 431")
    received = raw(server, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000)
    assert received == b"" or received.startswith(b"HTTP/1.1 431")


def test_slow_clients_are_shown_out_and_keep_nobody_waiting(model):
    with running(model, "--receive-timeout", "1") as served, httpx.Client(base_url=served.url, timeout=20) as client:
        starts = [
            b"",
            b"POST /v1/recom",
            b"POST /v1/recommend HTTP/1.1\r\ncontent-type: application/json\r\n",
            b"POST /v1/recommend HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{",
        ]
        with ThreadPoolExecutor(len(starts)) as pool:
            waiting = [pool.submit(raw, served, start) for start in starts]
            while not all(each.done() for each in waiting):
                assert recommend(client, user_id="100").status_code == 200
            for each in waiting:
                assert each.result().startswith(b"HTTP/1.1 408")
                assert b'"timeout"' in each.result()


def test_a_client_that_leaves_costs_nothing(server, client):
    for _ in range(20):
        host, port = server.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)))
        connection.sendall(
            b'POST /v1/recommend HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 10\r\n\r\n{"k"'
        )
        connection.close()
    assert recommend(client, k=1).status_code == 200
    assert server.process.poll() is None


# -- keys and limits ---------------------------------------------------------------------------------------------------


def test_keys_rates_and_the_log(model, tmp_path):
    (tmp_path / "keys").write_text(f"# people\nshop {KEY}\n\napp {OTHER}\n", encoding="utf-8")
    (tmp_path / "admin").write_text(f"{ADMIN}\n", encoding="utf-8")
    words = ("--api-keys", str(tmp_path / "keys"), "--admin-key", str(tmp_path / "admin"), "--rate-limit", "5")
    with running(model, *words) as served, httpx.Client(base_url=served.url, timeout=20) as client:
        for headers in ({}, bearer("wrong" * 5), {"x-api-key": ""}, {"authorization": f"Basic {KEY}"}, bearer(ADMIN)):
            answer = client.post("/v1/recommend", json={"k": 1}, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "unauthorized"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/model").status_code == 401
        assert client.get("/healthz").status_code == 200
        assert client.get("/").status_code == 200
        assert client.post("/v1/recommend", json={"k": 1}, headers={"x-api-key": KEY}).status_code == 200
        statuses = [client.post("/v1/recommend", json={"k": 1}, headers=bearer(KEY)).status_code for _ in range(30)]
        assert 200 in statuses
        assert 429 in statuses
        refused = client.post("/v1/recommend", json={"k": 1}, headers=bearer(KEY))
        if refused.status_code == 429:
            assert int(refused.headers["retry-after"]) >= 1
        assert client.post("/v1/recommend", json={"k": 1}, headers=bearer(OTHER)).status_code == 200
        # the key of the clients does not reload, nor does no key
        for headers in ({}, bearer(KEY)):
            assert client.post("/v1/reload", json={}, headers=headers).status_code == 401
        time.sleep(0.6)  # log lines are written in batches
        log = served.stderr
        for secret in (KEY, OTHER, ADMIN, "wrongwrong"):
            assert secret not in log
        lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        callers = {line["caller"] for line in lines if line["event"] == "request" and line["status"] == 200}
        assert {"shop", "app"} <= callers
        assert {line["code"] for line in lines if line["event"] == "request" and line["status"] == 401} == {
            "unauthorized"
        }


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("", "holds no keys"), ("shop short", "row 1: wanted a name and a key"), (f"a {KEY}\na {OTHER}", "row 2")],
)
def test_a_bad_key_file_is_refused_before_anything_listens(model, tmp_path, text, wanted):
    (tmp_path / "keys").write_text(text, encoding="utf-8")
    with (
        pytest.raises(AssertionError, match="ended with 2") as caught,
        running(model, "--api-keys", str(tmp_path / "keys")),
    ):
        pass
    assert wanted in str(caught.value)
    assert OTHER not in str(caught.value)


# -- events ------------------------------------------------------------------------------------------------------------


def test_an_event_is_seen_at_once(client):
    first = recommend(client, user_id="104", k=3).json()["items"][0]["item_id"]
    answer = client.post("/v1/events", json={"events": [{"user_id": 104, "item_id": first, "kind": "click"}]})
    assert answer.status_code == 200
    assert (answer.json()["received"], answer.json()["stored"]) == (1, 1)
    assert first not in [item["item_id"] for item in recommend(client, user_id="104", k=3).json()["items"]]


def test_somebody_new_is_known_by_their_events(client):
    assert recommend(client, user_id="new").status_code == 404
    events = [{"user_id": "new", "item_id": item, "event_id": item} for item in ("i3", "i8", "i3")]
    assert client.post("/v1/events", json={"events": events}).json()["stored"] == 2
    assert client.post("/v1/events", json={"events": events}).json()["stored"] == 0
    answer = recommend(client, user_id="new", k=4).json()
    assert answer["source"] == "history"
    assert answer["items"] == recommend(client, history=["i3", "i8"], k=4).json()["items"]


@pytest.mark.parametrize(
    "event",
    [
        {"user_id": "a"},
        {"user_id": "a", "item_id": ""},
        {"user_id": "a", "item_id": "b\x00"},
        {"user_id": "a", "item_id": "b", "timestamp": -1},
        {"user_id": "a", "item_id": "b", "timestamp": 1e300},
        {"user_id": "a", "item_id": "b", "rating": "5"},
        {"user_id": "a", "item_id": "b", "extra": 1},
    ],
)
def test_a_bad_event_stores_nothing(client, event):
    answer = client.post("/v1/events", json={"events": [{"user_id": "ok", "item_id": "i1"}, event]})
    assert answer.status_code == 422
    assert answer.json()["error"]["field"].startswith("events")
    assert recommend(client, user_id="ok").status_code == 404


def test_without_a_store_events_are_refused(model):
    with running(model, "--events", "none") as served:
        answer = httpx.post(f"{served.url}/v1/events", json={"events": [{"user_id": "a", "item_id": "b"}]})
        assert answer.status_code == 403


# -- operations --------------------------------------------------------------------------------------------------------


def test_health_model_items_and_users(client, model):
    assert client.get("/healthz").json()["status"] == "ok"
    assert client.get("/readyz").json()["status"] == "ready"
    about = client.get("/v1/model").json()
    assert (about["users"], about["items"], about["index"]["kind"]) == (40, 60, "exact")
    assert "Comedy" in about["categories"]["names"]
    assert about["segments"] == {"gender": ["F", "M"]}
    assert about["data"]["simulated"] is False
    found = client.get("/v1/items", params={"query": "AMÉLIE"}).json()["items"]
    assert [item["item_id"] for item in found] == ["i6"]
    assert len(client.get("/v1/items").json()["items"]) == 10
    assert [user["user_id"] for user in client.get("/v1/users", params={"query": "10", "limit": 3}).json()["users"]]
    history = client.get("/v1/history", params={"user_id": "100"}).json()["history"]
    assert len(history) == 10


def test_metrics_count_what_was_asked(client):
    def count():
        text = client.get("/metrics").text
        return sum(
            float(line.split()[-1])
            for line in text.splitlines()
            if line.startswith('kd_requests_total{endpoint="/v1/recommend",status="200"}')
        )

    before = count()
    for _ in range(5):
        recommend(client, k=1)
    assert count() == before + 5
    text = client.get("/metrics").text
    assert 'kd_request_seconds_bucket{endpoint="/v1/recommend",index="exact",le="0.001"}' in text
    assert "kd_model_info" in text
    assert 'endpoint="other"' in text or client.get("/nowhere").status_code == 404


def test_a_reload_swaps_the_model_and_fails_nobody(model, tmp_path):
    """While eight connections ask without a pause; a bad model is refused and the old one goes on."""
    other = exported(tmp_path / "other", seed=1)
    for name, source in (("first", model), ("second", other)):
        shutil.copytree(source, tmp_path / name)
    current = tmp_path / "current"
    current.symlink_to("first")
    (tmp_path / "admin").write_text(ADMIN, encoding="utf-8")
    versions = {
        name: json.loads((tmp_path / name / "model.json").read_text())["model_version"] for name in ("first", "second")
    }
    seen, failures, stop = set(), [], threading.Event()

    def ask(served):
        with httpx.Client(base_url=served.url, timeout=20) as own:
            while not stop.is_set():
                try:
                    answer = recommend(own, user_id="100", k=5)
                except httpx.TransportError as error:
                    failures.append(repr(error))
                    return
                if answer.status_code != 200 or len(answer.json()["items"]) != 5:
                    failures.append(answer.text)
                seen.add(answer.json()["model_version"])

    with running(current, "--workers", "2", "--admin-key", str(tmp_path / "admin")) as served:
        threads = [threading.Thread(target=ask, args=(served,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        try:
            with httpx.Client(base_url=served.url, timeout=60, headers=bearer(ADMIN)) as admin:
                for name in ("second", "first", "second"):
                    link = tmp_path / "next"
                    link.symlink_to(name)
                    os.replace(link, current)
                    answer = admin.post("/v1/reload", json={})
                    assert answer.status_code == 200, answer.text
                    assert answer.json()["model_version"] == versions[name]
                    assert answer.json()["workers"] == 2
                    for _ in range(20):  # whichever worker answers
                        with httpx.Client(base_url=served.url) as fresh:
                            assert recommend(fresh, k=1).json()["model_version"] == versions[name]
                (tmp_path / "second" / "vectors.safetensors").write_bytes(b"not what it was")
                answer = admin.post("/v1/reload", json={})
                assert answer.status_code == 422
                assert "vectors.safetensors" in answer.json()["error"]["message"]
                assert recommend(admin, user_id="100").json()["model_version"] == versions["second"]
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        log = served.stderr
    assert not failures, log[-4000:]
    assert seen == set(versions.values())


def test_a_stopping_server_finishes_what_it_has_begun(model):
    with running(model) as served:
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            body = b'{"user_id": "100", "k": 3}'
            head = b"POST /v1/recommend HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(
                body
            )
            connection.sendall(head + body[:5])
            time.sleep(0.3)
            served.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            connection.sendall(body[5:])
            received = b""
            while part := connection.recv(65536):
                received += part
        assert received.startswith(b"HTTP/1.1 200")
        assert len(json.loads(received.partition(b"\r\n\r\n")[2])["items"]) == 3
        assert served.stop() in (0, -signal.SIGTERM)
        assert '"stopped"' in served.stderr


def test_a_worker_that_dies_is_replaced(model):
    with running(model, "--workers", "2") as served, httpx.Client(base_url=served.url, timeout=20) as client:
        workers = {json.loads(line)["worker"] for line in served.stderr.splitlines() if '"started"' in line}
        for _ in range(100):
            if len(workers) == 2:
                break
            time.sleep(0.1)
            workers = {json.loads(line)["worker"] for line in served.stderr.splitlines() if '"started"' in line}
        victim = workers.pop()
        os.kill(victim, signal.SIGKILL)
        for _ in range(200):
            now = {json.loads(line)["worker"] for line in served.stderr.splitlines() if '"started"' in line}
            if len(now) == 3:
                break
            time.sleep(0.1)
        assert len(now) == 3
        for _ in range(20):
            assert client.get("/readyz").status_code == 200
    assert not os.path.exists(f"/proc/{victim}")


def test_a_shadow_is_compared_and_never_answers(model, tmp_path):
    other = exported(tmp_path, seed=2)
    with running(model, "--shadow", str(other)) as served, httpx.Client(base_url=served.url, timeout=20) as client:
        version = read_json(model / "model.json")["model_version"]
        for user in range(104, 124):
            assert recommend(client, user_id=user).json()["model_version"] == version
        for _ in range(100):
            text = client.get("/metrics").text
            counts = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line and line[0] != "#"}
            if counts["kd_shadow_overlap_count"] == 20:
                break
            time.sleep(0.1)
        assert counts["kd_shadow_overlap_count"] == counts["kd_shadow_seconds_count"] == 20
        assert 0 < counts["kd_shadow_overlap_sum"] <= 20
