from __future__ import annotations

import json
import socket
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import positive_data_acceptance

from apps.speech.decode.words import Word
from apps.speech.device.subtitles import Cue, cues, srt
from apps.speech.server import uploads
from tests.speech.device.exported import silence, spoken
from tests.speech.server.recordings import ogg_opus, packets, webm
from tests.speech.server.served import Served, running, wav

AUDIO = np.concatenate([spoken("yes no"), silence(2), spoken("day")])
PATH = "/v1/audio/transcriptions"


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with running(folder, max_upload=1 << 21, max_seconds=30.0) as served:
        yield served


def post(served: Served, data: bytes, name: str = "talk.wav", **fields: Any) -> httpx.Response:
    return httpx.post(served.url + PATH, files={"file": (name, data)}, data={"model": "m", **fields}, timeout=20)


def problem(answer: httpx.Response) -> tuple[int, str, str | None]:
    """Return status, code and field of an error, which has the form of all."""
    about = answer.json()
    assert set(about) == {"error", "request_id", "model_version"}
    assert about["request_id"] == answer.headers["x-request-id"]
    return answer.status_code, about["error"]["code"], about["error"].get("field")


def test_every_form_of_an_answer(served: Served) -> None:
    data = wav(AUDIO)
    assert post(served, data).json() == {"text": "yes no day"}
    text = post(served, data, response_format="text")
    assert (text.text, text.headers["content-type"]) == ("yes no day\n", "text/plain; charset=utf-8")
    verbose = post(
        served,
        data,
        response_format="verbose_json",
        language="en",
        **{"timestamp_granularities[]": ["word", "segment"]},
    ).json()
    assert (verbose["text"], verbose["language"]) == ("yes no day", "en")
    assert verbose["duration"] == pytest.approx(len(AUDIO) / 16_000, abs=1e-3)
    assert [word["word"] for word in verbose["words"]] == ["yes", "no", "day"]
    assert [segment["text"] for segment in verbose["segments"]] == ["yes no", "day"]
    assert all(segment["avg_logprob"] < 0 for segment in verbose["segments"])
    assert post(served, data, response_format="srt").text == "".join(srt(cues(verbose["words"])))
    vtt = post(served, data, response_format="vtt").text
    assert vtt.startswith("WEBVTT\n\n00:00:00.") and vtt.rstrip().endswith("day")
    only = post(served, data, response_format="verbose_json").json()
    assert "segments" in only and "words" not in only


@pytest.mark.parametrize("form", ["flac", "ogg", "webm", "stereo"])
def test_other_kinds_of_files(served: Served, form: str) -> None:
    ogg = ogg_opus(AUDIO)
    data = {
        "flac": wav(AUDIO, format="FLAC"),
        "ogg": ogg,
        "webm": webm(packets(ogg)),
        "stereo": wav(np.repeat(AUDIO, 3)[:, None].repeat(2, axis=1), 48_000),
    }[form]
    assert post(served, data).json() == {"text": "yes no day"}


def test_silence_has_no_words(served: Served) -> None:
    data = wav(silence(2))
    assert post(served, data).json() == {"text": ""}
    assert post(served, data, response_format="srt").text == ""
    verbose = post(served, data, response_format="verbose_json").json()
    assert (verbose["segments"], verbose["remarks"]) == ([], ["silence (digital)"])


def test_what_is_wrong_with_the_audio_is_in_verbose_json(served: Served) -> None:
    data = wav(AUDIO + np.float32(0.1))
    assert post(served, data).json() == {"text": "yes no day"}  # as the OpenAI API has it, and no more
    verbose = post(served, data, response_format="verbose_json").json()
    assert verbose["remarks"] == ["DC offset of +10.0 % of full scale"]
    assert "remarks" not in post(served, wav(AUDIO), response_format="verbose_json").json()


def test_what_is_no_audio_is_said_with_the_name_of_the_client(served: Served) -> None:
    good = webm(packets(ogg_opus(AUDIO)))
    for data, what in (
        (b"hello " * 50, "cannot be read as audio"),
        (b"", "is empty"),
        (wav(AUDIO)[:4000], "truncated"),
        (good[: len(good) // 2 + 5], "truncated"),
        (good[:300], "no Opus|truncated|no samples"),
        (b"\x1a\x45\xdf\xa3" + b"\0" * 50, "damaged"),
    ):
        answer = post(served, data, '../../etc/<b>"\n.wav')
        assert problem(answer) == (422, "unreadable", "file")
        message = answer.json()["error"]["message"]
        assert message.startswith("<b>") and "\n" not in message and tempfile.gettempdir() not in message
        assert any(each in message for each in what.split("|")), message


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"response_format": "xml"}, "response_format"),
        ({"response_format": ["json", "text"]}, "response_format"),
        ({"timestamp_granularities[]": "word"}, "timestamp_granularities"),
        ({"timestamp_granularities[]": "letter", "response_format": "verbose_json"}, "timestamp_granularities"),
        ({"stream": "true"}, "stream"),
    ],
)
def test_what_is_asked_for_wrongly_is_said(served: Served, fields: dict[str, Any], field: str) -> None:
    assert problem(post(served, wav(spoken("no")), **fields)) == (422, "invalid", field)


def test_what_is_no_form(served: Served) -> None:
    url = served.url + PATH
    assert problem(httpx.post(url, json={"file": "x"})) == (415, "unsupported_media_type", None)
    assert problem(httpx.post(url, files={"other": b"x"})) == (422, "invalid", "file")
    assert problem(httpx.post(url, files=[("file", ("a", b"x")), ("file", ("b", b"y"))])) == (422, "invalid", "file")
    head = {"content-type": "multipart/form-data; boundary=b"}
    part = b'--b\r\ncontent-disposition: form-data; name="file"'
    for body in (b"", b"noise", part + b'; filename="a"\r\n\r\nxyz', b"--b\r\nx: y\r\n\r\n\r\n--b--"):
        assert problem(httpx.post(url, content=body, headers=head)) == (400, "bad_form", None)
    assert problem(httpx.post(url, content=part + b"\r\n\r\nxyz\r\n--b--", headers=head)) == (422, "invalid", "file")
    fields = b"".join(b'--b\r\ncontent-disposition: form-data; name="a"\r\n\r\n1\r\n' for _ in range(70))
    assert problem(httpx.post(url, content=fields + b"--b--", headers=head)) == (400, "bad_form", None)
    assert problem(httpx.post(url, headers={"content-type": "multipart/form-data"})) == (400, "bad_form", None)


def test_too_large_and_too_long(served: Served) -> None:
    assert problem(post(served, bytes(1 << 21))) == (413, "too_large", None)

    def pieces() -> Iterator[bytes]:  # without a length
        yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(40):
            yield bytes(1 << 16)

    head = {"content-type": "multipart/form-data; boundary=b"}
    assert problem(httpx.post(served.url + PATH, content=pieces(), headers=head))[:2] == (413, "too_large")
    long = wav(silence(31))
    assert len(long) < 1 << 21
    assert problem(post(served, long)) == (413, "too_long", "file")


def test_what_states_that_it_is_too_long_is_not_heard(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    opus = packets(ogg_opus(AUDIO))
    # of some formats the length is an estimate
    assert post(served, webm(opus, seconds=30.3)).json() == {"text": "yes no day"}
    monkeypatch.setattr(uploads, "_samples", lambda path: pytest.fail("it was heard"))
    for data in (
        wav(silence(31)),
        *(wav(silence(31), format=form) for form in ("FLAC", "MP3")),
        ogg_opus(silence(31)),
        webm(opus, seconds=31.0),
        webm(opus, seconds=31.0, live=False),
    ):
        assert problem(post(served, data)) == (413, "too_long", "file")


def test_forms_that_still_arrive_keep_no_place_and_are_ended(folder: Path) -> None:
    with running(folder, max_waiting=0, receive_seconds=0.5) as served, ExitStack() as held:
        host, port = served.url.removeprefix("http://").split(":")
        slow = [held.enter_context(socket.create_connection((host, int(port)), 20)) for _ in range(4)]
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n"
        for client in slow:
            client.sendall(f"{head}Content-Type: multipart/form-data; boundary=b\r\n\r\n--b".encode())
        assert post(served, wav(spoken("no"))).json() == {"text": "no"}
        for client in slow:
            answer = client.recv(4000)
            assert answer.startswith(b"HTTP/1.1 408") and b'"message":"the form did not arrive: 3 bytes in' in answer


def test_a_short_file_is_answered_while_a_long_one_is_heard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, enough = uploads._samples, threading.Event()

    def endless(path: Path) -> Iterator[np.ndarray]:
        yield from own(path)
        while path.stat().st_size > 60_000 and not enough.is_set():
            yield silence(1)

    monkeypatch.setattr(uploads, "_samples", endless)
    with running(folder, max_waiting=1, max_seconds=1e9) as served, ThreadPoolExecutor() as clients:
        try:
            long = clients.submit(post, served, wav(AUDIO))
            assert waiting(served, 1)
            assert post(served, wav(spoken("no"))).json() == {"text": "no"}
            assert post(served, b"no audio").status_code == 422
            assert not long.done()
        finally:
            enough.set()
        assert long.result().json() == {"text": "yes no day"}


def test_files_are_gone_afterwards_and_clients_may_go(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert post(served, wav(AUDIO)).json() == {"text": "yes no day"}
    post(served, b"no audio")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(httpx.ReadTimeout):
        blocked = threading.Event()
        served.service.uploads._pool.submit(blocked.wait, 5)
        httpx.post(served.url + PATH, files={"file": ("a.wav", wav(AUDIO))}, timeout=httpx.Timeout(5, read=0.2))
    blocked.set()
    until = time.monotonic() + 5
    while served.service.uploads.waiting and time.monotonic() < until:
        time.sleep(0.01)
    assert served.service.uploads.waiting == 0 and list(tmp_path.iterdir()) == []


def waiting(served: Served, count: int) -> bool:
    """Wait until so many uploads are counted."""
    until = time.monotonic() + 20
    while served.service.uploads.waiting != count and time.monotonic() < until:
        time.sleep(0.01)
    return served.service.uploads.waiting == count


def test_who_leaves_before_a_file_is_begun_leaves_the_place(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, go, begun = uploads._samples, threading.Event(), []

    def slow(path: Path) -> Iterator[np.ndarray]:
        begun.append(path)
        assert go.wait(60)
        return own(path)

    monkeypatch.setattr(uploads, "_samples", slow)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    form: dict[str, Any] = {"files": {"file": ("a.wav", wav(AUDIO))}, "timeout": 60}
    with running(folder, max_waiting=2) as served, ThreadPoolExecutor() as clients:
        url = served.url + PATH
        try:
            long = clients.submit(httpx.post, url, **form)
            assert waiting(served, 1)
            for _ in range(2):  # as many as may wait, one after the other
                with httpx.Client() as client:
                    for _ in range(2):
                        with pytest.raises(httpx.ReadTimeout):
                            client.post(url, files=form["files"], timeout=httpx.Timeout(20, read=0.5))
                assert waiting(served, 1), "who has left keeps the place"
            assert httpx.get(f"{served.url}/health").json()["uploads"] == 1
            assert len(list(tmp_path.iterdir())) == 1
            stays = [clients.submit(httpx.post, url, **form) for _ in range(2)]
            assert waiting(served, 3)
            refused = post(served, wav(AUDIO))
            assert problem(refused) == (503, "overloaded", None) and refused.headers["retry-after"]
        finally:
            go.set()
        assert [each.result().json() for each in (long, *stays)] == [{"text": "yes no day"}] * 3
        assert waiting(served, 0) and len(begun) == 3 and list(tmp_path.iterdir()) == []


def test_an_answer_is_written_beside_the_event_loop(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go = threading.Event(), threading.Event()

    def slow(words: Iterable[Word]) -> Iterator[Cue]:
        begun.set()
        go.wait(60)
        return cues(words)

    monkeypatch.setattr(uploads, "cues", slow)
    with ThreadPoolExecutor() as clients:
        answer = clients.submit(
            httpx.post, served.url + PATH, files={"file": wav(AUDIO)}, data={"response_format": "srt"}, timeout=90
        )
        try:
            assert begun.wait(20)
            assert httpx.get(f"{served.url}/health", timeout=20).json()["uploads"] == 1
        finally:
            go.set()
        assert answer.result().text.startswith("1\n00:00:00")


def test_the_openai_client(served: Served) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tones"]
    assert client.models.retrieve("tones").owned_by == "kdsuite"
    create = client.audio.transcriptions.create
    assert create(model="whisper-1", file=("a.wav", wav(AUDIO))).text == "yes no day"
    assert create(model="tones", file=("a.wav", wav(AUDIO)), response_format="srt").startswith("1\n00:00:00")
    verbose = create(
        model="tones",
        file=("a.wav", wav(AUDIO)),
        response_format="verbose_json",
        timestamp_granularities=["word", "segment"],
    )
    assert [word.word for word in verbose.words] == ["yes", "no", "day"]
    assert [segment.text for segment in verbose.segments] == ["yes no", "day"]
    with pytest.raises(openai.UnprocessableEntityError, match="cannot be read as audio"):
        create(model="tones", file=("a.wav", b"no audio at all"))


def test_models_health_and_errors(served: Served) -> None:
    models = httpx.get(f"{served.url}/v1/models").json()
    assert models["object"] == "list" and [each["id"] for each in models["data"]] == ["tones"]
    assert httpx.get(f"{served.url}/v1/models/tones").json()["object"] == "model"
    assert problem(httpx.get(f"{served.url}/v1/models/other")) == (404, "not_found", None)
    assert problem(httpx.get(served.url + PATH)) == (405, "method_not_allowed", None)
    health = httpx.get(f"{served.url}/health", headers={"x-request-id": "mine-1"})
    assert health.json()["status"] == "ok" and health.json()["request_id"] == "mine-1"
    assert httpx.get(f"{served.url}/health", headers={"x-request-id": "a b"}).json()["request_id"] != "a b"


quick = settings(
    max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)


@pytest.mark.parametrize("operation", [("POST", PATH), ("GET", "/v1/models"), ("GET", "/v1/models/{name}")])
def test_every_answer_is_one_the_document_has(served: Served, operation: tuple[str, str]) -> None:
    method, path = operation
    document = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

        def fuzz(case: Any) -> None:
            # bytes that fit the document are mostly no audio
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        with_cases = given(case=document[path][method].as_strategy(generation_mode=mode))
        quick(with_cases(fuzz))()
        if method == "GET":
            break  # nothing can be wrong with it
    assert httpx.get(f"{served.url}/health").status_code == 200


@quick
@given(st.binary(max_size=400), st.sampled_from([b"RIFF", b"OggS\0\2", b"fLaC", b"\x1a\x45\xdf\xa3", b"ID3", b""]))
def test_noise_as_a_file_is_refused(served: Served, data: bytes, head: bytes) -> None:
    answer = post(served, head + data)
    assert answer.status_code == 422 or (answer.status_code == 200 and isinstance(answer.json()["text"], str))


def test_a_wav_with_html_in_its_name_stays_text(served: Served) -> None:
    answer = post(served, b"x", "<script>alert(1)</script>.wav", response_format="text")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert json.loads(answer.text)["error"]["message"].startswith("script>.wav")
