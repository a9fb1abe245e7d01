"""The microphone as blocks of samples, through the optional package sounddevice (PortAudio). No torch."""

from __future__ import annotations

import queue
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from apps.speech.audio import Resampler
from apps.speech.features import SAMPLE_RATE
from kdcore.config import UserError

BLOCK_SECONDS = 0.08
# without a block for so long the microphone is taken for gone: drivers do not always say so
SILENT_SECONDS = 3.0
# blocks that wait while the recogniser is slower than people speak: a minute
_WAITING = 750
_NEEDS = "the microphone needs the package sounddevice: pip install sounddevice"


def microphone(
    device: str | int | None = None, *, block_seconds: float = BLOCK_SECONDS, silent_seconds: float = SILENT_SECONDS
) -> Iterator[np.ndarray]:
    """Yield what a microphone hears, float32 [n] at 16 kHz, without end.

    Options: ``device`` is a number or a part of the name, the system's default if None; ``silent_seconds`` without a
    block end the iteration. A microphone without 16 kHz is heard at its own rate and resampled. Where the driver lost
    audio before it came here, a line on stderr says so, one for blocks in a row.

    Raises:
        UserError: sounddevice or PortAudio is missing, no such microphone, it disappears, or blocks are asked for more
            slowly than they come; what was heard before has been yielded by then.
    """
    sounddevice = _sounddevice()
    # blocks, and whether the driver lost audio before each
    heard: queue.Queue[tuple[np.ndarray, bool] | None] = queue.Queue(_WAITING)
    lost = 0

    def take(samples: np.ndarray, frames: int, time: Any, status: Any) -> None:
        nonlocal lost
        if lost or heard.full():  # nothing behind a gap is heard: words across it were never said
            lost += 1
        else:
            heard.put_nowait((np.array(samples[:, 0], np.float32), bool(status and status.input_overflow)))

    def stopped() -> None:
        try:
            heard.put_nowait(None)
        except queue.Full:  # the missing blocks say it
            return

    stream, rate = _opened(sounddevice, device, block_seconds, callback=take, finished_callback=stopped)
    resampler, count, before = Resampler(rate), 0, False
    try:
        with stream:
            while True:
                try:
                    taken = heard.get(timeout=0.0 if lost else silent_seconds)
                except queue.Empty:
                    taken = None
                if taken is None and lost:
                    raise UserError(f"microphone {_named(device)}: {lost} blocks were lost: the recogniser is too slow")
                if taken is None:
                    raise UserError(f"microphone {_named(device)}: has gone; what was heard until then is kept")
                block, overflowed = taken
                if overflowed and not before:
                    print(f"kd: microphone: audio was lost at {count / rate:.1f} s", file=sys.stderr)
                before, count = overflowed, count + len(block)
                yield np.clip(resampler.accept(block), -1.0, 1.0) if rate != SAMPLE_RATE else block
    except sounddevice.PortAudioError as error:
        raise UserError(f"microphone {_named(device)}: {_reason(error)}; what was heard until then is kept") from None


def _opened(sounddevice: Any, device: str | int | None, block_seconds: float, **callbacks: Any) -> tuple[Any, int]:
    """Return the stream of a microphone at 16 kHz, or at its own rate if it has no other, and that rate in Hz."""
    try:
        sounddevice.check_input_settings(device=device, channels=1, dtype="float32", samplerate=SAMPLE_RATE)
        rate = SAMPLE_RATE
    except (sounddevice.PortAudioError, ValueError):
        rate = 0
    try:
        rate = rate or round(sounddevice.query_devices(device, "input")["default_samplerate"])
        options = {"samplerate": rate, "channels": 1, "dtype": "float32", "device": device}
        return sounddevice.InputStream(blocksize=round(block_seconds * rate), **options, **callbacks), rate
    except (sounddevice.PortAudioError, ValueError) as error:
        at = f" at {rate / 1000:g} kHz" if rate else ""
        raise UserError(f"microphone {_named(device)}: cannot be opened{at}: {_reason(error)}") from None


def _sounddevice() -> Any:
    try:
        import sounddevice
    except ModuleNotFoundError:
        raise UserError(_NEEDS) from None
    except OSError as error:  # the package without the library that it calls
        raise UserError(f"{_NEEDS} (and PortAudio, as in apt install libportaudio2): {_reason(error)}") from None
    return sounddevice


def _named(device: str | int | None) -> str:
    return "(the default one)" if device is None else repr(device)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
