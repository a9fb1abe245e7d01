"""Rows of any source made into a corpus, and the JSON-lines manifest. No torch.

A manifest has an object a line: ``audio_filepath`` (or ``path``, ``audio``), ``text`` (or null, where nobody wrote it
down), ``duration`` and ``offset`` in seconds, ``speaker``, ``id``, ``split``, ``channel`` (a number from 0; without it
all are mixed); other keys are kept in ``Utterance.extra``. Without ``duration`` it is read from the audio's header;
with ``offset``, or where the file is much longer than ``duration``, the utterance is a part of its file. Audio may be
anywhere, as NeMo has it: a relative path starts from the manifest's folder and may leave it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from apps.speech.audio import audio_info
from apps.speech.data.utterance import FIELDS, BadRow, Corpus, Tally, Utterance
from kdcore.config import UserError
from kdcore.run import atomic_path

_LONGEST_LINE = 1 << 20
_AUDIO_KEYS = ("audio_filepath", "path", "audio")
_SPEAKER_KEYS = ("speaker", "speaker_id")


@dataclass(frozen=True)
class Row:
    """One utterance as its source gives it, unchecked: the fields are those of ``Utterance``, ``offset`` and ``split``.

    ``where`` leads an error message (file and row), ``columns`` says what the source calls a field.
    """

    where: str
    values: Mapping[str, Any]
    extra: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)

    def bad(self, reason: str, column: str, problem: str) -> BadRow:
        """Return the error that says where: file, row, column."""
        split = self.values.get("split")
        known = split if isinstance(split, str) else None
        return BadRow(reason, f"{self.where}: {self.columns.get(column, column)}: {problem}", known)


def collect(rows: Iterator[Row | BadRow], folder: Path, source: Path, skip_bad: bool) -> Corpus:
    """Return the corpus of rows; what is wrong with one raises or, with ``skip_bad``, is counted.

    Raises:
        UserError: a bad row (it names file, row and field), or no good one.
    """
    tally, utterances, seen = Tally(skip_bad), [], set()
    headers = _Headers(folder)
    for row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            utterance = _checked(row, headers)
            if utterance.id in seen:
                raise row.bad("duplicate id", "id", f"{utterance.id!r} stands there twice")
        except BadRow as error:
            tally.add(error)
            continue
        seen.add(utterance.id)
        utterances.append(utterance)
    if not utterances:
        why = ", ".join(f"{count} {reason}" for reason, count in tally.counts.items())
        first = next((problem for each in tally.left_out for problem in each.problems), "")
        why += f": {first}" if first else ""
        raise UserError(f"{source}: holds no utterance" + (f" that can be used ({why})" if why else ""))
    return Corpus(tuple(utterances), folder, tally.left_out)


class _Headers:
    """The lengths of audio files, each header read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seconds: dict[str, float] = {}

    def seconds(self, audio: str) -> float:
        if audio not in self._seconds:
            self._seconds[audio] = audio_info(self.folder / audio).seconds
        return self._seconds[audio]


def _checked(row: Row, headers: _Headers) -> Utterance:
    audio = _text(row, "audio")
    if not audio:
        raise row.bad("no audio", "audio", "is missing; wanted the path of an audio file")
    if not os.path.isfile(headers.folder / audio):
        raise row.bad("no audio", "audio", f"{headers.folder / audio} is no file")
    text = _text(row, "text")
    if text is not None and not text.strip():
        raise row.bad(
            "empty text", "text", "is empty; leave it out, or write null, where nobody wrote down what is said"
        )
    offset = _seconds(row, "offset", lowest=0.0)
    duration = _seconds(row, "duration", lowest=None)
    if duration is None:
        try:
            duration = headers.seconds(audio) - (offset or 0.0)
        except UserError as error:
            raise row.bad("bad audio", "audio", str(error)) from None
        if duration <= 0:
            file = headers.folder / audio
            whole = f"begins at {offset:g} s, after the end of {file}" if offset else f"{file} has no samples"
            raise row.bad("bad audio", "offset" if offset else "audio", whole)
    extra = {key: value for key, value in row.extra.items() if key not in FIELDS}
    for key, value in extra.items():
        if not _encodes(json.dumps({key: value}, ensure_ascii=False)):
            raise row.bad("bad field", ascii(key)[1:-1], f"got {_shown(value)}, which cannot be written as text")
    channel = extra.get("channel")
    if channel is not None and (not isinstance(channel, int) or isinstance(channel, bool) or channel < 0):
        raise row.bad("bad field", "channel", f"got {_shown(channel)}, wanted a number, the first is 0")
    name = _text(row, "id") or _made_id(audio, offset, channel)
    if split := _text(row, "split"):
        extra["split"] = split
    if offset is not None:
        extra["offset"] = offset
    return Utterance(name, audio, text, duration, _text(row, "speaker") or "", extra)


def _made_id(audio: str, offset: float | None, channel: int | None) -> str:
    stem = os.path.splitext(audio)[0] + ("" if channel is None else f"#{channel}")
    return stem if offset is None else f"{stem}@{offset:.12g}"


def _text(row: Row, key: str) -> str | None:
    value = row.values.get(key)
    if value is None:
        return None
    if key in ("id", "speaker") and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise row.bad("bad field", key, f"got {_shown(value)}, wanted text")
    if "\0" in value or not _encodes(value):
        raise row.bad("bad field", key, f"got {_shown(value)}, which cannot be written as text")
    return value


def _encodes(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _seconds(row: Row, key: str, lowest: float | None) -> float | None:
    """Return a number of seconds; above 0 or, where ``lowest`` is given, at least that."""
    value = row.values.get(key)
    if value is None:
        return None
    wanted = "seconds above 0" if lowest is None else f"seconds of at least {lowest:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise row.bad("bad field", key, f"got {_shown(value)}, wanted {wanted}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or (number <= 0 if lowest is None else number < lowest):
        raise row.bad("bad field", key, f"got {_shown(value)}, wanted {wanted}")
    return number


def _shown(value: object) -> str:
    text = ascii(value) if isinstance(value, str) else json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def manifest_rows(path: Path) -> Iterator[Row | BadRow]:
    """Yield the rows of a JSON-lines manifest; blank lines are none."""
    for number, line in text_lines(path):
        where = f"{path}: row {number}"
        if isinstance(line, BadRow):
            yield line
            continue
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "numbers too long or nested too deeply"
            yield BadRow("unreadable row", f"{where}: is no JSON: {reason}")
            continue
        if not isinstance(value, dict):
            yield BadRow(
                "unreadable row", f"{where}: wanted an object with audio_filepath and text, got {_shown(value)}"
            )
            continue
        yield _manifest_row(where, value)


def _manifest_row(where: str, value: dict[str, Any]) -> Row:
    audio = next((key for key in _AUDIO_KEYS if key in value), _AUDIO_KEYS[0])
    speaker = next((key for key in _SPEAKER_KEYS if key in value), _SPEAKER_KEYS[0])
    columns = {"audio": audio, "speaker": speaker}
    known = {**{name: name for name in ("id", "text", "duration", "offset", "split")}, **columns}
    extra = {key: each for key, each in value.items() if key not in known.values()}
    return Row(where, {key: value.get(column) for key, column in known.items()}, extra, columns)


def inside(name: str) -> bool:
    """Return whether a name stays in its folder or archive, on any system."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return bool(parts) and not name.startswith(("/", "\\")) and ".." not in parts and ":" not in parts[0]


def text_lines(path: Path) -> Iterator[tuple[int, str | BadRow]]:
    """Yield number and text of the lines of a UTF-8 file, without a byte-order mark and the end of line.

    A line that is too long or not UTF-8 comes as the error to raise.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with open(path, "rb") as handle:
            number = 0
            while line := handle.readline(_LONGEST_LINE):
                number += 1
                where = f"{path}: row {number}"
                if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                    while line and not line.endswith(b"\n"):
                        line = handle.readline(_LONGEST_LINE)
                    yield number, BadRow("unreadable row", f"{where}: is longer than {_LONGEST_LINE >> 20} MiB")
                    continue
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                try:
                    yield number, line.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError:
                    yield number, BadRow("unreadable row", f"{where}: is not UTF-8 text")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def of_split(rows: Iterator[Row | BadRow], split: str | None) -> Iterator[Row | BadRow]:
    """Yield the rows of a file or folder that is a split; one that names its own keeps it."""
    for row in rows:
        if split is not None and isinstance(row, BadRow):
            row.split = row.split or split
        elif split is not None and isinstance(row, Row) and row.values.get("split") is None:
            row = replace(row, values={**row.values, "split": split})
        yield row


def shown_name(column: str) -> str:
    """Return a name as an error shows it."""
    return column if column.isprintable() and len(column) <= 60 else ascii(column[:60])


def twice(where: str, name: str, first: int) -> BadRow:
    """Return what is wrong with a row whose name an earlier one has."""
    return BadRow("duplicate id", f"{where}: {shown_name(name)} stands there twice, first in row {first}")


def write_manifest(path: str | os.PathLike[str], corpus: Corpus) -> None:
    """Write a corpus as a JSON-lines manifest that ``read_corpus`` reads back.

    Audio below the manifest's folder is named relative to it, other audio by its whole path.
    """
    target = Path(path)
    base = target.resolve().parent
    with atomic_path(target) as temporary, open(temporary, "w", encoding="utf-8") as handle:
        for utterance in corpus.utterances:
            audio = Path(os.path.abspath(corpus.path(utterance)))
            name = audio.relative_to(base) if audio.is_relative_to(base) else audio
            row = utterance.row() | {"audio_filepath": name.as_posix()}
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
