"""Corpora as they come: JSON-lines manifests, LibriSpeech, Common Voice, Kaldi data folders, audio beside text.

AN4, FSDD and simulated corpora are folders of JSON-lines manifests. Where a source has splits (files or folders of
their own), ``Utterance.extra["split"]`` holds the name. No torch.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from apps.speech.data.manifest import Row, collect, manifest_rows, text_lines
from apps.speech.data.utterance import BadRow, Corpus
from kdcore.config import UserError, nearest

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".sph", ".aiff", ".aif", ".au", ".caf", ".w64")
_MANIFESTS = (".jsonl", ".json", ".ndjson")
# the splits of Common Voice that do not overlap
_COMMON_VOICE = ("train.tsv", "dev.tsv", "test.tsv")


def read_corpus(path: str | os.PathLike[str], *, format: str | None = None, skip_bad: bool = False) -> Corpus:
    """Return the corpus of a file or folder, whose format is seen from what is there.

    Options: ``format`` is a name of ``FORMATS``; with ``skip_bad`` bad utterances are left out, counted by reason
    (``Corpus.counts``) and the first of them named (``Corpus.problems``).

    Raises:
        UserError: not there, no known format, or a bad utterance: unreadable row, missing file, empty text, an id that
            stands there twice, an impossible number. The message names file, row and field.
    """
    source = Path(path)
    if format is not None and format not in FORMATS:
        raise UserError(f"format: got {format!r}, {nearest(format, FORMATS)}")
    if not os.path.exists(source) and not pattern_files(source):
        raise UserError(f"{source}: does not exist; wanted a corpus")
    name = format or detect_format(source)
    folder = source if source.is_dir() else source.parent
    return collect(FORMATS[name](source), folder, source, skip_bad)


def pattern_files(path: Path) -> list[Path]:
    """Return the files that fit a pattern in the last part of a path, as ``shards/part-*.tar``, sorted."""
    return sorted(path.parent.glob(path.name)) if "*" in path.name and "**" not in path.name else []


def detect_format(source: Path) -> str:
    """Return the name of the format of a file or folder.

    Raises:
        UserError: none fits; the message says what was looked for.
    """
    if source.is_file():
        if source.suffix in _MANIFESTS:
            return "manifest"
        if source.suffix == ".tsv":
            return "common_voice"
        if source.suffix == ".tar":
            return "shards"
        raise UserError(f"{source}: wanted a manifest (.jsonl), a table of Common Voice (.tsv), shards or a folder")
    if not source.exists() or (source / "shards.json").is_file():
        return "shards"  # without a file of that name it is a pattern
    if (source / "wav.scp").is_file():
        return "kaldi"
    if _manifests(source):
        return "manifest"
    if any((source / name).is_file() for name in (*_COMMON_VOICE, "validated.tsv")):
        return "common_voice"
    if next(_walk(source, (".trans.txt",)), None):
        return "librispeech"
    if next(_walk(source, AUDIO_SUFFIXES), None):
        return "folder"
    if any(source.glob("*.tar")):
        return "shards"
    raise UserError(
        f"{source}: holds no corpus: no *.jsonl, no wav.scp (Kaldi), no train.tsv (Common Voice), "
        "no *.trans.txt (LibriSpeech), no audio files and no shards (*.tar)"
    )


def _walk(folder: Path, endings: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files below a folder whose names end so, sorted; links to folders are not followed."""
    for root, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if name.lower().endswith(endings) and not name.startswith("."):
                yield Path(root, name)


def _manifests(folder: Path) -> list[Path]:
    return sorted(each for each in folder.glob("*.jsonl") if each.is_file())


def _manifest(source: Path) -> Iterator[Row | BadRow]:
    if source.is_file():
        yield from manifest_rows(source)
        return
    files = _manifests(source)
    if not files:
        raise UserError(f"{source}: holds no *.jsonl")
    for file in files:
        yield from manifest_rows(file, file.stem if len(files) > 1 else None)


def _librispeech(source: Path) -> Iterator[Row | BadRow]:
    """Yield what the ``SPEAKER-CHAPTER.trans.txt`` files name, each audio file beside its list."""
    _wanted_folder(source, "librispeech")
    for listing in _walk(source, (".trans.txt",)):
        below = listing.parent.relative_to(source)
        # split/speaker/chapter below the root of the corpus, speaker/chapter below a split
        split = {"split": below.parts[0]} if len(below.parts) > 2 else {}
        for number, line in text_lines(listing):
            if isinstance(line, BadRow):
                yield line
            elif line.strip():
                name, _, text = line.strip().partition(" ")
                audio = _beside(listing.parent, name)
                values = {
                    "id": name,
                    "audio": (below / (audio or f"{name}.flac")).as_posix(),
                    "text": text,
                    "speaker": name.split("-")[0],
                }
                yield Row(f"{listing}: row {number}", values, split)


def _beside(folder: Path, name: str) -> str | None:
    """Return the name of the audio file ``name`` with the suffix that it has."""
    return next((name + suffix for suffix in (".flac", *AUDIO_SUFFIXES) if (folder / (name + suffix)).is_file()), None)


def _common_voice(source: Path) -> Iterator[Row | BadRow]:
    """Yield the rows of a table, or of train, dev and test in a folder; without these those of validated."""
    if source.is_file():
        yield from _table(source, "clips", None)
        return
    files = [source / name for name in _COMMON_VOICE if (source / name).is_file()]
    if not files and not (source / "validated.tsv").is_file():
        raise UserError(f"{source}: holds none of {', '.join(_COMMON_VOICE)}, validated.tsv")
    for file in files:
        yield from _table(file, "clips", file.stem)
    if not files:
        yield from _table(source / "validated.tsv", "clips", None)


def _table(path: Path, clips: str, split: str | None) -> Iterator[Row | BadRow]:
    columns = {"audio": "path", "text": "sentence", "speaker": "client_id", "id": "path"}
    header: list[str] | None = None
    for number, line in text_lines(path):
        if isinstance(line, BadRow):
            yield line
            continue
        fields = next(csv.reader([line], delimiter="\t", quoting=csv.QUOTE_NONE), [])
        if header is None:
            header = fields
            missing = [name for name in ("path", "sentence") if name not in header]
            if missing:
                raise UserError(f"{path}: row 1: has no column {' and '.join(missing)}; got {', '.join(header[:20])}")
        elif fields and len(fields) != len(header):
            problem = f"has {len(fields)} fields, wanted {len(header)}"
            yield BadRow("unreadable row", f"{path}: row {number}: {problem}")
        elif fields:
            named = dict(zip(header, fields, strict=True))
            extra: dict[str, Any] = {key: each for key, each in named.items() if key not in columns.values() and each}
            if split is not None:
                extra["split"] = split
            values = {
                "id": os.path.splitext(named["path"])[0],
                "audio": f"{clips}/{named['path']}" if named["path"] else None,
                "text": named["sentence"],
                "speaker": named.get("client_id", ""),
            }
            yield Row(f"{path}: row {number}", values, extra, columns)


def _kaldi(source: Path) -> Iterator[Row | BadRow]:
    """Yield the utterances of a Kaldi data folder: wav.scp and, if there, text, utt2spk, segments, utt2dur."""
    _wanted_folder(source, "kaldi")
    recordings = _mapping(source / "wav.scp", required=True)
    texts, speakers, durations = (_mapping(source / name) for name in ("text", "utt2spk", "utt2dur"))
    segments = _mapping(source / "segments")
    utterances = recordings if segments is None else segments
    for name, (number, value) in (utterances or {}).items():
        file = source / ("wav.scp" if segments is None else "segments")
        where = f"{file}: row {number}"
        try:
            values: dict[str, Any] = _segment(where, value) if segments is not None else {"audio": name}
            values["audio"] = _recording(source, where, values["audio"], recordings or {})
            if texts is not None and name not in texts:
                raise BadRow("no transcript", f"{where}: {name} is not in {source / 'text'}")
            if durations is not None and name in durations and segments is None:
                values["duration"] = _number(f"{source / 'utt2dur'}: row {durations[name][0]}", durations[name][1])
        except BadRow as error:
            yield error
            continue
        values |= {"id": name, "text": texts[name][1] if texts is not None else None}
        values["speaker"] = speakers[name][1].strip() if speakers is not None and name in speakers else ""
        yield Row(where, values, {}, {"audio": "path", "duration": "end"})
    for name, (number, _) in (texts or {}).items():
        if name not in (utterances or {}):
            yield BadRow("no audio", f"{source / 'text'}: row {number}: {name} has no audio")


def _mapping(path: Path, required: bool = False) -> dict[str, tuple[int, str]] | None:
    """Return row and value by the first word of each line; None if the file is not there."""
    if not path.is_file():
        if required:
            raise UserError(f"{path}: does not exist; a Kaldi data folder has it")
        return None
    found: dict[str, tuple[int, str]] = {}
    for number, line in text_lines(path):
        if isinstance(line, BadRow):
            raise line
        if not line.strip():
            continue
        name, _, value = line.strip().partition(" ") if "\t" not in line else line.strip().partition("\t")
        if name in found:
            raise UserError(f"{path}: row {number}: {name} stands there twice, first in row {found[name][0]}")
        found[name] = number, value.strip()
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


def _folder(source: Path) -> Iterator[Row | BadRow]:
    """Yield every audio file below a folder; the .txt of the same name beside it, if any, is its text."""
    _wanted_folder(source, "folder")
    for audio in _walk(source, AUDIO_SUFFIXES):
        below = audio.relative_to(source)
        listing = audio.with_suffix(".txt")
        text: str | None = None
        if listing.is_file():
            lines = list(islice(text_lines(listing), 1000))
            bad = next((line for _, line in lines if isinstance(line, BadRow)), None)
            if bad is not None:
                yield bad
                continue
            text = " ".join(line.strip() for _, line in lines if isinstance(line, str))
        values = {"id": below.with_suffix("").as_posix(), "audio": below.as_posix(), "text": text}
        yield Row(str(listing if text is not None else audio), values)


def _shards(source: Path) -> Iterator[Row | BadRow]:
    from apps.speech.data.shards import shard_paths, shard_rows

    yield from shard_rows(shard_paths(source))


def _wanted_folder(source: Path, name: str) -> None:
    if not source.is_dir():
        raise UserError(f"{source}: is no folder; the format {name} is one")


FORMATS: dict[str, Callable[[Path], Iterator[Row | BadRow]]] = {
    "manifest": _manifest,
    "librispeech": _librispeech,
    "common_voice": _common_voice,
    "kaldi": _kaldi,
    "folder": _folder,
    "shards": _shards,
}
