"""Speech from espeak-ng, the same for the same request: each clip is spoken by a fork of a fresh engine.

espeak-ng keeps state between calls, so a clip would depend on those before it. A child process, which has no threads
and may therefore fork, initialises the engine once; each request is answered by a fork of it that speaks one clip and
ends. The child runs this file by itself, hence standard library only at its top.

espeak-ng (GPL-3) comes with the package ``espeakng-loader``, which is optional and no part of this one.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import struct
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_HEADER = struct.Struct("<iI")  # status (0: well, else what went wrong is the body), bytes that follow
_CLIP_SECONDS = 30  # of computing, thousands of times what a sentence needs: a clip that takes longer hangs
# from espeak-ng's speak_lib.h
_SYNCHRONOUS, _DONT_EXIT, _UTF8, _PHONEMES = 2, 0x8000, 1, 0x100
# setting of a voice: number of espeak-ng's parameter, least and largest value
_SETTINGS = {
    **{"rate": (1, 80, 450), "volume": (2, 0, 100), "pitch": (3, 0, 100), "range": (4, 0, 100), "gap": (7, 0, 100)},
}


@dataclass(frozen=True)
class Voice:
    """How to speak: ``name`` is espeak-ng's (``en-us+f3``: language and variant), ``rate`` in words a minute (80 to
    450), ``pitch`` and its ``range`` from 0 to 100, ``gap`` between words (0 to 100, in units of 10 ms at the default
    rate), ``volume`` from 0 to 100.
    """

    name: str
    rate: int = 160
    pitch: int = 50
    range: int = 50
    gap: int = 0
    volume: int = 50


class Speaker:
    """A running engine; use it in a ``with`` statement.

    Raises:
        UserError: ``espeakng-loader`` is not installed, or its library does not load on this machine.
    """

    def __init__(self) -> None:
        from kdcore.config import UserError

        try:
            import espeakng_loader
        except ImportError:
            raise UserError("simulated speech is spoken by espeak-ng: pip install kdsuite[simulate]") from None
        command = [sys.executable, "-I", __file__, espeakng_loader.get_library_path(), espeakng_loader.get_data_path()]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            about = json.loads(self._answer())
        except RuntimeError as error:
            self.close()
            raise UserError(f"espeak-ng does not start: {error}") from None
        self.sample_rate: int = about["sample_rate"]
        self.version: str = about["version"]

    def __enter__(self) -> Speaker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the engine."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # an unsent request to a process that died
                self._process.stdin.close()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process.wait()

    def speak(self, text: str, voice: Voice) -> np.ndarray:
        """Return ``text`` as int16 [n] samples at ``sample_rate``; ``[[...]]`` in it holds espeak-ng's phonemes.

        Raises: ValueError on a voice that espeak-ng does not have or a setting out of range; RuntimeError if it fails.
        """
        import numpy as np

        stdin = self._process.stdin
        if stdin is None or stdin.closed:
            raise RuntimeError("the engine is closed")
        with suppress(BrokenPipeError):  # reading the answer says what happened
            stdin.write(json.dumps({"text": text, **asdict(voice)}).encode() + b"\n")
            stdin.flush()
        return np.frombuffer(self._answer(), dtype="<i2")

    def _answer(self) -> bytes:
        status, size = _HEADER.unpack(self._read(_HEADER.size))
        body = self._read(size)
        if status == 1:
            raise ValueError(body.decode())
        if status:
            raise RuntimeError(body.decode())
        return body

    def _read(self, size: int) -> bytes:
        stdout = self._process.stdout
        data = stdout.read(size) if stdout is not None else b""
        if len(data) < size:
            raise RuntimeError(f"the process that speaks has ended (status {self._process.wait()})")
        return data


class _Engine:
    """The library, loaded and initialised; one for a process."""

    def __init__(self, library: str, data: str) -> None:
        self.library = ctypes.CDLL(library)
        self.library.espeak_Synth.argtypes = [
            *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint),
            *(ctypes.c_void_p, ctypes.c_void_p),
        ]
        self.library.espeak_Info.restype = ctypes.c_char_p
        self.library.espeak_Info.argtypes = [ctypes.c_void_p]
        self.sample_rate = self.library.espeak_Initialize(_SYNCHRONOUS, 0, os.fsencode(data), _DONT_EXIT)
        if self.sample_rate <= 0:
            raise RuntimeError(f"espeak_Initialize returned {self.sample_rate} with the data in {data}")
        self.variants = {"", *os.listdir(os.path.join(data, "voices", "!v"))}
        self.pieces: list[bytes] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = kind(self._take)  # kept here: C holds no reference
        self.library.espeak_SetSynthCallback(self.callback)
        self.library.espeak_SetVoiceByName(b"en-us")  # reads the dictionary once for all forks

    def about(self) -> bytes:
        """Return sample rate and version as JSON."""
        return json.dumps(
            {"sample_rate": self.sample_rate, "version": self.library.espeak_Info(None).decode()}
        ).encode()

    def speak(self, request: dict[str, Any]) -> bytes:
        """Return 16-bit samples; raises ValueError on an unknown voice, RuntimeError if espeak-ng fails."""
        variant = request["name"].partition("+")[2]
        # a variant that is not there would be passed over in silence, a setting out of range be clipped
        if variant not in self.variants or self.library.espeak_SetVoiceByName(request["name"].encode()):
            raise ValueError(f"espeak-ng has no voice {request['name']!r}")
        for name, (parameter, low, high) in _SETTINGS.items():
            if not low <= request[name] <= high:
                raise ValueError(f"{name}: got {request[name]}, wanted {low} to {high}")
            self.library.espeak_SetParameter(parameter, request[name], 0)
        # the flutter and breath of some voices is random, and seeded by the clock
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        text = request["text"].encode()
        if self.library.espeak_Synth(text, len(text) + 1, 0, 1, 0, _UTF8 | _PHONEMES, None, None):
            raise RuntimeError("espeak_Synth failed")
        self.library.espeak_Synchronize()
        return b"".join(self.pieces)

    def _take(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self.pieces.append(ctypes.string_at(samples, 2 * count))
        return 0


def _forked(engine: _Engine, request: dict[str, Any]) -> tuple[int, bytes]:
    """Return status and body of one request, answered by a fork of this process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.alarm(_CLIP_SECONDS)
        try:
            with open(writer, "wb") as pipe:
                _reply(pipe, engine, request)
        finally:
            os._exit(0)  # nothing of the parent's, such as its buffers, is ended twice
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    _, ended = os.waitpid(child, 0)
    if len(answer) < _HEADER.size:
        return 2, f"espeak-ng ended with {ended} while it spoke {request['text']!r}".encode()
    return _HEADER.unpack_from(answer)[0], answer[_HEADER.size :]


def _reply(pipe: IO[bytes], engine: _Engine, request: dict[str, Any]) -> None:
    try:
        status, body = 0, engine.speak(request)
    except (ValueError, RuntimeError) as error:
        status, body = (1 if isinstance(error, ValueError) else 2), str(error).encode()
    _write(pipe, status, body)


def _write(pipe: IO[bytes], status: int, body: bytes) -> None:
    pipe.write(_HEADER.pack(status, len(body)) + body)
    pipe.flush()


def _serve(library: str, data: str) -> None:
    """Answer requests, a line of JSON each, until the input ends."""
    pipe = sys.stdout.buffer
    try:
        engine = _Engine(library, data)
    except (OSError, AttributeError, RuntimeError) as error:
        _write(pipe, 2, str(error).encode())
        return
    _write(pipe, 0, engine.about())
    for line in sys.stdin.buffer:
        _write(pipe, *_forked(engine, json.loads(line)))


if __name__ == "__main__":
    _serve(*sys.argv[1:])
