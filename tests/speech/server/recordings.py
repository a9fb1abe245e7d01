"""Opus recordings as browsers make them, written by hand."""

from __future__ import annotations

import io
import struct

import numpy as np
import soundfile

from apps.speech.server.containers import Ogg


def ogg_opus(samples: np.ndarray, rate: int = 48_000) -> bytes:
    """Return Ogg with Opus, as libsndfile writes it."""
    handle = io.BytesIO()
    soundfile.write(handle, np.repeat(samples, rate // 16_000), rate, format="OGG", subtype="OPUS")
    return handle.getvalue()


def element(name: int, content: bytes, *, unknown: bool = False) -> bytes:
    """Return an EBML element, its size in eight bytes."""
    size = b"\x01" + (b"\xff" * 7 if unknown else len(content).to_bytes(7, "big"))
    return name.to_bytes((name.bit_length() + 7) // 8, "big") + size + content


def webm(
    packets: list[bytes], *, live: bool = True, other_track: bool = True, lacing: int = 0, seconds: float | None = None
) -> bytes:
    """Return WebM with a block a packet; ``live`` leaves sizes unknown, as MediaRecorder does, who states no length."""
    head = b"OpusHead" + bytes([1, 1]) + (312).to_bytes(2, "little") + (48_000).to_bytes(4, "little") + bytes(3)
    tracks = element(0xAE, element(0xD7, b"\1") + element(0x86, b"V_VP8")) if other_track else b""
    tracks += element(0xAE, element(0xD7, b"\2") + element(0x86, b"A_OPUS") + element(0x63A2, head))
    clusters = b""
    for first in range(0, len(packets), 50):
        blocks = element(0xE7, first.to_bytes(2, "big"))
        for place, packet in enumerate(packets[first : first + 50]):
            block = b"\x82" + (20 * place).to_bytes(2, "big") + bytes([0x80 | lacing]) + packet
            blocks += element(0xA3, block) if place % 3 else element(0xA0, element(0xA1, block))
            if other_track and place % 10 == 0:
                blocks += element(0xA3, b"\x81\0\0\0not audio")
        clusters += element(0x1F43B675, blocks, unknown=live)
    info = element(0x4D80, b"by hand") + element(0x2AD7B1, (500_000).to_bytes(3, "big"))
    if seconds is not None:
        info = element(0x4489, struct.pack(">d", seconds * 2000)) + info
    body = element(0x1549A966, info) + element(0x1654AE6B, tracks) + element(0xEC, bytes(300)) + clusters
    return element(0x1A45DFA3, element(0x4282, b"webm")) + element(0x18538067, body, unknown=live)


def packets(ogg: bytes) -> list[bytes]:
    return list(Ogg().feed(ogg))
