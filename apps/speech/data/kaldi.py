"""Kaldi data folders, and folders of them. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from apps.speech.audio import audio_info
from apps.speech.data.manifest import Row, of_split, text_lines, twice
from apps.speech.data.utterance import BadRow
from kdcore.config import UserError

_SIDES = {"A": 0, "B": 1, "1": 0, "2": 1}


def kaldi_folders(source: Path) -> list[Path]:
    """Return a folder that has a ``wav.scp``, or those in it that have one, sorted: ``data/train`` and so on."""
    if (source / "wav.scp").is_file() or not source.is_dir():
        return [source] if source.is_dir() else []
    return sorted(each for each in source.iterdir() if (each / "wav.scp").is_file())


def kaldi(source: Path) -> Iterator[Row | BadRow]:
    """Yield the utterances of a Kaldi data folder, or of those in a folder, each a split by its name.

    Raises:
        UserError: there is none.
    """
    folders = kaldi_folders(source)
    if not source.is_dir():
        raise UserError(f"{source}: is no folder; the format kaldi is one")
    if not folders:
        raise UserError(f"{source / 'wav.scp'}: does not exist; a Kaldi data folder has it")
    for folder in folders:
        if folder == source:
            yield from _utterances(folder)
        else:
            yield from of_split(_below(folder.name, _utterances(folder)), folder.name)


def _below(name: str, rows: Iterator[Row | BadRow]) -> Iterator[Row | BadRow]:
    """Yield the rows of a folder in the corpus's: ids are its own, and relative paths start from there."""
    for row in rows:
        if isinstance(row, Row):
            audio = Path(name, str(row.values["audio"])).as_posix()  # a whole path stays what it is
            row = replace(row, values={**row.values, "id": f"{name}/{row.values['id']}", "audio": audio})
        yield row


def _utterances(source: Path) -> Iterator[Row | BadRow]:
    """Yield the utterances of a Kaldi data folder: wav.scp and, if there, text, utt2spk, segments, utt2dur.

    ``wav.scp`` may name files anywhere, as it does in Kaldi; a relative path starts from the folder. Of a file with
    several channels a recording is the one that ``reco2file_and_channel`` says.
    """
    bad: list[BadRow] = []
    recordings = _mapping(source / "wav.scp", bad)
    texts, speakers, durations = (_mapping(source / name, bad) for name in ("text", "utt2spk", "utt2dur"))
    segments, sides = (_mapping(source / name, bad) for name in ("segments", "reco2file_and_channel"))
    yield from bad
    utterances = recordings if segments is None else segments
    channels: dict[str, int] = {}
    for name, (number, value) in (utterances or {}).items():
        file = source / ("wav.scp" if segments is None else "segments")
        where = f"{file}: row {number}"
        try:
            values: dict[str, Any] = _segment(where, value) if segments is not None else {"audio": name}
            recording = values["audio"]
            values["audio"] = _recording(source, where, recording, recordings or {})
            extra = _side(source, recording, values["audio"], sides or {}, channels)
            if texts is not None and name not in texts:
                raise BadRow("no transcript", f"{where}: {name} is not in {source / 'text'}")
            if durations is not None and name in durations and segments is None:
                values["duration"] = _number(f"{source / 'utt2dur'}: row {durations[name][0]}", durations[name][1])
        except BadRow as error:
            yield error
            continue
        values |= {"id": name, "text": texts[name][1] if texts is not None else None}
        values["speaker"] = speakers[name][1].strip() if speakers is not None and name in speakers else ""
        yield Row(where, values, extra, {"audio": "path", "duration": "end"})
    for name, (number, _) in (texts or {}).items():
        if name not in (utterances or {}):
            yield BadRow("no audio", f"{source / 'text'}: row {number}: {name} has no audio")


def _mapping(path: Path, bad: list[BadRow]) -> dict[str, tuple[int, str]] | None:
    """Return row and value by the first word of each line; None if the file is not there.

    Rows that cannot be read or whose first word was there before are put in ``bad``.
    """
    if not path.is_file():
        return None
    found: dict[str, tuple[int, str]] = {}
    for number, line in text_lines(path):
        if isinstance(line, BadRow):
            bad.append(line)
        elif words := line.split(maxsplit=1):
            if words[0] in found:
                bad.append(twice(f"{path}: row {number}", words[0], found[words[0]][0]))
            else:
                found[words[0]] = number, words[1].strip() if len(words) > 1 else ""
    return found


def _recording(source: Path, where: str, name: str, recordings: dict[str, tuple[int, str]]) -> str:
    if name not in recordings:
        raise BadRow("no audio", f"{where}: {name} is not in {source / 'wav.scp'}")
    number, audio = recordings[name]
    if audio.endswith("|") or audio.startswith("|") or audio == "-":
        raise BadRow(
            "command in wav.scp",
            f"{source / 'wav.scp'}: row {number}: holds a command, which is never run ({audio[:60]}); "
            "write the audio to a file and name that",
        )
    return audio


def _side(
    source: Path, recording: str, audio: str, sides: dict[str, tuple[int, str]], channels: dict[str, int]
) -> dict[str, int]:
    """Return the channel of a recording, A or 1 the first; none where its file has one (kept in ``channels``)."""
    if recording not in sides:
        return {}
    if audio not in channels:
        try:
            channels[audio] = audio_info(source / audio).channels
        except UserError:
            channels[audio] = 1  # whoever reads it says what is wrong
    if channels[audio] == 1:
        return {}
    number, value = sides[recording]
    side = (value.split() or [""])[-1].upper()
    if side not in _SIDES:
        where = f"{source / 'reco2file_and_channel'}: row {number}"
        raise BadRow("unreadable row", f"{where}: got {side[:20]!r}, wanted a channel, {' or '.join(_SIDES)}")
    return {"channel": _SIDES[side]}


def _segment(where: str, value: str) -> dict[str, Any]:
    fields = value.split()
    if len(fields) != 3:
        raise BadRow("unreadable row", f"{where}: got {value[:60]!r}, wanted a recording, its start and end in seconds")
    start, end = _number(where, fields[1]), _number(where, fields[2])
    if end == -1:  # Kaldi's word for the end of the recording
        return {"audio": fields[0], "offset": start}
    return {"audio": fields[0], "offset": start, "duration": end - start}


def _number(where: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise BadRow("unreadable row", f"{where}: got {text[:60]!r}, wanted a number of seconds") from None
