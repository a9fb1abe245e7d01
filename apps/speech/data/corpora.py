"""The corpora that a configuration names, one or several: found, selected from, and joined without a clash of ids.

    an4                          by its name in the data folder (KD_DATA) or in data, or any path
    fsdd@speaker=george,lucas    only the utterances of these speakers
    fsdd@speaker!=george         all but his
    an4@split=train              one of its splits; any other field of its rows can stand there as well

Several selections follow one another: ``fsdd@speaker=george@index=0,1``. No torch.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import NamedTuple

from apps.speech.data.formats import pattern_files, read_corpus
from apps.speech.data.splits import PARTS, part_of
from apps.speech.data.utterance import STORED, Corpus, Utterance
from kdcore.config import UserError, nearest
from kdcore.folders import data_folder
from kdcore.run import read_json

_SELECTION = re.compile(r"@(\w+)(!?=)([^@]*)")
_SELECTED = re.compile(r"(.*?)((?:@\w+!?=[^@]*)+)", re.DOTALL)
Given = str | Sequence[str]


@dataclass(frozen=True)
class Selection:
    """Utterances whose ``field`` is one of ``values``, or, with ``exclude``, none of them."""

    field: str
    values: tuple[str, ...]
    exclude: bool

    def apply(self, corpus: Corpus, name: str) -> Corpus:
        """Return the selected utterances.

        Raises:
            UserError: no utterance has the field or one of the values, or none is left.
        """
        found = [_value(utterance, self.field) for utterance in corpus.utterances]
        known = sorted({value for value in found if value is not None})
        if not known:
            raise UserError(f"{name}: no utterance has a {self.field}")
        for value in self.values:
            if value not in known:
                raise UserError(f"{name}: no utterance has {self.field} {value!r}, {nearest(value, known[:50])}")
        kept = corpus.select(lambda each: (_value(each, self.field) in self.values) is not self.exclude)
        if self.field == "split":
            fits = (each.split is None or (each.split in self.values) is not self.exclude for each in corpus.left_out)
            kept = replace(kept, left_out=tuple(compress(corpus.left_out, fits)))
        if not len(kept):
            raise UserError(f"{name}: {self.field} leaves no utterance of {len(corpus)}")
        return kept


def _value(utterance: Utterance, field: str) -> str | None:
    value = utterance.speaker or None if field == "speaker" else utterance.extra.get(field)
    return None if value is None else str(value)


def parse_corpus(text: str, option: str = "--data") -> tuple[str, tuple[Selection, ...]]:
    """Return the name or path of a corpus, and what is selected of it (see the module); errors name the ``option``."""
    match = _SELECTED.fullmatch(text)
    if match is None or os.path.exists(text):
        return text, ()
    selections = []
    for field, sign, values in _SELECTION.findall(match[2]):
        named = tuple(dict.fromkeys(value.strip() for value in values.split(",") if value.strip()))
        if not named:
            raise UserError(f"{option}: {text}: wanted values after {field}{sign}")
        selections.append(Selection(field, named, sign == "!="))
    return match[1], tuple(selections)


def find_data(name: str, option: str = "--data") -> Path:
    """Return a path, or that of a corpus by its name in the data folder (``KD_DATA``, ``../shared/data``) or ``data``.

    Shards may be named by a pattern, as ``shards/part-*.tar``.

    Raises:
        UserError: neither is there; the text names the ``option`` and says where it was looked for.
    """
    places = [Path(name), data_folder() / "speech" / name, Path("data") / name]
    for place in places:
        if os.path.exists(place) or pattern_files(place):
            return place
    looked = ", ".join(map(str, places[1:]))
    raise UserError(f"{option}: {name} is no file or folder, and not among the corpora ({looked}; set KD_DATA)")


def absolute_name(text: str) -> str:
    """Return how a corpus is named from any folder: by its whole path, unless it is one of ``KD_DATA``.

    What is selected of it stays; what is not there stays as it is.
    """
    name, _ = parse_corpus(text)
    try:
        place = find_data(name)
    except UserError:
        return text
    root = os.environ.get("KD_DATA")
    if root and place == Path(root) / "speech" / name:
        return text
    return os.path.abspath(place) + text[len(name) :]


@dataclass(frozen=True)
class Source:
    """A corpus of a run: its name there, where it is, and whether it says of itself that it is simulated."""

    name: str
    path: Path
    simulated: bool


class Sources:
    """Reads corpora, each once.

    With ``several``, utterances and speakers are named ``CORPUS/NAME``, audio by its whole path, and
    ``Utterance.extra["corpus"]`` says where each is from; one corpus alone stays as it is.
    """

    def __init__(self, *, skip_bad: bool, several: bool) -> None:
        self.skip_bad, self.several = skip_bad, several
        self.sources: dict[Path, Source] = {}
        # corpora and their splits that are of no part, or of one that was not asked for, and those that are used
        self.unused: list[tuple[str, str]] = []
        self.used: set[tuple[str, str]] = set()
        self._corpora: dict[Path, Corpus] = {}

    def whole(self, given: Given, option: str = "--data") -> Corpus:
        """Return all of some corpora, which ``option`` named."""
        return join([corpus for _, corpus, _ in self._read(given, option)])

    def part(self, given: Given, part: str) -> Corpus:
        """Return a part as it was named: of a corpus with splits the one of that name, of others the whole.

        Rows that name no split are for training.

        Raises:
            UserError: a corpus has splits of other parts only, and none was selected.
        """
        found = []
        for text, corpus, selections in self._read(given, f"--{part}"):
            own, name = _parts(corpus), parse_corpus(text)[0]
            if any(selection.field == "split" for selection in selections):
                self.used |= {(name, split) for split in corpus.splits}  # as it was named
            elif part in own or (part == "train" and any("split" not in each.extra for each in corpus.utterances)):
                names = own.get(part, ())
                self._note(name, corpus, names)
                corpus = corpus.split(*names, unnamed=part == "train")
            elif own:
                known = ", ".join(corpus.splits)
                raise UserError(f"data.{part}: {text} has no split {part}, it has {known}; choose: {text}@split=NAME")
            found.append(corpus)
        return join(found)

    def parts(self, given: Given) -> dict[str, Corpus]:
        """Return the parts that some corpora have together; rows that name no split are for training.

        So are splits whose names say no part, where none of a corpus says that it is for training: what is called
        ``test_noisy`` beside ``test`` never is.
        """
        found: dict[str, list[Corpus]] = {part: [] for part in PARTS}
        for text, corpus, _ in self._read(given, "--data"):
            own = _parts(corpus)
            own.setdefault("train", tuple(name for name in corpus.splits if part_of(name) is None))
            self._note(parse_corpus(text)[0], corpus, [name for names in own.values() for name in names])
            for part, names in own.items():
                if part != "train":
                    found[part].append(corpus.split(*names))
            trained = corpus.split(*own["train"], unnamed=True)
            # of a split that is bad throughout there is no other trace
            lost = tuple(each for each in corpus.left_out if each.split not in (*corpus.splits, None))
            found["train"] += [replace(trained, left_out=(*trained.left_out, *lost))] if len(trained) else []
        return {part: join(pieces) for part, pieces in found.items() if pieces}

    def _note(self, name: str, corpus: Corpus, used: Collection[str]) -> None:
        """Note which splits of a corpus are used, and which are not."""
        self.used |= {(name, split) for split in used}
        self.unused += [(name, split) for split in corpus.splits if split not in used]

    def _read(self, given: Given, option: str) -> list[tuple[str, Corpus, tuple[Selection, ...]]]:
        texts = [given] if isinstance(given, str) else list(given)
        if not texts:
            raise UserError("data: got an empty list, wanted at least one corpus")
        return [(text, *self._selected(text, option)) for text in texts]

    def _selected(self, text: str, option: str) -> tuple[Corpus, tuple[Selection, ...]]:
        name, selections = parse_corpus(text, option)
        path = find_data(name, option)
        if path not in self._corpora:
            self._corpora[path] = read_corpus(path, skip_bad=self.skip_bad)
            simulated = _simulated(self._corpora[path].folder / "dataset.json")
            self.sources[path] = Source(self._new_name(path), path, simulated)
        corpus, name = self._corpora[path], self.sources[path].name
        for selection in selections:
            corpus = selection.apply(corpus, name)
        return _named(corpus, name) if self.several else corpus, selections

    def _new_name(self, path: Path) -> str:
        name = short_name(path.resolve()) or "corpus"
        known = {source.name for source in self.sources.values()}
        return next(each for each in _numbered(name, len(known)) if each not in known)


def short_name(path: Path) -> str:
    """Return what a corpus is called by its path: without what is selected, suffixes and the signs of a pattern."""
    return re.sub(r"[*?\[\]{}]", "", path.name.split("@")[0].split(".")[0])


def _numbered(name: str, count: int) -> list[str]:
    return [name, *(f"{name}-{number}" for number in range(2, count + 2))]


def _simulated(about: Path) -> bool:
    """Return whether a corpus says that it is simulated; a file of that name may be of anything else."""
    try:
        said = read_json(about)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(said, dict) and said.get("simulated") is True


def _parts(corpus: Corpus) -> dict[str, tuple[str, ...]]:
    """Return the splits of a corpus for each part that has some: the one of just its name, or all of such names."""
    found: dict[str, tuple[str, ...]] = {}
    known = corpus.splits
    for part, names in PARTS.items():
        just = next((name for name in names if name in known), None)
        splits = (just,) if just is not None else tuple(name for name in known if part_of(name) == part)
        if splits:
            found[part] = splits
    return found


def _named(corpus: Corpus, name: str) -> Corpus:
    """Return a corpus that can be joined with others: names under its own, audio by its whole path."""

    def renamed(each: Utterance) -> Utterance:
        audio = os.path.abspath(corpus.path(each))
        speaker = f"{name}/{each.speaker}" if each.speaker else ""
        return replace(each, id=f"{name}/{each.id}", audio=audio, speaker=speaker, extra={**each.extra, "corpus": name})

    left_out = tuple(replace(each, reason=f"{name}: {each.reason}") for each in corpus.left_out)
    return replace(corpus, utterances=tuple(map(renamed, corpus.utterances)), left_out=left_out)


def join(corpora: Sequence[Corpus]) -> Corpus:
    """Return one corpus, or several whose audio is named by whole paths, as one.

    Raises:
        UserError: an utterance is in two of them.
    """
    if len(corpora) == 1:
        return corpora[0]
    utterances = tuple(each for corpus in corpora for each in corpus.utterances)
    seen: set[str] = set()
    for each in utterances:
        if each.id in seen:
            raise UserError(f"data: utterance {each.id} is selected twice")
        seen.add(each.id)
    folder = Path(os.path.commonpath([os.path.abspath(corpus.folder) for corpus in corpora]))
    # a corpus that is selected from twice counts once
    left_out = dict.fromkeys(each for corpus in corpora for each in corpus.left_out)
    return Corpus(utterances, folder, tuple(left_out))


def refuse_shared(corpora: dict[str, Corpus], parts: Sequence[str]) -> None:
    """Raise UserError if two of the parts hear the same: half of a recording, or more, in one channel of one file.

    Who hears no channel in particular hears all of them. Neighbours cut from a long file may overlap a little. Ids say
    nothing: many corpora number from 0.
    """
    recordings: defaultdict[tuple[str, str], defaultdict[int | None, list[_Piece]]]
    recordings = defaultdict(lambda: defaultdict(list))
    files: dict[Path, str] = {}
    for place, part in enumerate(parts):
        for each in corpora[part].utterances if part in corpora else ():
            path = corpora[part].path(each)
            if path not in files:
                files[path] = os.path.realpath(path)
            start = float(each.extra.get("offset") or 0.0)
            member = str(each.extra.get(STORED[1]))
            piece = _Piece(start, start + each.duration, place, each)
            recordings[files[path], member][_channel(each)].append(piece)
    for channels in recordings.values():
        of_all = channels.pop(None, [])
        found = (_overlapping([*pieces, *of_all]) for pieces in (*channels.values(), []))
        if (pair := next(filter(None, found), None)) is not None:
            one, two = sorted(pair, key=lambda piece: piece.part)
            other = f" (there {one.utterance.id})" if one.utterance.id != two.utterance.id else ""
            raise UserError(
                f"data: utterance {two.utterance.id} is in {parts[one.part]}{other} and in {parts[two.part]}: "
                f"both hear {corpora[parts[two.part]].path(two.utterance)}; wanted parts that share no recording"
            )


class _Piece(NamedTuple):
    """What an utterance of a part, by its number, hears of a recording: from one second to another."""

    start: float
    end: float
    part: int
    utterance: Utterance


def _channel(utterance: Utterance) -> int | None:
    """Return the channel that an utterance hears, None for all of them, as ``Corpus.load``."""
    channel = utterance.extra.get("channel")
    return channel if isinstance(channel, int) and not isinstance(channel, bool) else None


def _overlapping(pieces: Sequence[_Piece]) -> tuple[_Piece, _Piece] | None:
    """Return two pieces of different parts of which one hears half of the other or more, None if there are none.

    In the order of their starts, each is compared with what reaches furthest of every other part.
    """
    furthest: dict[int, _Piece] = {}
    for piece in sorted(pieces, key=lambda piece: piece[:3]):
        for part, before in furthest.items():
            half = min(piece.end - piece.start, before.end - before.start) / 2
            if part != piece.part and min(before.end, piece.end) - piece.start >= half:
                return before, piece
        if piece.part not in furthest or piece.end > furthest[piece.part].end:
            furthest[piece.part] = piece
    return None
