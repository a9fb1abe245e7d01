"""The prepared data of a run: its parts as manifests, the units, and features of every view, in the run's folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from apps.speech.config import SpeechConfig, UnitsConfig
from apps.speech.data.changes import state
from apps.speech.data.formats import read_corpus
from apps.speech.data.manifest import write_manifest
from apps.speech.data.parts import UNPLACED, Parts, no_longer, read_parts, spellable, unwritable
from apps.speech.data.store import FeatureStore, build_store
from apps.speech.data.utterance import SUBSAMPLING, Corpus, needed_frames, utterance_at
from apps.speech.distill import Utterances
from apps.speech.features import TAIL_MS, VERSION, with_tail
from apps.speech.models.huggingface import longest_heard
from apps.speech.units import Units, train_sentencepiece, train_words
from apps.speech.views import parse_view
from kdcore.config import UserError
from kdcore.run import fingerprint, read_json, write_json

# utterances of training, then those without a text: one list of rows
TRAINING = ("train", "unlabelled")
Announce = Callable[[str], None]
# problems that are named when a run begins; data.json has those to _KEPT
_NAMED, _KEPT = 3, 50


@dataclass(frozen=True)
class Prepared:
    """Corpora by part, units, and the folder where features are kept."""

    folder: Path
    corpora: dict[str, Corpus]
    units: Units
    counts: dict[str, int]
    # name and whether simulated, of each corpus it was read from
    sources: Sequence[Mapping[str, Any]] = ()
    # what is wrong with utterances that are kept, by part and kind: how often, and the first of them
    remarks: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    # ``Corpus.audio_sizes`` of the parts when they were read
    then: Mapping[str, str] = field(default_factory=dict)
    announce: Announce = lambda text: None

    @property
    def simulated(self) -> bool:
        """Whether any of it is."""
        return any(source["simulated"] for source in self.sources)

    def statistics(self) -> list[dict[str, Any]]:
        """Return what each part holds: utterances, hours, speakers, words, what was left out, bad audio."""
        rows = []
        for part, corpus in self.corpora.items():
            words = sum(len((each.text or "").split()) for each in corpus.utterances)
            row: dict[str, Any] = {"part": part, "utterances": len(corpus), "hours": round(corpus.seconds / 3600, 3)}
            row |= {"speakers": len({each.speaker for each in corpus.utterances if each.speaker}), "words": words}
            row["left out"] = self._left_out(part)
            row["remarks"] = _remarks(self.remarks.get(part, {}))
            names = (each.extra.get("corpus") for each in corpus.utterances)
            if held := Counter(name for name in names if isinstance(name, str)):
                row["corpora"] = ", ".join(f"{n} {name}" for name, n in held.items())
            rows.append(row)
        return rows

    def _left_out(self, part: str) -> str:
        """Return in words what was left out of a part; beside training, what nobody knows the part of."""
        places = {f"{part}: ": ""} | ({f"{UNPLACED}: ": f" ({UNPLACED})"} if part == "train" else {})
        found = [
            f"{n} {name.removeprefix(place)}{remark}"
            for place, remark in places.items()
            for name, n in self.counts.items()
            if name.startswith(place)
        ]
        return ", ".join(found) or "none"

    @property
    def fingerprint(self) -> str:
        """What the data is: every row of every part, the units, and how features are made of it."""
        about = {"units": self.units.symbols, "features": [VERSION, TAIL_MS]}
        return fingerprint(*(corpus.fingerprint for corpus in self.corpora.values()), about)

    def refuse_changed(self) -> None:
        """Raise UserError if an audio file has another size than when the run read it.

        Models of before and after would be compared as if they had heard the same.
        """
        for part, corpus in self.corpora.items():
            if self.then.get(part, corpus.audio_sizes) == corpus.audio_sizes:
                continue
            read = (self.folder / "data" / "data.json").stat().st_mtime
            paths = (corpus.path(each) for each in corpus.utterances)
            changed = next((path for path in paths if not path.exists() or path.stat().st_mtime > read), None)
            raise UserError(
                f"{changed or corpus.folder}: {part}: audio has changed since {self.folder} read it; "
                "wanted it as it was, or another --out for a run of its own"
            )

    def texts(self, part: str) -> list[str]:
        """Return the normalised texts of a part, empty where there is none."""
        return [each.text or "" for each in self.corpora[part].utterances]

    def store(self, parts: str | Sequence[str], view: str, seed: int = 0) -> FeatureStore:
        """Return the features of one part or of several, one after the other, in a view, each with its tail of silence.

        They are computed at the first call.
        """
        corpora = [self.corpora[part] for part in ([parts] if isinstance(parts, str) else parts)]
        heard, count = parse_view(view), sum(map(len, corpora))

        def audio() -> Iterator[np.ndarray]:
            for corpus in corpora:
                for utterance in corpus.utterances:
                    yield with_tail(heard.hear(corpus, utterance, seed))

        def progress(done: int, total: int) -> None:
            if done % 200 == 0 or done == total:
                self.announce(f"features of view {heard.name}: {done} of {total}")

        how = {"view": heard.name, "seed": seed, "features": [VERSION, TAIL_MS]}
        name = fingerprint(*(corpus.fingerprint for corpus in corpora), how)
        return build_store(self.folder / "features" / name, name, audio(), count, progress)

    def samples(self, parts: str | Sequence[str], view: str, rows: Sequence[int], seed: int = 0) -> list[np.ndarray]:
        """Return the samples float32 [n] of rows of one part, or of several one after the other, in a view.

        As those of the features, they end with a tail of silence.
        """
        corpora = [self.corpora[part] for part in ([parts] if isinstance(parts, str) else parts)]
        heard, found = parse_view(view), (utterance_at(corpora, row) for row in rows)
        return [with_tail(heard.hear(corpus, utterance, seed)) for corpus, utterance in found]

    @property
    def training_parts(self) -> list[str]:
        """The parts that are trained on, in the order of their rows."""
        return [part for part in TRAINING if part in self.corpora]

    def training(self, views: Sequence[str], seed: int = 0) -> Utterances:
        """Return the training rows in some views; those without a text follow those with one.

        A row whose text is too long for its frames in one of the views is left out of all, and said.
        """
        parts = self.training_parts
        labels = [
            None if each.text is None else self.units.encode(each.text)
            for part in parts
            for each in self.corpora[part].utterances
        ]
        stores = [self.store(parts, view, seed) for view in views]
        needs = np.array([needed_frames(label) if label is not None else 0 for label in labels])
        fits = np.ones(len(labels), bool)
        for view, store in zip(views, stores, strict=True):
            short = fits & (needs > -(-store.lengths // SUBSAMPLING))
            if short.any():
                first = [each for part in parts for each in self.corpora[part].utterances][int(short.argmax())]
                self.announce(
                    f"left out, longer text than frames in view {view}: {int(short.sum())} (first {first.id})"
                )
            fits &= ~short
        return Utterances(stores, labels, np.flatnonzero(fits))


def _remarks(remarks: Mapping[str, Mapping[str, Any]]) -> str:
    """Return in words what is wrong with how many utterances, and the first of them."""
    found = []
    for kind, each in remarks.items():
        more = ", ..." if each["count"] > len(each["first"]) else ""
        found.append(f"{each['count']} {kind} ({', '.join(each['first'])}{more})")
    return "; ".join(found) or "good"


def prepare(
    config: SpeechConfig, folder: Path, announce: Announce = lambda text: None, *, anew: bool = False
) -> Prepared:
    """Return the data of a run; it is read and checked at the first call and kept in the run's folder.

    What was left out is said each time, and whether a corpus, or a folder of a view, has changed since it was read.
    ``anew`` reads it whatever is there.

    Raises:
        UserError: as ``read_parts``, or a text or an utterance that no model can be trained on.
    """
    file = folder / "data" / "data.json"
    if anew or not file.exists():
        _write(config, folder / "data", read_parts(config.data, announce))
    about = read_json(file, dict)
    for what, count in about["left_out"].items():
        announce(f"left out, {what}: {count}")
    for problem in about["problems"][:_NAMED]:
        announce(f"  {problem}")
    if len(about["problems"]) > _NAMED:
        announce(f"  and others: {file}, problems")
    for path in _changed(about.get("read", {})):
        announce(f"{path}: has changed since {folder} read it; the run goes on with that, another --out reads anew")
    for path in _changed(about.get("heard", {})):
        announce(
            f"{path}: has changed since {folder} was made; features made with it stay, another --out makes new ones"
        )
    corpora = {part: read_corpus(folder / "data" / f"{part}.jsonl") for part in about["parts"]}
    units, more = Units.load(folder / "data"), (about.get("remarks", {}), about.get("audio_sizes", {}))
    return Prepared(folder, corpora, units, about["left_out"], about["corpora"], *more, announce)


def _changed(states: Mapping[str, str | None]) -> list[str]:
    """Return those of some paths that are there and are not what they were."""
    return [path for path, then in states.items() if (now := state(Path(path))) is not None and now != then]


def _units(config: UnitsConfig, texts: Sequence[str]) -> Units:
    if config.kind == "words":
        return train_words(texts)
    return Units.of_characters(texts) if config.kind == "characters" else train_sentencepiece(texts, config.size)


def _write(config: SpeechConfig, folder: Path, parts: Parts) -> None:
    texts = [each.text for each in parts["train"].utterances if each.text]
    units = _units(config.units, texts)
    corpora, short = {}, []
    for part, corpus in parts.corpora.items():
        # test and validation texts are compared as words: what the units cannot write counts as errors
        if part in ("valid", "test"):
            parts.notes.setdefault(part, {}).update(unwritable(corpus, units, config.data.text))
        if part == "train":
            corpus, problems = spellable(corpus, units, config.data.text, skip_bad=config.data.skip_bad)
            short += problems
            if not corpus.utterances:
                raise UserError(f"train: no utterance is left to train on (first problem: {short[0]})")
        # before anything is written down, and trained
        for view in config.part_views(part):
            if (channel := parse_view(view).channel) is not None:
                for each in corpus.utterances:
                    corpus.refuse_channel(each, channel)
        if config.teacher.pretrained:
            seconds = longest_heard(config.taught_views(part))
            corpus = no_longer(part, corpus, seconds, skip_bad=config.data.skip_bad and part in TRAINING)
        corpora[part] = corpus
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.json").unlink(missing_ok=True)
    units.save(folder)
    for part, corpus in corpora.items():
        write_manifest(folder / f"{part}.jsonl", corpus)
    parts = replace(parts, corpora=corpora)
    problems = [*parts.problems, *short]
    about: dict[str, Any] = {"parts": list(corpora), "left_out": parts.left_out, "problems": problems[:_KEPT]}
    about["corpora"] = [{"name": source.name, "simulated": source.simulated} for source in parts.sources]
    about["read"] = {os.path.abspath(source.path): state(source.path) for source in parts.sources}
    folders = [folder for view in config.heard_views for folder in parse_view(view).folders]
    # as the run reads them from now on
    about["audio_sizes"] = {part: read_corpus(folder / f"{part}.jsonl").audio_sizes for part in corpora}
    about["heard"] = {os.path.abspath(folder): state(folder) for folder in folders}
    # last: its presence says that the data is whole
    write_json(folder / "data.json", {**about, "remarks": parts.remarks, "simulated": parts.simulated})
