"""What a run trains, validates and tests on, read and checked; speakers are held out where a part is missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from apps.speech.audio import examine
from apps.speech.config import DataConfig
from apps.speech.data.corpora import PARTS, Source, Sources, refuse_shared
from apps.speech.data.utterance import (
    BadRow,
    Corpus,
    Tally,
    Utterance,
    hold_out_speakers,
    impossible,
    loaded,
    of_corpus,
    outside_units,
)
from apps.speech.text import TextRules
from apps.speech.units import Units
from kdcore.config import UserError

# utterances of a kind that is merely bad which are named; the others are counted
_NAMED = 5
Announce = Callable[[str], None]


@dataclass(frozen=True)
class Parts:
    """The corpora by name: train, valid, test, and unlabelled where there is one."""

    corpora: dict[str, Corpus]
    # what they were read from
    sources: tuple[Source, ...] = ()
    # part -> what is wrong with audio that can be read (``apps.speech.audio.examine``) -> the utterances
    notes: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Corpus:
        return self.corpora[name]

    @property
    def simulated(self) -> bool:
        """Whether any of it says so of itself, in ``dataset.json`` beside it."""
        return any(source.simulated for source in self.sources)

    @property
    def left_out(self) -> dict[str, int]:
        """How many utterances were left out, by part and reason."""
        return {
            f"{part}: {reason}": count
            for part, corpus in self.corpora.items()
            for reason, count in corpus.counts.items()
            if count
        }

    @property
    def audio(self) -> dict[str, dict[str, dict[str, Any]]]:
        """How many utterances have audio that is clipped, silent or offset, by part and kind, and the first of them."""
        return {
            part: {kind: {"count": len(names), "first": names[:_NAMED]} for kind, names in notes.items()}
            for part, notes in self.notes.items()
        }


def read_parts(config: DataConfig, announce: Announce = lambda text: None) -> Parts:
    """Return the parts of a configuration; every audio file of them was read once.

    Raises:
        UserError: a part is missing or empty, one utterance is in two of several corpora's parts, or anything in one is
            bad and ``skip_bad`` is off.
    """
    several = any(isinstance(given, list) and len(given) > 1 for given in config.corpora)
    sources = Sources(skip_bad=config.skip_bad, several=several)
    found = sources.parts(config.path) if config.path else {}
    for part in PARTS:
        given = getattr(config, part)
        if given is not None:
            found[part] = sources.part(given, part)
    if "train" not in found:
        raise UserError("wanted --data NAME or PATH that has recordings to train on, or data.train and data.test")
    for part, count in (("test", config.test_speakers), ("valid", config.valid_speakers)):
        if part not in found:
            found["train"], found[part] = hold_out_speakers(found["train"], count=count, seed=config.split_seed)
    if several:
        refuse_shared(found, list(PARTS))
    if config.unlabelled is not None:
        corpus = sources.whole(config.unlabelled)
        found["unlabelled"] = replace(corpus, utterances=tuple(replace(u, text=None) for u in corpus.utterances))
    notes: dict[str, dict[str, list[str]]] = {}
    read = {part: _readable(part, corpus, config, announce, notes) for part, corpus in found.items()}
    return Parts(read, tuple(sources.sources.values()), notes)


def _readable(
    part: str, corpus: Corpus, config: DataConfig, announce: Announce, notes: dict[str, dict[str, list[str]]]
) -> Corpus:
    """Return the utterances whose audio can be read, with normalised texts and their true durations.

    What is merely bad about audio is noted.
    """
    tally = Tally(config.skip_bad)
    kept: list[Utterance] = []
    for done, (utterance, samples) in enumerate(loaded(corpus, tally), 1):
        text = None if utterance.text is None else config.text.normalise(utterance.text)
        if text == "":
            tally.add(
                BadRow(
                    of_corpus(utterance, "no word"),
                    f"{part}: utterance {utterance.id}: text {utterance.text!r} holds no word",
                )
            )
            continue
        for problem in examine(samples):
            kind = problem.partition(" (")[0].partition(" of ")[0]
            notes.setdefault(part, {}).setdefault(kind, []).append(utterance.id)
        kept.append(replace(utterance, text=text, duration=len(samples) / 16_000))
        if done % 200 == 0 or done == len(corpus):
            announce(f"{part}: read {done} of {len(corpus)}")
    if part in ("train", "valid", "test"):
        silent = [utterance for utterance in kept if utterance.text is None]
        if silent and part != "train":
            kept = [utterance for utterance in kept if utterance.text is not None]
            tally.counts.update(of_corpus(utterance, "no text") for utterance in silent)
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
