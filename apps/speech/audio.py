"""Audio of any rate, width and channel count, read as 16 kHz mono in [-1, 1]; whole, a part, or block by block.

Files are decoded by libsndfile and resampled by soxr, both as a stream: memory does not grow with the
file. A file that is damaged is refused with its name and the reason; one that is merely bad (silent, clipped, offset)
is read, and ``Examination`` says what is wrong with it. No torch.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from apps.speech.features import SAMPLE_RATE
from kdcore.config import UserError

if TYPE_CHECKING:
    import soundfile

PathLike = str | os.PathLike[str]

# what is read whole; longer audio is read in blocks (230 MB of samples here)
LONGEST_SECONDS = 3600.0
_RATES = (1_000, 768_000)
_BLOCK_VALUES = 1 << 20  # decoded at once: samples times channels
_OGG_PAGE = 65_307  # bytes of the largest
_LOUDEST = 8.0  # a float file beyond that does not hold samples in [-1, 1]
_UNKNOWN_FRAMES = 1 << 60  # libsndfile's word for a stream without a length
_PLACEHOLDER = 0x7FFF0000  # the size that a program which writes to a pipe puts in a header
# clipped audio reaches so far, and its clipped samples this share of the peak
_CLIPPED_PEAK, _LOUD = 0.98, 0.985
# levels of full scale, and the lowest one of a sample that may be clipped
_LEVELS = 1 << 15
_LEAST_LEVEL = int(_LOUD * _CLIPPED_PEAK * _LEVELS)
_SHORT = re.compile(r"^\s*(?:data|SSND|Data [Ss]ize|Riff size|riff)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)


@dataclass(frozen=True)
class AudioInfo:
    """What the header of a file says: length in seconds, samples per second, channels."""

    seconds: float
    rate: int
    channels: int


def is_beginning(duration: float, seconds: float) -> bool:
    """Return whether a duration without an offset means the beginning of a longer file, of so many seconds.

    Up to a tenth of a second is rounding, or a last block, and it means the whole file.
    """
    return duration < seconds - 0.1


def audio_info(path: PathLike) -> AudioInfo:
    """Return what the header says; nothing is decoded.

    Raises:
        UserError: as ``read_audio``, for what can be seen without decoding.
    """
    with _opened(path) as (handle, _):
        return AudioInfo(handle.frames / handle.samplerate, handle.samplerate, handle.channels)


def read_audio(
    path: PathLike, *, channel: int | str = "mix", start: float = 0.0, seconds: float | None = None
) -> np.ndarray:
    """Return samples float32 [n] in [-1, 1] at 16 kHz.

    Options: ``channel`` is "mix" (the mean of all) or a number from 0; ``start`` and ``seconds`` cut a part, at the
    file's own rate, before it is resampled (what goes beyond the end is left out). Float samples beyond [-1, 1] are
    clipped, as a converter would.

    Raises:
        UserError: missing, a folder, not audio, truncated, without samples or a length, with NaN or infinite samples,
            not in [-1, 1], no such channel, a part that begins after the end, longer than ``LONGEST_SECONDS``.
    """
    with _opened(path) as (handle, name):
        return _read(handle, name, channel, start, seconds)


def decode_audio(data: bytes, name: str, *, channel: int | str = "mix") -> np.ndarray:
    """Return samples float32 [n] at 16 kHz of a whole file in memory; errors as ``read_audio``, under ``name``."""
    with _decoder(io.BytesIO(data), name) as handle:
        return _read(handle, name, channel, 0.0, None)


def blocks(
    path: PathLike, seconds: float, *, channel: int | str = "mix", start: float = 0.0, length: float | None = None
) -> Iterator[np.ndarray]:
    """Yield a file of any length in blocks float32 [seconds * 16000] (the last one shorter), in constant memory.

    Put together they are what ``read_audio`` returns (its ``seconds`` is ``length`` here): resampling does not see the
    cuts. Errors as there; one in the middle of a file comes after the blocks before it.
    """
    size = round(seconds * SAMPLE_RATE)
    if size < 1:
        raise ValueError(f"seconds: got {seconds}, wanted at least one sample")
    with _opened(path) as (handle, name):
        kept: list[np.ndarray] = []
        count = 0
        for piece in _stream(handle, name, channel, _begun(handle, name, start, length)):
            kept.append(piece)
            count += len(piece)
            if count >= size:
                joined = np.concatenate(kept)
                whole = count // size * size
                yield from np.split(joined[:whole], whole // size)
                kept, count = [joined[whole:]], count - whole
        if count:
            yield np.concatenate(kept)


def resample(samples: np.ndarray, up: int, down: int) -> np.ndarray:
    """Return samples float32 [n * up / down, rounded] at ``up / down`` times the rate, without a delay."""
    if samples.ndim != 1 or samples.dtype != np.float32:
        raise ValueError(f"samples: wanted float32 [n], got {samples.dtype} {samples.shape}")
    resampler = Resampler(down, up)
    return np.concatenate([resampler.accept(samples), resampler.finish()])


class Resampler:
    """Samples of a stream at another rate, by soxr: flat to 91 % of the lower Nyquist frequency, nothing above it.

    What comes out does not depend on how the stream is cut.
    """

    def __init__(self, rate: int, to: int = SAMPLE_RATE) -> None:
        import soxr

        self._stream = soxr.ResampleStream(rate, to, 1, dtype="float32", quality="HQ") if rate != to else None

    def accept(self, samples: np.ndarray) -> np.ndarray:
        """Take samples float32 [n] and return those float32 [m] that are complete now."""
        return self._made(samples, last=False)

    def finish(self) -> np.ndarray:
        """End the stream and return the rest."""
        return self._made(np.zeros(0, np.float32), last=True)

    def _made(self, samples: np.ndarray, last: bool) -> np.ndarray:
        return samples if self._stream is None else self._stream.resample_chunk(samples, last=last)


class Examination:
    """What is wrong with samples that can be read: silence, clipping, an offset; they come in packets of any size.

    Only sums and counts are kept, and ``remarks`` does not depend on how the audio is cut.
    """

    def __init__(self) -> None:
        self._count = 0
        self._sum = 0.0
        self._low, self._high = math.inf, -math.inf
        # loud samples, and runs of three, by level: how loud a clipped sample is, only the peak of all of them tells
        self._loud = self._runs = np.zeros(_LEVELS - _LEAST_LEVEL + 1, np.int64)
        self._last = np.zeros(2, np.float32)

    def accept(self, samples: np.ndarray) -> None:
        """Take samples float32 [n] in [-1, 1], n >= 0."""
        if not len(samples):
            return
        self._count += len(samples)
        self._sum += float(samples.sum(dtype=np.float64))
        low, high = float(samples.min()), float(samples.max())
        self._low, self._high = min(self._low, low), max(self._high, high)
        if max(high, -low) * _LEVELS < _LEAST_LEVEL:  # most packets: nothing to count, nor across their edges
            self._last = np.zeros(2, np.float32)
            return
        sizes = np.concatenate([self._last, np.abs(samples)])
        self._loud = self._loud + _by_level(sizes[2:])
        self._runs = self._runs + _by_level(np.minimum(np.minimum(sizes[2:], sizes[1:-1]), sizes[:-2]))
        self._last = sizes[-2:].copy()  # not the whole packet

    def remarks(self) -> list[str]:
        """Return what is wrong with the samples so far, a remark each; nothing for good ones."""
        if not self._count:
            return ["no samples"]
        mean, peak = self._sum / self._count, max(self._high, -self._low)
        found = []
        if abs(mean) >= 0.01:
            found.append(f"DC offset of {100 * mean:+.1f} % of full scale")
        # as float32: the mean of equal samples is theirs but for the rounding of the sum
        swing = float(max(np.float32(self._high) - np.float32(mean), np.float32(mean) - np.float32(self._low)))
        if swing < 1e-3:
            level = f"peak {20 * math.log10(swing):.0f} dB" if swing > 0 else "digital"
            found.append(f"silence ({level})")
        if peak >= _CLIPPED_PEAK:
            # three in a row near the peak: one loud sample is no clipping
            least = int(_LOUD * min(peak, 1.0) * _LEVELS) - _LEAST_LEVEL
            if self._runs[least:].sum() >= max(5, 5e-4 * self._count):
                share = 100 * self._loud[least:].sum() / self._count
                found.append(f"clipping ({share:.2f} % of the samples at the limit)")
        return found


def _by_level(sizes: np.ndarray) -> np.ndarray:
    """Return how many of sizes float32 [n] have each level from ``_LEAST_LEVEL``."""
    loud = np.minimum(sizes[sizes >= _LEAST_LEVEL / _LEVELS], 1.0) * _LEVELS
    return np.bincount(loud.astype(np.int64) - _LEAST_LEVEL, minlength=_LEVELS - _LEAST_LEVEL + 1)


def examine(samples: np.ndarray) -> list[str]:
    """Return what is wrong with whole audio, samples float32 [n] in [-1, 1], as ``Examination.remarks``."""
    examination = Examination()
    examination.accept(samples)
    return examination.remarks()


@contextmanager
def _opened(path: PathLike) -> Iterator[tuple[soundfile.SoundFile, str]]:
    name = os.fspath(path)
    if "\0" in name:
        raise UserError(f"{name!r}: is no name of a file")
    if not os.path.isfile(name):
        what = "is a folder" if os.path.isdir(name) else "is no file" if os.path.exists(name) else "does not exist"
        raise UserError(f"{name}: {what}; wanted an audio file")
    try:
        with open(name, "rb") as stream, _decoder(stream, name) as handle:
            yield handle, name
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from None


@contextmanager
def _decoder(stream: io.BufferedReader | io.BytesIO, name: str) -> Iterator[soundfile.SoundFile]:
    """Open what is in ``stream``; whatever libsndfile says about it becomes one line with the file's name."""
    import soundfile

    if not stream.read(1):
        raise UserError(f"{name}: is empty (0 bytes); wanted audio")
    stream.seek(0)
    try:
        handle = soundfile.SoundFile(stream)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: headerless, as a file named .raw
        raise UserError(f"{name}: cannot be read as audio: {_reason(error)}") from None
    with handle:
        low, high = _RATES
        if not low <= handle.samplerate <= high:
            raise UserError(f"{name}: has {handle.samplerate} samples a second, wanted {low} to {high}")
        if handle.frames >= _UNKNOWN_FRAMES:
            raise UserError(f"{name}: states no length (a stream, saved as it came?); convert it to a whole file")
        _refuse_truncated(handle, stream, name)
        try:
            yield handle
        except soundfile.LibsndfileError as error:
            raise UserError(f"{name}: is damaged or truncated: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    text = str(getattr(error, "error_string", error))
    return " ".join(text.split()).removeprefix("Error : ").rstrip(".")


def _refuse_truncated(handle: soundfile.SoundFile, stream: io.BufferedReader | io.BytesIO, name: str) -> None:
    """Raise where a header states more than the file holds, which libsndfile only notes in its log."""
    for stated, held in _SHORT.findall(handle.extra_info):
        if int(held) < int(stated) < _PLACEHOLDER:
            raise UserError(f"{name}: is truncated: the header states {stated} bytes of audio, {held} are there")
    if handle.format == "NIST":
        at = stream.tell()
        stream.seek(0)
        header = re.search(rb"^sample_count -i (\d+)", stream.read(4096), re.MULTILINE)
        stream.seek(at)
        if header and int(header[1]) > handle.frames:
            raise UserError(
                f"{name}: is truncated: the header states {int(header[1])} samples, {handle.frames} are there"
            )

    if handle.format == "OGG":
        at = stream.tell()
        whole = _ogg_ends(stream)
        stream.seek(at)
        if not whole:
            raise UserError(f"{name}: is truncated: no last page of Ogg says that the stream ends")


def _ogg_ends(stream: io.BufferedReader | io.BytesIO) -> bool:
    """Return whether the last page of an Ogg file is whole and marked as its stream's last (RFC 3533)."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - 2 * _OGG_PAGE))
    tail = stream.read()
    at = len(tail)
    while (at := tail.rfind(b"OggS\0", 0, at)) >= 0:
        segments = tail[at + 26] if at + 26 < len(tail) else None
        if segments is not None and at + 27 + segments <= len(tail):
            sizes = tail[at + 27 : at + 27 + segments]
            return at + 27 + segments + sum(sizes) <= len(tail) and bool(tail[at + 5] & 4)
    return False


def _begun(handle: soundfile.SoundFile, name: str, start: float, seconds: float | None) -> int | None:
    """Go to where a part begins; return how many frames it has at most."""
    if not (start >= 0 and math.isfinite(start)) or (seconds is not None and not seconds > 0):
        raise ValueError(f"start, seconds: got {start}, {seconds}, wanted start >= 0 and seconds > 0")
    rate, frames = handle.samplerate, handle.frames
    first = round(start * rate)
    if first >= frames > 0:
        raise UserError(f"{name}: begins at {start:g} s, but is only {frames / rate:g} s long")
    if first:
        handle.seek(first)
    return None if seconds is None else max(1, round(seconds * rate))


def _read(
    handle: soundfile.SoundFile, name: str, channel: int | str, start: float, seconds: float | None
) -> np.ndarray:
    pieces, count = [], 0
    for piece in _stream(handle, name, channel, _begun(handle, name, start, seconds)):
        pieces.append(piece)
        count += len(piece)
        if count > LONGEST_SECONDS * SAMPLE_RATE:
            raise UserError(f"{name}: is longer than {LONGEST_SECONDS / 60:g} minutes; read it in parts or in blocks")
    if not count:  # a few at a high rate
        raise UserError(f"{name}: has no samples at 16 kHz")
    return np.concatenate(pieces)


def _stream(handle: soundfile.SoundFile, name: str, channel: int | str, limit: int | None) -> Iterator[np.ndarray]:
    """Yield pieces at 16 kHz, clipped to [-1, 1]."""
    number = _channel_number(handle, name, channel)
    resampler = Resampler(handle.samplerate)
    for block in _decoded(handle, name, limit):
        mono = block.mean(axis=1, dtype=np.float32) if number is None else np.ascontiguousarray(block[:, number])
        yield np.clip(resampler.accept(mono), -1.0, 1.0)
    yield np.clip(resampler.finish(), -1.0, 1.0)


def _channel_number(handle: soundfile.SoundFile, name: str, channel: int | str) -> int | None:
    if channel == "mix":
        return None
    try:
        number = int(channel)
    except ValueError:
        raise UserError(f"channel: got {channel!r}, wanted 'mix' or a number from 0") from None
    if not 0 <= number < handle.channels:
        raise UserError(f"{name}: has no channel {number}; it has {handle.channels}, the first is 0")
    return number


def _decoded(handle: soundfile.SoundFile, name: str, limit: int | None) -> Iterator[np.ndarray]:
    """Yield float32 [n, channels] from where the file stands, at most ``limit`` frames; raise if it ends too early."""
    size = max(1, _BLOCK_VALUES // handle.channels)
    at, total = handle.tell(), 0
    while limit is None or total < limit:
        block = handle.read(size if limit is None else min(size, limit - total), dtype="float32", always_2d=True)
        if not len(block):
            break
        _check_values(block, (at + total) / handle.samplerate, name)
        total += len(block)
        yield block
    declared = handle.frames
    # the length of an mp3 is an estimate
    slack = declared // 50 if handle.format == "MP3" else 0
    if limit is None and at + total < declared - slack:
        rate = handle.samplerate
        raise UserError(f"{name}: is truncated: {declared / rate:g} s are stated, {(at + total) / rate:g} s are there")
    if not total:
        raise UserError(f"{name}: has no samples")


def _check_values(block: np.ndarray, start: float, name: str) -> None:
    if not np.isfinite(block).all():
        raise UserError(f"{name}: has a sample that is NaN or infinite in the block at {start:.3f} s")
    peak = float(np.abs(block).max())
    if peak > _LOUDEST:
        raise UserError(f"{name}: has samples up to {peak:g}; float audio must be in [-1, 1]")
