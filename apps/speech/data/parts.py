"""What a run trains, validates and tests on: three corpora without a speaker in two of them, checked."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from apps.speech.config import DataConfig
from apps.speech.data.formats import read_corpus
from apps.speech.data.utterance import (
    BadRow,
    Corpus,
    Tally,
    Utterance,
    hold_out_speakers,
    impossible,
    loaded,
    outside_units,
)
from apps.speech.text import TextRules
from apps.speech.units import Units
from kdcore.config import UserError
from kdcore.run import read_json

# what the parts are called by those who publish corpora
_NAMES = {"train": ("train",), "valid": ("valid", "dev", "val", "validation"), "test": ("test", "eval")}
Announce = Callable[[str], None]


@dataclass(frozen=True)
class Parts:
    """The corpora by name: train, valid, test, and unlabelled where there is one."""

    corpora: dict[str, Corpus]

    def __getitem__(self, name: str) -> Corpus:
        return self.corpora[name]

    @property
    def simulated(self) -> bool:
        """Whether any of it says so of itself, in ``dataset.json`` beside it."""
        files = {corpus.folder / "dataset.json" for corpus in self.corpora.values()}
        return any(read_json(file).get("simulated", False) for file in files if file.is_file())

    @property
    def left_out(self) -> dict[str, int]:
        """How many utterances were left out, by part and reason."""
        return {
            f"{part}: {reason}": count
            for part, corpus in self.corpora.items()
            for reason, count in corpus.counts.items()
            if count
        }


def find_data(name: str) -> Path:
    """Return a path, or that of a corpus by its name in the data folder (``KD_DATA``, or ``data``).

    Raises:
        UserError: neither is there; the text says where it was looked for.
    """
    given = Path(name)
    if given.exists():
        return given
    roots = [Path(os.environ["KD_DATA"]) / "speech"] if os.environ.get("KD_DATA") else []
    roots.append(Path("data"))
    for root in roots:
        if (root / name).exists():
            return root / name
    places = ", ".join(str(root / name) for root in roots)
    raise UserError(f"--data: {name} is no file or folder, and not among the corpora ({places}; set KD_DATA)")


def read_parts(config: DataConfig, announce: Announce = lambda text: None) -> Parts:
    """Return the parts of a configuration; every audio file of them was read once.

    Raises:
        UserError: a part is missing or empty, or anything in one is bad and ``skip_bad`` is off.
    """
    whole = read_corpus(find_data(config.path), skip_bad=config.skip_bad) if config.path else None
    found: dict[str, Corpus] = {}
    for part, given in (("train", config.train), ("valid", config.valid), ("test", config.test)):
        if given is not None:
            found[part] = read_corpus(find_data(given), skip_bad=config.skip_bad)
        elif whole is not None and (name := next((n for n in _NAMES[part] if n in whole.splits), None)):
            found[part] = whole.split(name)
    if "train" not in found:
        if whole is None:
            raise UserError("wanted --data NAME or PATH, or data.train and data.test")
        found["train"] = whole
    for part, count in (("test", config.test_speakers), ("valid", config.valid_speakers)):
        if part not in found:
            found["train"], found[part] = hold_out_speakers(found["train"], count=count, seed=config.split_seed)
    if config.unlabelled is not None:
        corpus = read_corpus(find_data(config.unlabelled), skip_bad=config.skip_bad)
        found["unlabelled"] = replace(corpus, utterances=tuple(replace(u, text=None) for u in corpus.utterances))
    return Parts({part: _readable(part, corpus, config, announce) for part, corpus in found.items()})


def _readable(part: str, corpus: Corpus, config: DataConfig, announce: Announce) -> Corpus:
    """Return the utterances whose audio can be read, with normalised texts and their true durations."""
    tally = Tally(config.skip_bad)
    kept: list[Utterance] = []
    for done, (utterance, samples) in enumerate(loaded(corpus, tally), 1):
        text = None if utterance.text is None else config.text.normalise(utterance.text)
        if text == "":
            tally.add(BadRow("no word", f"{part}: utterance {utterance.id}: text {utterance.text!r} holds no word"))
            continue
        kept.append(replace(utterance, text=text, duration=len(samples) / 16_000))
        if done % 200 == 0 or done == len(corpus):
            announce(f"{part}: read {done} of {len(corpus)}")
    if part in ("train", "valid", "test"):
        silent = [utterance for utterance in kept if utterance.text is None]
        if silent and part != "train":
            kept = [utterance for utterance in kept if utterance.text is not None]
            tally.counts["no text"] += len(silent)
    if not kept:
        raise UserError(f"{part}: no utterance is left of {len(corpus)} in {corpus.folder}")
    counts = {
        reason: corpus.counts.get(reason, 0) + tally.counts[reason] for reason in {**corpus.counts, **tally.counts}
    }
    return replace(corpus, utterances=tuple(kept), counts=counts, problems=(*corpus.problems, *tally.problems))


def spellable(corpus: Corpus, units: Units, rules: TextRules, *, skip_bad: bool) -> tuple[Corpus, list[str]]:
    """Return the utterances that CTC can be trained on, and what the others are: too long a text for their frames.

    Raises:
        UserError: a text has a symbol outside the units and ``skip_bad`` is off.
    """
    outside = outside_units((each for each in corpus.utterances if each.text is not None), units, rules)
    if outside and not skip_bad:
        name, problem = next(iter(outside.items()))
        raise UserError(f"utterance {name}: {problem} (--skip-bad leaves out {len(outside)} such)")
    known = corpus.select(lambda each: each.id not in outside)
    short = impossible(known, units, rules)
    names = {each.utterance.id for each in short}
    counts = {**known.counts}
    for reason, count in (("outside the units", len(outside)), ("longer text than frames", len(short))):
        if count:
            counts[reason] = counts.get(reason, 0) + count
    return replace(known.select(lambda each: each.id not in names), counts=counts), [str(each) for each in short]
