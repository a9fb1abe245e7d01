"""Corpora as they come: JSON-lines manifests, LibriSpeech, Common Voice, AN4, Kaldi data folders, audio beside text.

FSDD and simulated corpora are folders of JSON-lines manifests. Where a source has splits (files or folders of their
own), ``Utterance.extra["split"]`` holds the name. The audio of LibriSpeech, Common Voice and AN4 is below the corpus;
manifests and wav.scp may name files anywhere, as those who made NeMo and Kaldi do. No torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from apps.speech.data.kaldi import kaldi, kaldi_folders
from apps.speech.data.manifest import Row, collect, inside, manifest_rows, of_split, shown_name, text_lines, twice
from apps.speech.data.splits import PARTS
from apps.speech.data.utterance import FIELDS, MEANT, BadRow, Corpus
from kdcore.config import UserError, nearest

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".sph", ".aiff", ".aif", ".au", ".caf", ".w64")
# audio that is not read: named, so that it is not missed
_OTHER_AUDIO = (".m4a", ".aac", ".webm", ".wma", ".amr", ".mp4", ".mka", ".3gp")
_MANIFESTS = (".jsonl", ".json", ".ndjson")
# lines of the text beside a recording
_MOST_LINES = 1000
# what lies beside shards, those that are whole and others (``apps.speech.data.shards``)
_SHARDS = ("shards.json", "shards.incomplete")
# the splits of Common Voice that do not overlap
_COMMON_VOICE = ("train.tsv", "dev.tsv", "test.tsv")
# characters of a field of a table: more is a sign that ends of lines are missing
_LONGEST_FIELD = 1 << 17
_PATTERN = re.compile(r"[*?[]")
# shards of a range of numbers, as WebDataset names them
_SPAN = re.compile(r"([^{}]*)\{(\d{1,9})\.\.(\d{1,9})\}([^{}]*)")
_AN4 = ("train", "test")
_SPLITS = frozenset(name for names in PARTS.values() for name in names)
_AN4_TRANSCRIPT = re.compile(r"(?:<s>)?\s*(.*?)\s*(?:</s>)?\s*\(([^()\s]+)\)")


def read_corpus(path: str | os.PathLike[str], *, format: str | None = None, skip_bad: bool = False) -> Corpus:
    """Return the corpus of a file or folder, whose format is seen from what is there.

    Options: ``format`` is a name of ``FORMATS``; with ``skip_bad`` bad utterances are left out, counted by reason
    (``Corpus.counts``) and the first of them named (``Corpus.problems``).

    Raises:
        UserError: not there, no known format, or a bad utterance: unreadable row, missing file, one outside the corpus,
            empty text, an id that stands there twice, an impossible number. The message names file, row and field.
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
    """Return the files that fit a pattern in the last part of a path, sorted.

    As ``part-*.tar``, ``part-0[0-3]?.tar`` or ``part-{000000..000123}.tar``, numbers of which all that are there.
    """
    if (span := _SPAN.fullmatch(path.name)) is not None:
        before, first, last, after = span.groups()
        digits = rf"\d{{{len(first)}}}" if first.startswith("0") and len(first) > 1 else r"0|[1-9]\d*"
        numbered = re.compile(rf"{re.escape(before)}({digits}){re.escape(after)}")
        found = [(match, file) for file in path.parent.glob("*") if (match := numbered.fullmatch(file.name))]
        within = [(int(match[1]), file) for match, file in found if int(first) <= int(match[1]) <= int(last)]
        return [file for _, file in sorted(within) if file.is_file()]
    return sorted(path.parent.glob(path.name)) if _PATTERN.search(path.name) and "**" not in path.name else []


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
    if not source.exists() or any((source / name).is_file() for name in _SHARDS):
        return "shards"  # without a file of that name it is a pattern
    if (source / "wav.scp").is_file():
        return "kaldi"
    if _manifests(source):
        return "manifest"
    if any((source / name).is_file() for name in (*_COMMON_VOICE, "validated.tsv")):
        return "common_voice"
    if any((source / "etc" / f"an4_{split}.fileids").is_file() for split in _AN4):
        return "an4"
    if next(_walk(source, (".trans.txt",)), None):
        return "librispeech"
    if _manifests_of_nemo(source):
        return "manifest"
    if kaldi_folders(source):
        return "kaldi"
    if next(_walk(source, AUDIO_SUFFIXES), None):
        return "folder"
    if any(source.glob("*.tar")):
        return "shards"
    raise UserError(
        f"{source}: holds no corpus: no *.jsonl, no wav.scp (Kaldi), no train.tsv (Common Voice), "
        "no etc/an4_train.fileids (AN4), no *.trans.txt (LibriSpeech), no audio files and no shards (*.tar)"
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


def _manifests_of_nemo(folder: Path) -> list[Path]:
    """Return the files ``train_manifest.json`` and so on that hold rows of audio; none beside shards."""
    found = [each for each in sorted(folder.glob("*manifest.json")) if each.is_file()]
    if any(folder.glob("*.tar")):
        return []
    return [each for each in found if isinstance(row := next(manifest_rows(each), None), Row) and row.values["audio"]]


def _manifest(source: Path) -> Iterator[Row | BadRow]:
    if source.is_file():
        yield from manifest_rows(source)
        return
    files = _manifests(source) or _manifests_of_nemo(source)
    if not files:
        raise UserError(f"{source}: holds no *.jsonl and no *manifest.json with rows of audio")
    for file in files:
        yield from of_split(manifest_rows(file), file.stem if len(files) > 1 else None)


def _refuse_outside(where: str, column: str, name: str, folder: Path) -> None:
    """Raise BadRow if a file that a row names is not below the folder where such files are."""
    if not inside(name):
        problem = f"{where}: {column}: got {name[:60]!a}, wanted a file below {folder}"
        raise BadRow("outside the corpus", problem)


def _librispeech(source: Path) -> Iterator[Row | BadRow]:
    """Yield what the ``SPEAKER-CHAPTER.trans.txt`` files name, each audio file beside its list."""
    _wanted_folder(source, "librispeech")
    for listing in _walk(source, (".trans.txt",)):
        below = listing.parent.relative_to(source)
        # split/speaker/chapter below the root of the corpus or what it was unpacked in, speaker/chapter below a split
        split = below.parts[-3] if len(below.parts) > 2 else None
        yield from of_split(_chapter(listing, below), split)


def _chapter(listing: Path, below: Path) -> Iterator[Row | BadRow]:
    for number, line in text_lines(listing):
        if isinstance(line, BadRow):
            yield line
        elif line.strip():
            name, _, text = line.strip().partition(" ")
            where = f"{listing}: row {number}"
            try:
                _refuse_outside(where, "id", name, listing.parent)
            except BadRow as error:
                yield error
                continue
            audio = below / (_beside(listing.parent, name) or f"{name}.flac")
            yield Row(where, {"id": name, "audio": audio.as_posix(), "text": text, "speaker": name.split("-")[0]})


def _beside(folder: Path, name: str) -> str | None:
    """Return the name of the audio file ``name`` with the suffix that it has."""
    return next((name + suffix for suffix in (".flac", *AUDIO_SUFFIXES) if (folder / (name + suffix)).is_file()), None)


def _common_voice(source: Path) -> Iterator[Row | BadRow]:
    """Yield the rows of a table, or of train, dev and test in a folder; without these those of validated."""
    if source.is_file():
        yield from _table(source)
        return
    files = [source / name for name in _COMMON_VOICE if (source / name).is_file()]
    if not files and not (source / "validated.tsv").is_file():
        raise UserError(f"{source}: holds none of {', '.join(_COMMON_VOICE)}, validated.tsv")
    for file in files:
        yield from of_split(_table(file), file.stem)
    if not files:
        yield from _table(source / "validated.tsv")


def _table(path: Path) -> Iterator[Row | BadRow]:
    """Yield the rows of a table; nothing is quoted in it, and a tab parts fields wherever it stands.

    Columns whose names mean something here (``FIELDS``, ``MEANT``) are not taken.
    """
    header: list[str] | None = None
    for number, line in text_lines(path):
        where = f"{path}: row {number}"
        if header is None:
            if isinstance(line, BadRow):
                raise line
            header = line.split("\t")
            missing = [name for name in ("path", "sentence") if name not in header]
            if missing:
                named = ", ".join(map(shown_name, header[:20]))
                raise UserError(f"{where}: has no column {' and '.join(missing)}; got {named}")
        elif isinstance(line, BadRow):
            yield line
        elif line:
            try:
                yield _table_row(path, where, header, line)
            except BadRow as error:
                yield error


def _table_row(path: Path, where: str, header: list[str], line: str) -> Row:
    columns = {"audio": "path", "text": "sentence", "speaker": "client_id", "id": "path"}
    fields = line.split("\t")
    if len(fields) != len(header):
        raise BadRow("unreadable row", f"{where}: has {len(fields)} fields, wanted {len(header)}")
    for column, value in zip(header, fields, strict=True):
        if "\r" in value:
            raise BadRow("unreadable row", f"{where}: {shown_name(column)}: holds a carriage return, wanted one line")
        if len(value) > _LONGEST_FIELD:
            problem = f"has {len(value)} characters, wanted at most {_LONGEST_FIELD}"
            raise BadRow("unreadable row", f"{where}: {shown_name(column)}: {problem}")
    named = dict(zip(header, fields, strict=True))
    if named["path"]:
        _refuse_outside(where, "path", named["path"], path.parent / "clips")
    own = (*columns.values(), *FIELDS, *MEANT)
    values = {
        "id": os.path.splitext(named["path"])[0],
        "audio": f"clips/{named['path']}" if named["path"] else None,
        "text": named["sentence"],
        "speaker": named.get("client_id", ""),
    }
    return Row(where, values, {key: each for key, each in named.items() if key not in own and each}, columns)


def _an4(source: Path) -> Iterator[Row | BadRow]:
    """Yield the utterances of AN4 as CMU ships it, as NIST SPHERE or in another format with a header.

    ``etc/an4_train.fileids`` names the files, as ``an4_clstk/fash/an251-fash-b`` below ``wav``, and
    ``etc/an4_train.transcription`` says what is said in them; the same with ``test``.
    """
    _wanted_folder(source, "an4")
    splits = [split for split in _AN4 if (source / "etc" / f"an4_{split}.fileids").is_file()]
    if not splits:
        raise UserError(f"{source / 'etc'}: holds neither an4_train.fileids nor an4_test.fileids")
    wav = source / "wav"
    if not next(_walk(wav, AUDIO_SUFFIXES), None) and next(_walk(wav, (".raw",)), None):
        raise UserError(f"{wav}: holds .raw files only, which say nothing of their format; wanted AN4 as .sph or .wav")
    for split in splits:
        yield from of_split(_an4_part(source, split), split)


def _an4_part(source: Path, split: str) -> Iterator[Row | BadRow]:
    listing, transcription = (source / "etc" / f"an4_{split}.{suffix}" for suffix in ("fileids", "transcription"))
    bad: list[BadRow] = []
    texts = _an4_texts(transcription, bad)
    yield from bad
    named = set()
    for number, line in text_lines(listing):
        if isinstance(line, BadRow):
            yield line
            continue
        if not (name := line.strip()):
            continue
        where = f"{listing}: row {number}"
        parent, _, last = name.rpartition("/")
        named.add(last)
        try:
            _refuse_outside(where, "file", name, source / "wav")
            if last not in texts:
                raise BadRow("no transcript", f"{where}: {shown_name(last)} is not in {transcription}")
        except BadRow as error:
            yield error
            continue
        parts = last.split("-")
        values = {
            "id": last,
            "audio": f"wav/{_beside(source / 'wav', name) or name + '.sph'}",
            "text": texts[last][1],
            "speaker": parts[1] if len(parts) == 3 else parent.rpartition("/")[2],
        }
        yield Row(where, values)
    for name, (number, _) in texts.items():
        if name not in named:
            yield BadRow("no audio", f"{transcription}: row {number}: {shown_name(name)} is not in {listing}")


def _an4_texts(path: Path, bad: list[BadRow]) -> dict[str, tuple[int, str]]:
    """Return row and text by id, as ``<s> YES </s> (an251-fash-b)`` or without the marks; others are put in ``bad``."""
    if not path.is_file():
        raise UserError(f"{path}: does not exist; AN4 has it")
    found: dict[str, tuple[int, str]] = {}
    for number, line in text_lines(path):
        where = f"{path}: row {number}"
        if isinstance(line, BadRow):
            bad.append(line)
        elif line.strip():
            match = _AN4_TRANSCRIPT.fullmatch(line.strip())
            if match is None:
                bad.append(BadRow("unreadable row", f"{where}: got {line[:60]!a}, wanted words and (ID)"))
            elif match[2] in found:
                bad.append(twice(where, match[2], found[match[2]][0]))
            else:
                found[match[2]] = number, match[1]
    return found


def _folder(source: Path) -> Iterator[Row | BadRow]:
    """Yield every audio file below a folder; the .txt of the same name beside it, if any, is its text.

    A folder at the top with the name of a part (``splits.PARTS``) is a split; the next one below it, or else the one at
    the top, is taken for a speaker.
    """
    _wanted_folder(source, "folder")
    for audio in _walk(source, (*AUDIO_SUFFIXES, *_OTHER_AUDIO)):
        below = audio.relative_to(source)
        split = below.parts[0] if len(below.parts) > 1 and below.parts[0].lower() in _SPLITS else None
        speakers = below.parts[split is not None : -1]
        yield from of_split(_beside_text(audio, below, speakers[0] if speakers else ""), split)


def _beside_text(audio: Path, below: Path, speaker: str) -> Iterator[Row | BadRow]:
    """Yield the row of an audio file, ``below`` the corpus: none where it is read in another format."""
    if audio.suffix.lower() in _OTHER_AUDIO:
        if _beside(audio.parent, audio.stem) is None:  # what was made of it is read
            yield BadRow("audio of another kind", f"{audio}: {audio.suffix} is not read; wanted wav, flac, ogg or mp3")
        return
    listing, text = audio.with_suffix(".txt"), None
    if listing.is_file():
        lines = list(islice(text_lines(listing), _MOST_LINES + 1))
        bad = next((line for _, line in lines if isinstance(line, BadRow)), None)
        if len(lines) > _MOST_LINES:
            bad = BadRow("unreadable row", f"{listing}: has more than {_MOST_LINES} lines; wanted what {audio} says")
        if bad is not None:
            yield bad
            return
        text = " ".join(line.strip() for _, line in lines if isinstance(line, str))
    values = {"id": below.with_suffix("").as_posix(), "audio": below.as_posix(), "text": text, "speaker": speaker}
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
    "an4": _an4,
    "kaldi": kaldi,
    "folder": _folder,
    "shards": _shards,
}
