"""Large corpora as tar shards, WebDataset's way: members of one name and different suffixes are one utterance.

``00000012.json`` holds the row of a manifest, ``00000012.flac`` the audio. Shards of other makers may have ``.txt`` for
the text and any audio format. They are read as a stream, in memory is one utterance, and become a corpus as any other:
its rows say where in which shard the audio is. Nothing is unpacked to disk; links, devices and names that leave the
archive are refused. No torch.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from apps.speech.audio import decode_audio
from apps.speech.data.formats import AUDIO_SUFFIXES, pattern_files
from apps.speech.data.manifest import Row, inside
from apps.speech.data.utterance import LARGEST_STORED, STORED, BadRow, Corpus, Tally, Utterance, by_reason, loaded
from apps.speech.features import SAMPLE_RATE
from kdcore.config import UserError
from kdcore.run import atomic_path, write_json, write_text

INDEX = "shards.json"
# beside shards that are being written, or were left so by a kill
UNFINISHED = "shards.incomplete"
# why what follows in a shard is left out
_BROKEN = "unreadable shard"
_LARGEST_ROW = 1 << 20
_BLOCK = 512  # of a tar file


def write_shards(
    corpus: Corpus,
    folder: str | os.PathLike[str],
    *,
    per_shard: int = 1000,
    skip_bad: bool = False,
    about: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write a corpus as ``shard-000000.tar`` and so on, then ``shards.json``, which says that they are complete.

    Until then ``shards.incomplete`` says that they are not, and nobody reads them. Audio is stored as FLAC, 16 kHz, one
    channel, 16 bits. The same corpus gives the same bytes. ``about`` is what the corpus says of itself, for
    ``dataset.json``.

    Raises:
        UserError: the folder holds complete shards already, or audio cannot be read (with ``skip_bad`` it is left out
            and counted in ``shards.json``).
    """
    if per_shard < 1:
        raise ValueError(f"per_shard: got {per_shard}, wanted at least 1")
    root = Path(folder)
    if (root / INDEX).exists() and not (root / UNFINISHED).exists():
        raise UserError(f"{root}: holds shards already; name another folder")
    write_text(root / UNFINISHED, "kd speech shards has not come to its end; the same command begins anew\n")
    tally = Tally(skip_bad)
    source = loaded(corpus, tally)
    written: list[Path] = []
    count, seconds = 0, 0.0
    pending = next(source, None)
    while pending is not None:
        path = root / f"shard-{len(written):06d}.tar"
        with atomic_path(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive:
            for _ in range(per_shard):
                utterance, samples = pending
                _write_utterance(archive, f"{count:08d}", utterance, samples)
                count, seconds = count + 1, seconds + len(samples) / SAMPLE_RATE
                pending = next(source, None)
                if pending is None:
                    break
        written.append(path)
    if not written:
        raise UserError(f"{corpus.folder}: holds no utterance whose audio can be read")
    for left in set(root.glob("shard-*.tar")) - set(written):  # of a longer run that was killed
        left.unlink()
    if about:
        write_json(root / "dataset.json", about)
    index = {"shards": [path.name for path in written], "utterances": count, "seconds": round(seconds, 3)}
    left_out = by_reason((*corpus.left_out, *tally.left_out))
    write_json(root / INDEX, {**index, "fingerprint": corpus.fingerprint, "left_out": left_out})
    (root / UNFINISHED).unlink()
    return written


def _write_utterance(archive: tarfile.TarFile, key: str, utterance: Utterance, samples: np.ndarray) -> None:
    import soundfile

    # the part and the channel are cut out by now
    extra = {name: value for name, value in utterance.extra.items() if name not in ("offset", "channel", *STORED)}
    stored = replace(utterance, audio=f"{key}.flac", duration=len(samples) / SAMPLE_RATE, extra=extra)
    audio = io.BytesIO()
    soundfile.write(audio, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    row = json.dumps(stored.row(), ensure_ascii=False).encode()
    for suffix, data in ((".json", row), (".flac", audio.getvalue())):
        member = tarfile.TarInfo(key + suffix)  # no time, no owner: the same bytes each time
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))


def shard_paths(source: str | os.PathLike[str]) -> list[Path]:
    """Return one shard, those of a pattern in the last part of a path, sorted, or those of a folder.

    Of a folder they are those that ``shards.json`` lists, without it all ``*.tar``, sorted.

    Raises:
        UserError: there are none, one is no tar file by its name, one that is listed is missing, the list is wrong, or
            their writer has not come to its end.
    """
    root = Path(source)
    if ((root if root.is_dir() else root.parent) / UNFINISHED).exists():
        raise UserError(
            f"{root}: holds a part of a corpus: kd speech shards was broken off; the same command makes all"
        )
    if not root.is_dir():
        found = [root] if root.is_file() else pattern_files(root)
        other = next((path for path in found if path.suffix != ".tar"), None)
        if other or not found:
            raise UserError(f"{other or root}: " + ("is no shard; wanted *.tar" if other else "fits no shard"))
        return found
    index = root / INDEX
    if index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["shards"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{index}: is no list of shards") from None
        if not isinstance(names, list) or not all(isinstance(name, str) and inside(name) for name in names):
            raise UserError(f"{index}: shards: wanted names of files below {root}")
        paths = [root / name for name in names]
    else:
        paths = sorted(root.glob("*.tar"))
    if not paths:
        raise UserError(f"{root}: holds no shards (*.tar)")
    missing = next((path for path in paths if not path.is_file()), None)
    if missing:
        raise UserError(f"{missing}: does not exist, though {INDEX} lists it")
    return paths


class _Member(NamedTuple):
    """The bytes of a member, and where they begin in the shard."""

    data: bytes
    offset: int


def shard_rows(paths: Sequence[str | os.PathLike[str]]) -> Iterator[Row | BadRow]:
    """Yield the rows of shards in the stored order, read as a stream: in memory is one utterance.

    ``extra`` says where in the shard the audio is (``apps.speech.data.utterance.STORED``), so that ``Corpus.load``
    reads it without a search.

    Raises:
        UserError: a shard has an unsafe member; it names the shard and the member. One that is missing, truncated or
            no tar file is a bad row, behind those that could be read of it.
    """
    for path in map(Path, paths):
        key: str | None = None
        members: dict[str, _Member] = {}
        broken: BadRow | None = None
        try:
            for name, read in _members(path):
                stem, _, suffix = name.rpartition("/")[2].partition(".")
                if (current := name[: len(name) - len(suffix) - 1]) != key:
                    yield from _rows(path, key, members)
                    key, members = current, {}
                if ("." + suffix).lower() in (".json", ".txt", *AUDIO_SUFFIXES) and stem:
                    members[suffix.lower()] = read()
        except BadRow as error:
            broken = error
        # of the utterance at a cut something may be missing
        if broken is None:
            yield from _rows(path, key, members)
        else:
            yield broken


def _rows(path: Path, key: str | None, members: dict[str, _Member]) -> Iterator[Row | BadRow]:
    if key is None or not members:
        return
    where = f"{path}: member {ascii(key)[1:-1]}"
    try:
        if not key.isprintable():
            raise BadRow("bad field", f"{where}: wanted a name that can be printed")
        yield _row(path, key, where, members)
    except BadRow as error:
        yield error


def _row(path: Path, key: str, where: str, members: dict[str, _Member]) -> Row:
    suffix = next((name for name in members if "." + name in AUDIO_SUFFIXES), None)
    if suffix is None:
        raise BadRow("no audio", f"{where}: has no audio beside .{', .'.join(members)}")
    row: dict[str, Any] = {}
    text: str | None = None
    try:
        if "json" in members:
            row = json.loads(_limited(members["json"].data, where, "json"))
            if not isinstance(row, dict):
                raise BadRow("unreadable row", f"{where}.json: wanted an object, got {type(row).__name__}")
        if "txt" in members:
            text = _limited(members["txt"].data, where, "txt").decode("utf-8").strip()
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadRow):
            raise
        raise BadRow("unreadable row", f"{where}: is no UTF-8 JSON or text") from None
    audio, duration = members[suffix], row.get("duration")
    if duration is None:
        try:
            duration = len(decode_audio(audio.data, f"{where}.{suffix}")) / SAMPLE_RATE
        except UserError as error:
            raise BadRow("bad audio", str(error)) from None
    values = {"id": row.get("id") or key, "audio": path.name, "duration": duration, "speaker": row.get("speaker")}
    values["split"] = row.get("split")
    # the part and the channel were cut out when the audio was stored
    taken = (*values, "offset", "channel")
    extra = {name: value for name, value in row.items() if name not in taken}
    stored = dict(zip(STORED, (f"{key}.{suffix}", audio.offset, len(audio.data)), strict=True))
    return Row(where, {**values, "text": row.get("text", text)}, {**extra, **stored})


def _limited(data: bytes, where: str, suffix: str) -> bytes:
    if len(data) > _LARGEST_ROW:
        raise BadRow("unreadable row", f"{where}.{suffix}: is larger than {_LARGEST_ROW >> 20} MiB")
    return data


class _Bounded(io.FileIO):
    """A file that gives at most ``LARGEST_STORED`` bytes at once: what a header claims is not believed."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= LARGEST_STORED + _BLOCK:
            raise tarfile.ReadError("a header claims an impossible size")
        return super().read(size) or b""


class _Reader:
    """Reads the member that the iteration stands at."""

    def __init__(self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
        self._archive, self._member, self._path = archive, member, path

    def __call__(self) -> _Member:
        # runs where the member is wanted, outside the iteration
        with _named(self._path):
            handle = self._archive.extractfile(self._member)
            data = handle.read() if handle else b""
            if len(data) != self._member.size:
                raise tarfile.ReadError(f"unexpected end of {self._member.name!a}")
            return _Member(data, self._member.offset_data)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Make what tarfile and the system say about a shard one line that names it."""
    try:
        yield
    except UserError:
        raise
    except (tarfile.TarError, EOFError) as error:
        problem = f"is truncated, damaged or no tar file: {' '.join(str(error).split())}"
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
    except (ValueError, OverflowError):
        problem = "is damaged: a header of a member is unreadable"
    else:
        return
    raise BadRow(_BROKEN, f"{path}: {problem}")


def _members(path: Path) -> Iterator[tuple[str, _Reader]]:
    """Yield name and reader of the regular members of a tar file, one after the other.

    Raises:
        BadRow: the shard cannot be read, or is truncated (a cut between two members too: the mark at the end is looked
            for).
        UserError: it has a member that is a link or device, too large, or named outside the archive.
    """
    with _named(path), _Bounded(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # else they are all kept
            if member.isdir():
                continue
            _refuse_unsafe(path, member)
            yield member.name, _Reader(archive, member, path)
        stream.seek(archive.offset)
        mark = stream.read(_BLOCK)
        if len(mark) < _BLOCK:
            raise BadRow(_BROKEN, f"{path}: is truncated: the mark at the end of a tar file is missing")
        if mark.strip(b"\0"):
            raise BadRow(_BROKEN, f"{path}: is damaged at byte {archive.offset}: there is no header of a member")


def _refuse_unsafe(path: Path, member: tarfile.TarInfo) -> None:
    where = f"{path}: member {member.name!a}"
    if not inside(member.name):
        raise UserError(f"{where}: leaves the archive")
    if not member.isreg() or member.issparse():
        kind = "link" if member.islnk() or member.issym() else "device, pipe or sparse file"
        raise UserError(f"{where}: is a {kind}; wanted files")
    if not 0 <= member.size <= LARGEST_STORED:
        raise UserError(f"{where}: has {member.size} bytes, wanted at most {LARGEST_STORED >> 20} MiB")
