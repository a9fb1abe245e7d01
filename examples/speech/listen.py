"""Streams a file, or --mic until Ctrl-C, to `kd speech serve` at the pace of speech: listen.py FILE|--mic [URL]"""

import json
import sys
import time
from contextlib import suppress

import soundfile
from websockets.sync.client import connect

source, url, *_ = [*(sys.argv[1:] or sys.exit(__doc__)), "ws://127.0.0.1:8000/v1/listen"]
if source == "--mic":
    import sounddevice  # pip install sounddevice

    audio, pause = sounddevice.RawInputStream(channels=1, dtype="int16"), 0.0
    packets = iter(lambda: bytes(audio.read(int(audio.samplerate) // 10)[0]), b"")
else:
    audio, pause = soundfile.SoundFile(source), 0.1
    packets = iter(lambda: bytes(audio.buffer_read(audio.samplerate // 10, "int16")), b"")


def show(said: dict) -> None:
    if said["type"] == "error":
        sys.exit(said["error"]["message"])
    text = said.get("text", "")
    print("\r\x1b[K" + (f"{text}\n" if said["type"] == "final" else text[-79:]), end="", flush=True)


with audio, connect(f"{url}?rate={audio.samplerate:.0f}&channels={audio.channels}") as socket:
    due = time.monotonic()
    with suppress(KeyboardInterrupt):
        for packet in packets:
            due += pause
            with suppress(TimeoutError):
                while True:
                    show(json.loads(socket.recv(timeout=due - time.monotonic())))
            socket.send(packet)
    socket.send('{"type": "stop"}')
    for message in socket:
        show(json.loads(message))
