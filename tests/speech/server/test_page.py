"""The page in a real browser whose microphone is a file, before a real server."""

from __future__ import annotations

import asyncio
import base64
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from starlette.websockets import WebSocket

from apps.speech.server.sessions import Session
from tests.speech.device.exported import silence, spoken
from tests.speech.server.served import Served, running

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on this machine")

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--use-fake-device-for-media-stream"),
    "--use-fake-ui-for-media-stream",
)
WAIT = 20_000
expect.set_options(timeout=WAIT)


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with running(folder, max_streams=2) as served:
        yield served


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("microphone") / "speech.wav"
    # the browser plays it over and over, at the rate it likes
    samples = np.concatenate([silence(0.5), spoken("yes no"), silence(1.6), spoken("day"), silence(1.6)])
    soundfile.write(path, np.repeat(samples, 3), 48_000, subtype="PCM_16")
    with sync_api.sync_playwright() as playwright:
        flags = [*FLAGS, f"--use-file-for-fake-audio-capture={path}"]
        browser = playwright.chromium.launch(executable_path=BROWSER, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    """A page of its own context; at the end it is held against what no page may do."""
    context = browser.new_context(permissions=["microphone"])
    context.set_default_timeout(WAIT)
    page = context.new_page()
    errors: list[str] = []
    addresses: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: addresses.append(request.url))
    page.goto(served.url)
    yield page
    assert page.evaluate("window.ran") is None
    assert errors == []
    assert [each for each in addresses if not each.startswith(served.url)] == []
    context.close()


def test_it_writes_down_what_the_microphone_hears(page: Any, served: Served, tmp_path: Path) -> None:
    expect(page.locator("#model")).to_have_text("model tones")
    page.evaluate(
        """() => {
            window.partials = new Set(); window.levels = [];
            const partial = document.getElementById('partial');
            new MutationObserver(() => partials.add(partial.textContent)).observe(partial, { childList: true });
            setInterval(() => levels.push(document.getElementById('level').value), 20);
        }"""
    )
    page.locator("#toggle").click()
    expect(page.locator("#status")).to_have_text("Listening. Speak.")
    # whatever word of the file it was that it began in
    expect(page.locator("#final span").get_by_text("yes no", exact=True).first).to_be_visible()
    expect(page.locator("#final span").get_by_text("day", exact=True).first).to_be_visible()
    assert page.locator("#latency").inner_text().endswith(" ms")
    assert float(page.locator("#heard").inner_text().removesuffix(" s")) > 3
    partials, levels = page.evaluate("[[...partials], levels]")
    assert {"ye", "yes"} & set(partials) and "" in partials
    assert max(levels) > -30 and min(levels) < -50
    page.screenshot(path=tmp_path / "listening.png")
    page.locator("#toggle").click()
    expect(page.locator("#status")).to_have_text("Stopped.")
    expect(page.locator("#toggle")).to_have_text("Start listening")
    assert not served.service.hub.sessions
    page.locator("#clear").click()
    expect(page.locator("#final li")).to_have_count(0)


def test_words_are_text(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = "<img src=x onerror='window.ran = 1'>"
    final, partial = Session._final, Session._partial
    monkeypatch.setattr(Session, "_final", lambda self, segment: final(self, segment) | {"text": hostile})
    monkeypatch.setattr(Session, "_partial", lambda self, text: partial(self, text) | {"text": text and hostile})
    page.locator("#toggle").click()
    expect(page.locator("#partial")).to_have_text(hostile)
    expect(page.locator("#final span").first).to_have_text(hostile)
    page.locator("#toggle").click()
    expect(page.locator("#status")).to_have_text("Stopped.")


def test_a_service_that_is_full_says_so_and_a_lost_one_too(page: Any, served: Served) -> None:
    hub = served.service.hub
    before, hub.max_streams = hub.max_streams, 0
    try:
        page.locator("#toggle").click()
        expect(page.locator("#status")).to_contain_text("which is the limit")
        expect(page.locator("#status")).to_have_class("bad")
    finally:
        hub.max_streams = before
    page.locator("#toggle").click()
    expect(page.locator("#status")).to_have_text("Listening. Speak.")
    while not hub.sessions:  # the page may say so before the service has begun
        page.wait_for_timeout(10)
    (session,) = hub.sessions
    session.fail()
    expect(page.locator("#status")).to_have_text("the service failed")
    expect(page.locator("#toggle")).to_have_text("Start listening")


# keeps the media that the page gets, and lets it wait for them as a person does who is asked
SLOW_MICROPHONE = """
    window.media = [];
    const own = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
    navigator.mediaDevices.getUserMedia = async (wanted) => {
        await new Promise((done) => setTimeout(done, DELAY));
        media.push(await own(wanted));
        return media.at(-1);
    };
"""
ENDED = "media.length && media.every((each) => each.getTracks().every((track) => track.readyState === 'ended'))"


def ended(page: Any) -> bool:
    """Wait until the page got a microphone and none that it got is on."""
    until = time.monotonic() + WAIT / 2000
    while not page.evaluate(ENDED) and time.monotonic() < until:
        page.wait_for_timeout(50)
    return bool(page.evaluate(ENDED))


def test_stop_while_the_microphone_is_asked_for_leaves_it_off(page: Any, served: Served) -> None:
    sockets: list[Any] = []
    page.on("websocket", lambda socket: sockets.append(socket))
    page.add_init_script(SLOW_MICROPHONE.replace("DELAY", "1500"))
    page.goto(served.url)
    page.locator("#toggle").click()
    expect(page.locator("#status")).to_have_text("Asking for the microphone …")
    page.locator("#toggle").click()
    expect(page.locator("#status")).to_have_text("Stopped.")
    assert ended(page)
    assert httpx.get(f"{served.url}/health").json()["streams"] == 0
    assert sockets == []
    # and it can be started again
    page.locator("#toggle").click()
    expect(page.locator("#status")).to_have_text("Listening. Speak.")
    assert not page.evaluate(ENDED)
    page.locator("#toggle").click()
    expect(page.locator("#status")).to_have_text("Stopped.")
    assert page.evaluate(ENDED)


def test_stop_while_it_connects_ends_the_connection(
    browser: Any, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept, accepted, go = WebSocket.accept, threading.Event(), threading.Event()

    async def slow(websocket: WebSocket) -> None:
        while not go.is_set():
            await asyncio.sleep(0.01)
        try:
            await accept(websocket)
        finally:
            accepted.set()

    monkeypatch.setattr(WebSocket, "accept", slow)
    # a page of its own: the browser reports a connection that is ended so early as an error
    context = browser.new_context(permissions=["microphone"])
    page = context.new_page()
    page.add_init_script(SLOW_MICROPHONE.replace("DELAY", "0"))
    page.goto(served.url)
    with page.expect_websocket():
        page.locator("#toggle").click()
    page.locator("#toggle").click()
    expect(page.locator("#status")).to_have_text("Stopped.")
    assert page.evaluate(ENDED)
    # a service that opens it later has nobody to hear, long before its client would be idle
    go.set()
    assert accepted.wait(WAIT / 1000)
    until = time.monotonic() + WAIT / 2000
    while httpx.get(f"{served.url}/health").json()["streams"] and time.monotonic() < until:
        time.sleep(0.05)
    assert httpx.get(f"{served.url}/health").json()["streams"] == 0
    expect(page.locator("#status")).to_have_text("Stopped.")
    context.close()


def test_what_a_browser_records_is_read(page: Any, served: Served) -> None:
    """WebM as MediaRecorder writes it, live and as a file."""
    recorded = page.evaluate(
        """async (address) => {
            const media = await navigator.mediaDevices.getUserMedia({ audio: {
                echoCancellation: false, noiseSuppression: false, autoGainControl: false } });
            const recorder = new MediaRecorder(media, { mimeType: 'audio/webm;codecs=opus' });
            const socket = new WebSocket(address), parts = [], said = [];
            await new Promise((done) => { socket.onopen = done; });
            const closed = new Promise((done) => { socket.onclose = (event) => done(event.code); });
            socket.onmessage = (event) => said.push(JSON.parse(event.data));
            recorder.ondataavailable = (event) => { parts.push(event.data); socket.send(event.data); };
            recorder.start(100);
            await new Promise((done) => setTimeout(done, 5500));
            await new Promise((done) => { recorder.onstop = done; recorder.stop(); });
            socket.send('{"type": "stop"}');
            const code = await closed, data = new Uint8Array(await new Blob(parts).arrayBuffer());
            return { code, said, data: btoa(data.reduce((text, byte) => text + String.fromCharCode(byte), '')) };
        }""",
        f"{served.ws}?format=webm",
    )
    live = [message["text"] for message in recorded["said"] if message["type"] == "final"]
    assert recorded["code"] == 1000 and recorded["said"][-1]["type"] == "end"
    assert "warning" not in recorded["said"][-1]
    assert {"yes no", "day"} & set(live)
    files = {"file": ("speech.webm", base64.b64decode(recorded["data"]))}
    answer = httpx.post(f"{served.url}/v1/audio/transcriptions", files=files)
    assert answer.json()["text"] == " ".join(live)


def test_the_page_may_load_nothing_else(served: Served) -> None:
    answer = httpx.get(served.url)
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    for name in ("listen.js", "listen-audio.js", "listen-worklet.js", "listen.css", "listen.svg"):
        assert httpx.get(f"{served.url}/{name}").status_code == 200
    assert "http://" not in answer.text and "https://" not in answer.text
