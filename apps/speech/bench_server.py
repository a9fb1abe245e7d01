"""Live streams at a served recogniser: real time, all at once, and one too many."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np

from apps.speech.features import SAMPLE_RATE
from apps.speech.latency import summarise
from apps.speech.runtime import Recognizer
from kdcore.child_processes import ServerProcess

# what a microphone sends at once
_PACKET_SECONDS = 0.1
# connections that are tried beyond the limit
_BEYOND = 8
# one that is refused is told at once
_REFUSAL_SECONDS = 2.0


def streamed(folder: Path, clips: Sequence[np.ndarray], *, streams: int, seconds: float, work: Path) -> dict[str, Any]:
    """Return how long ``streams`` clients wait for the end of what they said, and what happens to more of them.

    Each client sends clips (float32 [n] at 16 kHz) for about ``seconds``, as fast as they are spoken. The server and
    they share this machine. The words heard in company are compared with those of each stream by itself.
    """
    words = ["-m", "apps.cli", "speech", "serve", "--model", str(folder), "--port", "0", "--max-streams", str(streams)]
    with ServerProcess([sys.executable, *words], work) as server:
        found = asyncio.run(
            _all(f"ws://127.0.0.1:{server.port}/v1/listen", Recognizer(folder), clips, streams, seconds)
        )
        found["server_cpu_seconds"] = server.cpu_seconds()
        found["server_megabytes"] = server.memory()["rss"] / 1e6
    return found


async def _all(
    address: str, recognizer: Recognizer, clips: Sequence[np.ndarray], streams: int, seconds: float
) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    said = [_speech(clips, generator, seconds) for _ in range(streams)]
    alone = [_alone(recognizer, audio) for audio in said]
    began = asyncio.Event()
    speaking = [
        asyncio.create_task(_speak(address, audio, began, float(generator.uniform(0.0, _PACKET_SECONDS))))
        for audio in said
    ]
    while not all(await _opened(address, streams)):
        await asyncio.sleep(0.05)
    began.set()
    refused = [await _refusal(address) for _ in range(_BEYOND)]
    ended = await asyncio.gather(*speaking)
    waits: list[float | None] = [wait for wait, _ in ended]
    return {
        "streams": streams,
        "audio_seconds": sum(len(audio) for audio in said) / SAMPLE_RATE,
        "final_ms": summarise(waits),
        "streams_with_words": sum(bool(words) for _, words in ended),
        "words": sum(len(words) for words in alone),
        "words_as_alone": sum(_same(words, wanted) for (_, words), wanted in zip(ended, alone, strict=True)),
        "beyond_the_limit": {"tried": _BEYOND, "refused": sum(code == "overloaded" for code in refused)},
    }


async def _opened(address: str, streams: int) -> list[bool]:
    """Return whether the server has all streams, by what its health says."""
    host, port = address.removeprefix("ws://").partition("/")[0].split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    body = (await reader.read()).partition(b"\r\n\r\n")[2]
    writer.close()
    return [json.loads(body)["streams"] >= streams]


def _speech(clips: Sequence[np.ndarray], generator: np.random.Generator, seconds: float) -> np.ndarray:
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < seconds * SAMPLE_RATE:
        parts.append(clips[int(generator.integers(len(clips)))])
    return np.concatenate(parts)


def _sixteen(audio: np.ndarray) -> np.ndarray:
    return (np.clip(audio, -1.0, 1.0) * 32767).astype("<i2")


def _alone(recognizer: Recognizer, audio: np.ndarray) -> list[str]:
    """Return the words of a stream that the network hears by itself."""
    samples = _sixteen(audio).astype(np.float32) / 32768
    finals = [segment for update in recognizer.transcribe([samples]) for segment in update.final]
    return [word["word"] for segment in finals for word in segment.words]


def _same(words: Sequence[str], wanted: Sequence[str]) -> int:
    """Return how many words two texts share, in order."""
    return sum(block.size for block in SequenceMatcher(None, words, wanted, autojunk=False).get_matching_blocks())


async def _speak(address: str, audio: np.ndarray, began: asyncio.Event, late: float) -> tuple[float, list[str]]:
    """Return the milliseconds from the end of the audio to the server's last word, and the words."""
    from websockets.asyncio.client import connect

    packet = round(_PACKET_SECONDS * SAMPLE_RATE)
    sixteen = _sixteen(audio)
    async with connect(address, compression=None, max_queue=None) as socket:
        await began.wait()
        await asyncio.sleep(late)
        started = time.perf_counter()
        for place, start in enumerate(range(0, len(sixteen), packet)):
            # a packet is there when it has been spoken
            await asyncio.sleep(started + (place + 1) * _PACKET_SECONDS - time.perf_counter())
            await socket.send(sixteen[start : start + packet].tobytes())
        await socket.send('{"type": "stop"}')
        stopped, words = time.perf_counter(), list[str]()
        async for text in socket:
            message = json.loads(text)
            if message["type"] == "final":
                words += [word["word"] for word in message["words"]]
            elif message["type"] == "end":
                break
        return (time.perf_counter() - stopped) * 1e3, words


async def _refusal(address: str) -> str:
    """Return the code with which a stream is refused, nothing where it is not."""
    from websockets.asyncio.client import connect

    async with connect(address, compression=None) as socket:
        try:
            message = json.loads(await asyncio.wait_for(socket.recv(), _REFUSAL_SECONDS))
        except TimeoutError:
            return ""
        return str(message["error"]["code"]) if message["type"] == "error" else ""
