"""The prepared data of a run: its parts as manifests, the units, and features of every view, in the run's folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from apps.speech.config import SpeechConfig, UnitsConfig
from apps.speech.data.formats import read_corpus
from apps.speech.data.manifest import write_manifest
from apps.speech.data.parts import Parts, read_parts, spellable
from apps.speech.data.store import FeatureStore, build_store
from apps.speech.data.utterance import Corpus
from apps.speech.distill import Utterances
from apps.speech.features import TAIL_MS, VERSION, with_tail
from apps.speech.units import Units, train_sentencepiece, train_words
from apps.speech.views import parse_view
from kdcore.run import fingerprint, read_json, write_json

# utterances of training, then those without a text: one list of rows
TRAINING = ("train", "unlabelled")
Announce = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """Corpora by part, units, and the folder where features are kept."""

    folder: Path
    corpora: dict[str, Corpus]
    units: Units
    counts: dict[str, int]
    # name and whether simulated, of each corpus it was read from
    sources: Sequence[Mapping[str, Any]] = ()
    # what is wrong with audio that can be read, by part and kind: how often, and the first utterances
    audio: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
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
            left_out = {name.removeprefix(f"{part}: "): n for name, n in self.counts.items() if name.startswith(part)}
            row: dict[str, Any] = {"part": part, "utterances": len(corpus), "hours": round(corpus.seconds / 3600, 3)}
            row |= {"speakers": len({each.speaker for each in corpus.utterances}), "words": words}
            row["left out"] = ", ".join(f"{n} {reason}" for reason, n in left_out.items()) or "none"
            row["audio"] = _remarks(self.audio.get(part, {}))
            if held := Counter(each.extra["corpus"] for each in corpus.utterances if "corpus" in each.extra):
                row["corpora"] = ", ".join(f"{n} {name}" for name, n in held.items())
            rows.append(row)
        return rows

    @property
    def fingerprint(self) -> str:
        """What the data is: every row of every part, and the units."""
        return fingerprint(*(corpus.fingerprint for corpus in self.corpora.values()), {"units": self.units.symbols})

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
                    yield with_tail(heard.apply(corpus.load(utterance), utterance.id, seed))

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
        all_of = [(corpus, utterance) for corpus in corpora for utterance in corpus.utterances]
        heard = parse_view(view)
        return [with_tail(heard.apply(all_of[row][0].load(all_of[row][1]), all_of[row][1].id, seed)) for row in rows]

    @property
    def training_parts(self) -> list[str]:
        """The parts that are trained on, in the order of their rows."""
        return [part for part in TRAINING if part in self.corpora]

    def training(self, views: Sequence[str], seed: int = 0) -> Utterances:
        """Return the training rows in some views; those without a text follow those with one."""
        parts = self.training_parts
        labels = [
            None if each.text is None else self.units.encode(each.text)
            for part in parts
            for each in self.corpora[part].utterances
        ]
        return Utterances([self.store(parts, view, seed) for view in views], labels, np.arange(len(labels)))


def _remarks(audio: Mapping[str, Mapping[str, Any]]) -> str:
    """Return in words how many utterances have bad audio of each kind, and the first of them."""
    found = []
    for kind, each in audio.items():
        more = ", ..." if each["count"] > len(each["first"]) else ""
        found.append(f"{each['count']} {kind} ({', '.join(each['first'])}{more})")
    return "; ".join(found) or "good"


def prepare(config: SpeechConfig, folder: Path, announce: Announce = lambda text: None) -> Prepared:
    """Return the data of a run; it is read and checked at the first call and kept in the run's folder."""
    file = folder / "data" / "data.json"
    if not file.exists():
        _write(config, folder / "data", read_parts(config.data, announce))
    about = read_json(file)
    corpora = {part: read_corpus(folder / "data" / f"{part}.jsonl") for part in about["parts"]}
    units = Units.load(folder / "data")
    return Prepared(folder, corpora, units, about["left_out"], about["corpora"], about["audio"], announce)


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
        if part == "train":
            corpus, problems = spellable(corpus, units, config.data.text, skip_bad=config.data.skip_bad)
            short += problems
        corpora[part] = corpus
    folder.mkdir(parents=True, exist_ok=True)
    units.save(folder)
    for part, corpus in corpora.items():
        write_manifest(folder / f"{part}.jsonl", corpus)
    problems = [problem for corpus in corpora.values() for problem in corpus.problems] + short
    about: dict[str, Any] = {"parts": list(corpora), "left_out": Parts(corpora).left_out, "problems": problems[:50]}
    about["corpora"] = [{"name": source.name, "simulated": source.simulated} for source in parts.sources]
    # last: its presence says that the data is whole
    write_json(folder / "data.json", {**about, "audio": parts.audio, "simulated": parts.simulated})
