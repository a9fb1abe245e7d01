"""Opus packets out of WebM and Ogg, in pieces of any size, as browsers record them. No torch.

Sources: Matroska (RFC 9559), Ogg (RFC 3533), Opus in Ogg (RFC 7845).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from kdcore.config import UserError

# the longest packet of Opus, and with it the longest element or page that is kept
_PACKET = 61_440
_KEPT = 1 << 17


@dataclass(frozen=True)
class OpusHead:
    """What stands before the packets: channels, samples at 48 kHz that are left out at the start."""

    channels: int
    pre_skip: int

    @classmethod
    def read(cls, data: bytes) -> OpusHead:
        """Return what an identification header says; UserError where it is none or has another mapping of channels."""
        if len(data) < 19 or not data.startswith(b"OpusHead") or data[8] >= 16:
            raise UserError("audio: the Opus header is damaged")
        channels, pre_skip, family = data[9], int.from_bytes(data[10:12], "little"), data[18]
        if family or channels not in (1, 2):
            raise UserError(f"audio: Opus with {channels} channels of mapping {family}; wanted mono or stereo")
        return cls(channels, pre_skip)


class Demuxer(Protocol):
    """Bytes to packets; ``head`` is known once the first packet is."""

    head: OpusHead | None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take bytes and yield the packets that are complete; UserError for what is not the format."""

    @property
    def torn(self) -> bool:
        """Whether the bytes so far end within something."""


# elements of WebM: those that are gone into, and those that are looked at
_EBML, _SEGMENT, _CLUSTER, _TRACKS, _TRACK, _GROUP = 0x1A45DFA3, 0x18538067, 0x1F43B675, 0x1654AE6B, 0xAE, 0xA0
_INFO = 0x1549A966
_INSIDE = {_SEGMENT, _INFO, _CLUSTER, _TRACKS, _TRACK, _GROUP}
_NUMBER, _CODEC, _PRIVATE, _SIMPLE_BLOCK, _BLOCK = 0xD7, 0x86, 0x63A2, 0xA3, 0xA1
_SCALE, _DURATION = 0x2AD7B1, 0x4489
_LOOKED_AT = {_NUMBER, _CODEC, _PRIVATE, _SIMPLE_BLOCK, _BLOCK, _SCALE, _DURATION}


class WebM:
    """WebM with one Opus track, as MediaRecorder writes it; other tracks are passed over.

    Elements that hold others are gone into without regard to where they end, so sizes that a live recording does not
    know yet do not matter.
    """

    def __init__(self) -> None:
        self.head: OpusHead | None = None
        self._data = bytearray()
        self._skip = 0
        self._began = False
        self._number: int | None = None
        self._codec = b""
        self._private = b""
        self._opus: int | None = None
        self._scale, self._duration = 1_000_000, 0.0

    @property
    def torn(self) -> bool:
        """Whether the bytes so far end within an element."""
        return bool(self._data) or self._skip > 0

    @property
    def seconds(self) -> float | None:
        """The length that its head states, known once the first packet is; None where it states none."""
        seconds = self._duration * self._scale / 1e9
        return seconds if 0 < seconds < math.inf else None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take bytes and yield Opus packets."""
        passed = min(self._skip, len(data))
        self._skip -= passed
        self._data += memoryview(data)[passed:]
        while self._data:
            found = self._element()
            if found is None:
                return
            name, content = found
            if name in (_SIMPLE_BLOCK, _BLOCK):
                yield from self._block(content)
            elif content:
                self._note(name, content)

    def _element(self) -> tuple[int, bytes] | None:
        """Return the next element, its content empty if nobody looks at it; None if it is not complete."""
        data = self._data
        if not self._began and not b"\x1a\x45\xdf\xa3".startswith(data[:4]):
            raise UserError("audio: is no WebM (it does not begin with an EBML header)")
        width = 9 - data[0].bit_length() if data[0] else 9
        if width > 4:
            raise UserError("audio: the WebM is damaged (an element without a name)")
        if len(data) <= width:
            return None
        extra = 9 - data[width].bit_length() if data[width] else 9
        if extra > 8:
            raise UserError("audio: the WebM is damaged (an element without a size)")
        start = width + extra
        if len(data) < start:
            return None
        name = int.from_bytes(data[:width], "big")
        size = int.from_bytes(data[width:start], "big") & ((1 << 7 * extra) - 1)
        unknown = size == (1 << 7 * extra) - 1
        self._began = True
        if name in _INSIDE:
            del data[:start]
            if name == _TRACK:
                self._number, self._codec, self._private = None, b"", b""
            return name, b""
        if unknown:
            raise UserError("audio: the WebM is damaged (an element of unknown size)")
        if name in _LOOKED_AT:
            if size > _KEPT:
                raise UserError(f"audio: the WebM is damaged (a block of {size} bytes)")
            if len(data) < start + size:
                return None
            content = bytes(data[start : start + size])
            del data[: start + size]
            return name, content
        passed = min(len(data), start + size)
        self._skip = start + size - passed
        del data[:passed]
        return name, b""

    def _note(self, name: int, content: bytes) -> None:
        """Note what is said of the length, and of a track, until all of an Opus track is known."""
        if name == _SCALE:
            self._scale = int.from_bytes(content[:8], "big")
        elif name == _DURATION and len(content) in (4, 8):
            (self._duration,) = struct.unpack(">f" if len(content) == 4 else ">d", content)
        elif name == _NUMBER:
            self._number = int.from_bytes(content[:8], "big")
        elif name == _CODEC:
            self._codec = content.rstrip(b"\0")
        elif name == _PRIVATE:
            self._private = content
        if self._opus is None and self._codec == b"A_OPUS" and self._number is not None and self._private:
            self._opus, self.head = self._number, OpusHead.read(self._private)

    def _block(self, content: bytes) -> Iterator[bytes]:
        if self._opus is None:
            raise UserError("audio: the WebM has no Opus track before its first block")
        width = 9 - content[0].bit_length() if content and content[0] else 9
        if width > 8 or len(content) < width + 3:
            raise UserError("audio: the WebM is damaged (a block without a head)")
        number = int.from_bytes(content[:width], "big") & ((1 << 7 * width) - 1)
        if number != self._opus:
            return
        if content[width + 2] & 0x06:
            raise UserError("audio: the WebM has laced blocks; wanted one packet a block, as browsers record")
        if len(content) > width + 3:
            yield content[width + 3 :]


class Ogg:
    """Ogg with Opus; further streams in it are passed over."""

    def __init__(self) -> None:
        self.head: OpusHead | None = None
        self._data = bytearray()
        self._serial: int | None = None
        self._packet = b""
        self._tags = False

    @property
    def torn(self) -> bool:
        """Whether the bytes so far end within a page or packet."""
        return bool(self._data or self._packet)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take bytes and yield Opus packets."""
        self._data += data
        while len(self._data) >= 27:
            if not self._data.startswith(b"OggS\0"):
                raise UserError("audio: is no Ogg, or damaged (no page where one must begin)")
            count = self._data[26]
            lacing = bytes(self._data[27 : 27 + count])
            size = 27 + count + sum(lacing)
            if len(lacing) < count or len(self._data) < size:
                return
            page = bytes(self._data[:size])
            del self._data[:size]
            if ogg_checksum(page[:22] + bytes(4) + page[26:]) != int.from_bytes(page[22:26], "little"):
                raise UserError("audio: the Ogg is damaged (a page with a wrong checksum)")
            yield from self._page(page, lacing)
        if self._data and not b"OggS\0".startswith(self._data[:5]):
            raise UserError("audio: is no Ogg, or damaged (no page where one must begin)")

    def _page(self, page: bytes, lacing: bytes) -> Iterator[bytes]:
        serial = int.from_bytes(page[14:18], "little")
        at = 27 + len(lacing)
        if self._serial is None and page[5] & 2 and page[at : at + 8] == b"OpusHead":
            self._serial = serial
        if serial != self._serial:
            if self._serial is None and not page[5] & 2:
                raise UserError("audio: the Ogg has no Opus stream")
            return
        if not page[5] & 1:
            self._packet = b""
        for size in lacing:
            self._packet += page[at : at + size]
            at += size
            if size < 255:
                packet, self._packet = self._packet, b""
                yield from self._take(packet)
            elif len(self._packet) > (_PACKET if self._tags else 1 << 20):
                raise UserError("audio: the Ogg is damaged (a packet longer than Opus has)")

    def _take(self, packet: bytes) -> Iterator[bytes]:
        if self.head is None:
            self.head = OpusHead.read(packet)
        elif not self._tags:
            self._tags = True
        elif packet:
            yield packet


_REVERSED = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))


def ogg_checksum(page: bytes) -> int:
    """Return the checksum of a page whose own checksum is zero: zlib's polynomial, bits the other way round."""
    import zlib

    crc = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(crc.to_bytes(4, "big").translate(_REVERSED)[::-1], "big")


def ogg_page(packets: list[bytes], position: int, number: int, flags: int) -> bytes:
    """Return a page of whole packets; ValueError if they do not fit. ``position`` is in samples at 48 kHz."""
    lacing = b"".join(b"\xff" * (len(packet) // 255) + bytes([len(packet) % 255]) for packet in packets)
    if len(lacing) > 255:
        raise ValueError(f"packets: got {len(lacing)} segments, wanted at most 255 in a page")
    head = b"OggS\0" + bytes([flags]) + struct.pack("<qIII", position, 1, number, 0) + bytes([len(lacing)]) + lacing
    page = head + b"".join(packets)
    return page[:22] + ogg_checksum(page).to_bytes(4, "little") + page[26:]
