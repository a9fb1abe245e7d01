"""Unpacks archives that strangers made: nothing leaves its folder, nothing grows without bound.

Refused: absolute names, ``..``, drive letters, backslashes, control characters, links, devices, sparse members,
encryption, names that are equal or equal but for case, too many members, and too many bytes. Bytes are counted as
they leave the decompressor; what a header says about sizes is never trusted. A folder appears complete or not at all.
"""

from __future__ import annotations

import errno
import gzip
import lzma
import os
import re
import shutil
import stat
import struct
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, Protocol, cast

from kdcore.config import UserError

CHUNK = 1 << 20
RATIO_FLOOR = 16 << 20  # bytes that are let through before the ratio counts: small text files compress well
HEADER_ALLOWANCE = 4 << 20  # bytes of tar headers between two members; a long name needs a few hundred
# zipfile raises RuntimeError for what it cannot decrypt or does not know, and others for headers that make no sense
DAMAGED = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, struct.error, EOFError,
    RuntimeError, UnicodeError, OverflowError,
)  # fmt: skip


class Readable(Protocol):
    """What is read from: an open file or a decompressor."""

    def read(self, size: int = ..., /) -> bytes:
        """Return up to ``size`` bytes."""


def extract(
    archive: Path,
    folder: Path,
    *,
    max_bytes: int = 16 << 30,
    max_files: int = 10_000,
    max_ratio: float = 200.0,
    wanted: Callable[[str], bool] | None = None,
) -> Path:
    """Unpack a zip, tar, tar.gz or gz file into the new folder ``folder`` and return it.

    The kind is told from the content, not from the name. A plain gz file becomes one file named like the archive
    without ``.gz``.

    Options:
        max_bytes: unpacked size at which unpacking stops.
        max_files: members allowed, folders counted.
        max_ratio: unpacked over packed size allowed, once 16 MiB have been unpacked.
        wanted: says by name which files are written; the names of the others are checked all the same.

    Raises:
        UserError: the archive is damaged, dangerous or too big, or ``folder`` exists.
    """
    archive, folder = Path(archive), Path(folder).absolute()
    if folder.exists():
        raise UserError(f"{folder}: exists already, wanted a new folder to unpack to")
    if not archive.is_file():
        raise UserError(f"{archive}: no such file")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        limit = min(max_bytes, max(RATIO_FLOOR, int(max_ratio * archive.stat().st_size)))
        sink = _Sink(archive, temporary, limit=limit, max_files=max_files, wanted=wanted)
        try:
            _unpack(archive, sink)
        except DAMAGED as error:
            raise UserError(f"{archive}: damaged or not supported: {error}") from error
        except OSError as error:
            if error.errno != errno.EINVAL:  # a seek to a place before the file; a full disk is another matter
                raise
            raise UserError(f"{archive}: damaged: a header points outside the file") from error
        os.chmod(temporary, 0o755)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def safe_name(name: str) -> PurePosixPath:
    """Return a member's name as a relative path; raise ValueError if it could lead out of its folder."""
    if not name:
        raise ValueError("has no name")
    if "\\" in name:
        raise ValueError("has a backslash in its name")
    if any(unicodedata.category(character) in ("Cc", "Cs", "Cf") for character in name):
        raise ValueError("has control characters in its name")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        raise ValueError("has an absolute name")
    path = PurePosixPath(name)
    if ".." in path.parts:
        raise ValueError("leads out of the folder")
    if not path.parts:
        raise ValueError("names the folder itself")
    if len(name.encode()) > 1024 or any(len(part.encode()) > 255 for part in path.parts):
        raise ValueError("has too long a name")
    return path


def _unpack(archive: Path, sink: _Sink) -> None:
    if zipfile.is_zipfile(archive):
        _unpack_zip(archive, sink)
        return
    with open(archive, "rb") as handle:
        start = handle.read(512)
    if start[:2] == b"\x1f\x8b":
        with gzip.open(archive, "rb") as stream:
            is_tar = _looks_like_tar(stream.read(512))
        with gzip.open(archive, "rb") as stream:
            if is_tar:
                _unpack_tar(stream, sink)
            else:
                sink.write(sink.claim(_plain_name(archive), is_file=True), stream)
    elif _looks_like_tar(start):
        with open(archive, "rb") as stream:
            _unpack_tar(stream, sink)
    else:
        raise UserError(f"{archive}: neither a zip, tar, tar.gz nor gz file")


def _plain_name(archive: Path) -> str:
    return archive.name[:-3] if archive.name.lower().endswith(".gz") else f"{archive.name}.unpacked"


def _looks_like_tar(block: bytes) -> bool:
    return len(block) == 512 and block[257:262] == b"ustar"


def _unpack_zip(archive: Path, sink: _Sink) -> None:
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            name = info.orig_filename  # zipfile cuts the other one at a NUL
            if info.flag_bits & 0x1:
                raise UserError(f"{archive}: member {name!r} is encrypted")
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise UserError(f"{archive}: member {name!r} is a link or a device")
            is_folder = name.endswith("/")
            path = sink.claim(name, is_file=not is_folder)
            if is_folder:
                sink.make_folder(path)
            elif sink.wants(path):
                with opened.open(info) as stream:
                    sink.write(path, stream)


def _unpack_tar(stream: Readable, sink: _Sink) -> None:
    metered = _Metered(stream, sink)
    with tarfile.open(fileobj=cast(IO[bytes], metered), mode="r|") as opened:
        while True:
            metered.allow(HEADER_ALLOWANCE)
            member = opened.next()
            if member is None:
                return
            if member.isdir() and not PurePosixPath(member.name).parts:
                continue  # "./", as tar writes it for the folder it was called in
            if not member.isdir() and (not member.isreg() or member.issparse()):
                raise UserError(f"{sink.archive}: member {member.name!r} is a link, a device or sparse")
            path = sink.claim(member.name, is_file=not member.isdir())
            if member.isdir():
                sink.make_folder(path)
                continue
            metered.allow(member.size + HEADER_ALLOWANCE)
            source = opened.extractfile(member)
            if source is not None:
                # a member that is not wanted has to be unpacked all the same: it lies in the way
                sink.write(path if sink.wants(path) else None, source)


class _Metered:
    """A reader for tarfile that limits what one header can make it read, since tarfile holds that in memory."""

    def __init__(self, stream: Readable, sink: _Sink) -> None:
        self._stream, self._sink, self._allowance = stream, sink, HEADER_ALLOWANCE

    def allow(self, count: int) -> None:
        """Let ``count`` more bytes be read before the next call."""
        self._allowance = count

    def read(self, size: int) -> bytes:
        """Read like a file."""
        data = self._stream.read(size)
        self._allowance -= len(data)
        if self._allowance < 0:
            raise UserError(f"{self._sink.archive}: a header is longer than {HEADER_ALLOWANCE} bytes")
        return data


class _Sink:
    """The folder that receives the members; it checks every name and counts every byte."""

    def __init__(
        self, archive: Path, root: Path, *, limit: int, max_files: int, wanted: Callable[[str], bool] | None
    ) -> None:
        self.archive, self._root, self._wanted = archive, root, wanted
        self._limit, self._bytes, self._max_files, self._members = limit, 0, max_files, 0
        self._spelling: dict[str, str] = {}  # names there are, by their name without case
        self._files: set[str] = set()

    def claim(self, name: str, *, is_file: bool) -> PurePosixPath:
        """Check a member's name and take it; return it as a relative path."""
        self._members += 1
        if self._members > self._max_files:
            raise UserError(f"{self.archive}: more than {self._max_files} members")
        try:
            path = safe_name(name)
        except ValueError as error:
            raise UserError(f"{self.archive}: member {name!r} {error}") from None
        for depth in range(1, len(path.parts) + 1):
            spelling = "/".join(path.parts[:depth])
            key = unicodedata.normalize("NFC", spelling).casefold()
            new_file = is_file and depth == len(path.parts)
            other = self._spelling.get(key)
            if other is not None and (other != spelling or new_file or key in self._files):
                raise UserError(f"{self.archive}: member {name!r} collides with member {other!r}")
            self._spelling[key] = spelling
            if new_file:
                self._files.add(key)
        return path

    def wants(self, path: PurePosixPath) -> bool:
        """Return whether the file is to be written."""
        return self._wanted is None or self._wanted(str(path))

    def make_folder(self, path: PurePosixPath) -> None:
        """Create a folder."""
        (self._root / path).mkdir(parents=True, exist_ok=True)

    def write(self, path: PurePosixPath | None, stream: Readable) -> None:
        """Write a file, or only count its bytes if ``path`` is None."""
        if path is None:
            while chunk := stream.read(CHUNK):
                self._count(len(chunk))
            return
        self.make_folder(path.parent)
        with open(self._root / path, "xb") as handle:
            while chunk := stream.read(CHUNK):
                self._count(len(chunk))
                handle.write(chunk)

    def _count(self, size: int) -> None:
        self._bytes += size
        if self._bytes > self._limit:
            raise UserError(f"{self.archive}: unpacks to more than {self._limit} bytes, refused")
