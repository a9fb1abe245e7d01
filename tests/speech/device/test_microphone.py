from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from apps.speech.device.microphone import microphone
from kdcore.config import UserError


class PortAudioError(Exception):
    pass


class Fake(ModuleType):
    """What sounddevice does as far as the microphone needs it: a thread that calls back with blocks."""

    PortAudioError = PortAudioError

    def __init__(
        self,
        blocks: int,
        *,
        ends: str = "finished",
        refuse: str | None = None,
        rates: tuple[int, ...] = (16_000,),
        overflows: tuple[int, ...] = (),
    ) -> None:
        super().__init__("sounddevice")
        self.rates, self.overflows = rates, overflows
        self.blocks, self.ends, self.refuse = blocks, ends, refuse
        self.opened: dict[str, Any] = {}
        self.closed = False
        self.streams: list[FakeStream] = []

    def check_input_settings(self, **options: Any) -> None:
        if options["samplerate"] not in self.rates:
            raise PortAudioError("Invalid sample rate [-9997]")

    def query_devices(self, device: str | int | None, kind: str) -> dict[str, float]:
        return {"default_samplerate": float(self.rates[0])}

    def InputStream(self, **options: Any) -> FakeStream:
        if self.refuse:
            raise PortAudioError(self.refuse)
        self.opened = options
        self.streams.append(FakeStream(self, options["callback"], options["finished_callback"], options["blocksize"]))
        return self.streams[-1]


class FakeStream:
    def __init__(self, fake: Fake, callback: Callable[..., None], finished: Callable[[], None], size: int) -> None:
        self.fake, self.callback, self.finished, self.size = fake, callback, finished, size

    def __enter__(self) -> None:
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.thread.join()
        self.fake.closed = True
        if self.fake.ends == "raises":
            raise PortAudioError("Unanticipated host error [-9999]")

    def run(self) -> None:
        buffer = np.zeros((self.size, 1), np.float32)
        for number in range(self.fake.blocks):
            buffer[:] = number  # PortAudio uses its buffer again
            status = SimpleNamespace(input_overflow=number in self.fake.overflows)
            self.callback(buffer, self.size, None, status)
        if self.fake.ends == "finished":
            self.finished()


def test_blocks_come_in_order_and_a_lost_microphone_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(5)
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    heard = []
    with pytest.raises(UserError, match=r"microphone 'usb': has gone; what was heard until then is kept"):
        for block in microphone("usb"):
            heard.append(block)
    assert [block[0] for block in heard] == [0, 1, 2, 3, 4]
    assert all(block.dtype == np.float32 and block.shape == (1280,) for block in heard)
    assert (fake.opened["samplerate"], fake.opened["channels"], fake.opened["device"]) == (16_000, 1, "usb")
    assert fake.closed


def test_a_microphone_of_another_rate_is_resampled(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(20, rates=(44_100, 48_000))
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    heard = []
    with pytest.raises(UserError, match="has gone"):
        for block in microphone():
            heard.append(block)
    assert fake.opened["samplerate"] == 44_100 and fake.opened["blocksize"] == round(0.08 * 44_100)
    samples = np.concatenate(heard)
    # all but what the resampler still has, which the lost microphone takes along
    assert 0.9 * 20 * 1280 < len(samples) <= 20 * 1280 and np.abs(samples).max() <= 1


@pytest.mark.parametrize("ends", ["silent", "raises"])
def test_a_microphone_that_only_falls_silent_or_fails_to_close(monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", Fake(2, ends=ends))
    heard = []
    with pytest.raises(UserError, match="what was heard until then is kept"):
        for block in microphone(silent_seconds=0.05):
            heard.append(block)
    assert len(heard) == 2


def test_closing_the_iteration_closes_the_microphone(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(3)
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    blocks = microphone()
    next(blocks)
    blocks.close()  # type: ignore[attr-defined]
    assert fake.closed


def test_a_recogniser_that_is_too_slow_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(2000, ends="silent")
    monkeypatch.setitem(sys.modules, "sounddevice", fake)

    heard = []

    def slowly() -> None:
        blocks = microphone(silent_seconds=0.05)
        heard.append(next(blocks)[0])
        fake.streams[0].thread.join()
        heard.extend(block[0] for block in blocks)

    with pytest.raises(UserError, match=r"[0-9]+ blocks were lost: the recogniser is too slow"):
        slowly()
    # all that waited is heard, and nothing from behind the gap
    assert heard == list(range(len(heard))) and len(heard) >= 750


def test_audio_that_the_driver_lost_is_told_once_a_gap(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", Fake(20, overflows=(5, 6, 7, 15)))
    heard = []
    with pytest.raises(UserError, match="has gone"):
        for block in microphone():
            heard.append(block[0])
    assert heard == list(range(20))
    assert capsys.readouterr().err.splitlines() == [
        "kd: microphone: audio was lost at 0.4 s",
        "kd: microphone: audio was lost at 1.2 s",
    ]


def test_a_missing_package_and_a_missing_microphone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(UserError, match="pip install sounddevice"):
        next(microphone())
    monkeypatch.setitem(sys.modules, "sounddevice", Fake(0, refuse="Error querying device -1"))
    with pytest.raises(UserError, match=r"the default one\): cannot be opened at 16 kHz: Error querying device -1"):
        next(microphone())
