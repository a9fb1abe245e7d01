"""What ``kd speech transcribe`` writes to: JSON lines that are gone on with, and the files of subtitles. No torch."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.speech.device.live import json_line
from kdcore.config import UserError

if TYPE_CHECKING:
    from apps.speech.device.transcribe import Item, Key, Transcript

SUBTITLES = (".srt", ".vtt")
# how a row begins, and more bytes than one has: a day of words
_ROW = b'{"audio_filepath"'
_LONGEST_ROW = 1 << 26
# bytes of a name that file systems take
_LONGEST_NAME = 255


class Output:
    """JSON lines in a file that an interrupted batch goes on with: what is there is kept, what is torn is cut off.

    Beside it, ``NAME.settings.json`` says what it was made with.

    Raises:
        UserError: it is no regular file, which alone can be read back and cut; it is no such output (the message names
            the line), or was made with another model or settings.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self._done: Counter[Key] = Counter()
        if path.is_dir():
            raise UserError(f"--out: {path} is a folder, wanted a file such as {path / 'transcripts.jsonl'}")
        if path.exists() and not path.is_file():
            raise UserError(f"--out: {path} is no regular file; wanted a file such as transcripts.jsonl")
        keep = self._read() if path.exists() else 0
        check_settings(path, about, begun=keep > 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = open(path, "ab")  # noqa: SIM115
        self._handle.truncate(keep)

    def _read(self) -> int:
        """Note what is done; return the bytes of whole lines."""
        keep = 0
        with open(self.path, "rb") as handle:
            for number, line in enumerate(iter(lambda: handle.readline(_LONGEST_ROW + 1), b""), start=1):
                if not line.endswith(b"\n"):
                    if len(line) > _LONGEST_ROW or (number == 1 and not line.startswith(_ROW[: len(line)])):
                        raise self._other(number)
                    break
                try:
                    row = json.loads(line)
                    about = (row.get("offset"), row.get("asked_duration"), row.get("channel", "mix"), row.get("id"))
                    self._done[row["audio_filepath"], *about] += 1
                    row["text"], row["words"]
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                    raise self._other(number) from None
                keep += len(line)
        return keep

    def _other(self, number: int) -> UserError:
        return UserError(f"{self.path}: line {number}: is no row of kd speech transcribe; choose another --out")

    def missing(self, items: Iterable[Item]) -> list[Item]:
        """Return the pieces that were not there when it was opened; one that is wanted twice is there once at most."""
        left = self._done.copy()
        found = []
        for item in items:
            if left[item.key] > 0:
                left[item.key] -= 1
            else:
                found.append(item)
        return found

    def write(self, transcript: Transcript) -> None:
        """Append a row; a reader sees it at once."""
        self._handle.write(json_line(transcript.row()).encode())
        self._handle.flush()

    def close(self) -> None:
        """Write what is left to the disk."""
        os.fsync(self._handle.fileno())
        self._handle.close()


def check_settings(out: Path, about: dict[str, Any], *, begun: bool) -> None:
    """Write the settings of an output beside it, or compare them with those of the begun one.

    Raises:
        UserError: it was made with others; the message names them.
    """
    from kdcore.run import read_json, write_json

    path = _settings_path(out)
    about = json.loads(json.dumps(about))
    if not begun:
        write_json(path, about)
        return
    try:
        before = read_json(path)
    except (OSError, ValueError):
        before = None
    if not isinstance(before, dict):
        raise UserError(f"{path}: is missing or damaged, so it is not known what {out} was made with; choose another")
    other = [f"{name} {_plain(before.get(name))}" for name, value in about.items() if before.get(name) != value]
    if other:
        raise UserError(f"{out}: was made with {', '.join(other)}; choose another --out or remove it")


def _plain(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _settings_path(out: Path) -> Path:
    whole = Path(os.path.abspath(out))  # "." has no name of its own
    if not whole.name:
        raise UserError(f"--out: {out} cannot hold an output; wanted a file or folder below it")
    return whole.with_name(f"{whole.name}.settings.json")


def subtitles_begun(folder: Path, wanted: Iterable[Path]) -> bool:
    """Return whether a batch has written to a folder: wanted subtitles are there, or any, with settings beside them."""
    if any(path.exists() for path in wanted):
        return True
    there = folder.iterdir() if folder.is_dir() and _settings_path(folder).exists() else ()
    return any(path.suffix in SUBTITLES for path in there)


def subtitle_paths(items: Iterable[Item], folder: Path, suffix: str) -> tuple[dict[Item, Path], list[UserError]]:
    """Return where each piece's subtitles go, and what is wrong with those that have no place of their own.

    The file's stem, with channel, offset and duration in seconds where the piece has them: ``talk.srt``,
    ``talk-channel1@12.5+3.srt``. Where files of one stem are wanted, the folders that tell them apart stand in front,
    or else their endings behind; pieces of one name have their id behind.

    Raises:
        UserError: a file is in the folder's place.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: {folder} is a file; wanted a folder for the {suffix} of several files")
    items = list(items)
    labels = _labels(Path(item.audio) for item in items)
    names = [labels[Path(item.audio)] + _part(item) for item in items]
    seen = Counter(names)
    found: dict[Path, Item] = {}
    bad = []
    for item, name in zip(items, names, strict=True):
        if seen[name] > 1 and item.id is not None:
            name += "-" + item.id.replace("/", "_").replace("\0", "_")
        path = folder / f"{name}{suffix}"
        if path in found:
            bad.append(UserError(f"{item.audio}: would be written to {path}, as {found[path].audio} before it"))
        elif len(os.fsencode(path.name)) > _LONGEST_NAME:
            bad.append(UserError(f"{item.audio}: {path.name[:40]}... is too long for the name of a file"))
        else:
            found[path] = item
    return {item: path for path, item in found.items()}, bad


def _part(item: Item) -> str:
    """Return what stands behind the name of a file for a piece of it."""
    channel = "" if item.channel == "mix" else f"-channel{item.channel}"
    offset = "" if item.offset is None else f"@{_shortest(item.offset)}"
    return channel + offset + ("" if item.duration is None else f"+{_shortest(item.duration)}")


def _shortest(number: float) -> str:
    """Return a number in digits that give it back, whole ones without a point."""
    return repr(float(number)).removesuffix(".0")


def _labels(paths: Iterable[Path]) -> dict[Path, str]:
    """Return names for files: the stem, and for those of one stem as little more as tells them all apart."""
    by_stem: dict[str, set[Path]] = {}
    for path in paths:
        by_stem.setdefault(path.stem, set()).add(path)
    found: dict[Path, str] = {}
    for same in by_stem.values():
        # a/b.wav and /a/b.wav have no folder that tells them apart, but for that in which the first is
        absolute = {path: Path(os.path.abspath(path)) for path in same}
        found |= (
            _told_apart({path: path for path in same}) or _told_apart(absolute) or {path: path.name for path in same}
        )
    return found


def _told_apart(places: dict[Path, Path]) -> dict[Path, str] | None:
    """Return names for files by where they are, with as few folders as tell them all apart; None if nothing does."""
    for whole, depth in product((False, True), range(max(len(place.parts) for place in places.values()))):
        labels = {path: _label(place, depth, whole) for path, place in places.items()}
        if len(set(labels.values())) == len(places):
            return labels
    return None


def _label(path: Path, depth: int, whole: bool) -> str:
    """Return a file's name or stem behind the names of so many folders, the inmost ones."""
    folders = [part for part in path.parts[:-1] if part != path.anchor]
    return "-".join([*folders[len(folders) - min(depth, len(folders)) :], path.name if whole else path.stem])
