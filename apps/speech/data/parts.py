"""What a run trains, validates and tests on, read and checked; speakers are held out where a part is missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from apps.speech.audio import examine, is_beginning
from apps.speech.config import DataConfig
from apps.speech.data.corpora import Source, Sources, refuse_shared
from apps.speech.data.splits import PARTS, part_of
from apps.speech.data.utterance import (
    BadRow,
    Corpus,
    LeftOut,
    Tally,
    Utterance,
    by_reason,
    hold_out_speakers,
    impossible,
    loaded,
    of_corpus,
    outside_units,
)
from apps.speech.decode.lm import marker_in
from apps.speech.text import TextRules
from apps.speech.units import Units
from kdcore.config import UserError

# utterances of a kind that is merely bad which are named; the others are counted
_NAMED = 5
# stands for a part where rows that were left out could be of several
UNPLACED = "part unknown"
_PURPOSE = {"valid": "validate on", "test": "test on"}
Announce = Callable[[str], None]


@dataclass(frozen=True)
class Parts:
    """The corpora by name: train, valid, test, and unlabelled where there is one."""

    corpora: dict[str, Corpus]
    # what they were read from
    sources: tuple[Source, ...] = ()
    # part -> what is wrong with utterances that are kept (``audio.examine``, ``unwritable``) -> their ids
    notes: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    # rows left out of the corpora that could be of several parts
    unplaced: tuple[LeftOut, ...] = ()

    def __getitem__(self, name: str) -> Corpus:
        return self.corpora[name]

    @property
    def simulated(self) -> bool:
        """Whether any of it says so of itself, in ``dataset.json`` beside it."""
        return any(source.simulated for source in self.sources)

    @property
    def left_out(self) -> dict[str, int]:
        """How many utterances were left out, by part (or ``UNPLACED``) and reason; each is counted once."""
        counts = {part: corpus.counts for part, corpus in self.corpora.items()} | {UNPLACED: by_reason(self.unplaced)}
        return {f"{part}: {reason}": count for part, found in counts.items() for reason, count in found.items()}

    @property
    def problems(self) -> list[str]:
        """What is wrong with the first utterances that were left out, by part and reason."""
        placed = [problem for corpus in self.corpora.values() for problem in corpus.problems]
        return placed + [problem for each in self.unplaced for problem in each.problems]

    @property
    def remarks(self) -> dict[str, dict[str, dict[str, Any]]]:
        """How many utterances are kept though something is wrong with them, by part and kind, and the first of them.

        Audio may be clipped, silent or offset; a text to test with may hold what no model can write.
        """
        return {
            part: {kind: {"count": len(names), "first": names[:_NAMED]} for kind, names in notes.items()}
            for part, notes in self.notes.items()
        }


def read_parts(config: DataConfig, announce: Announce = lambda text: None) -> Parts:
    """Return the parts of a configuration; every audio file of them was read once.

    Raises:
        UserError: a part is missing or empty, one recording is in two of train, valid and test, or anything in one is
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
    if not any(each.text is not None for each in found["train"].utterances):
        raise UserError(f"train: none of the {len(found['train'])} utterances in {found['train'].folder} has a text")
    _announce_splits(found, sources, announce)
    for part, count in (("test", config.test_speakers), ("valid", config.valid_speakers)):
        if part in found:
            if count != getattr(DataConfig, f"{part}_speakers"):
                announce(f"data.{part}_speakers: not needed, there is a part to {_PURPOSE[part]}")
        else:
            found["train"], found[part] = hold_out_speakers(found["train"], count=count, seed=config.split_seed)
            left = len({each.speaker for each in found["train"].utterances})
            announce(f"{part}: speakers held out: {count} (data.{part}_speakers), left to train on: {left}")
    refuse_shared(found, list(PARTS))
    if config.unlabelled is not None:
        corpus = sources.whole(config.unlabelled, "--unlabelled")
        found["unlabelled"] = replace(corpus, utterances=tuple(replace(u, text=None) for u in corpus.utterances))
        judged = {part: found[part].select(lambda each: each.text is not None) for part in ("valid", "test")}
        refuse_shared({**judged, "unlabelled": corpus}, ["unlabelled", "valid", "test"])
    found, unplaced = _placed(found)
    notes: dict[str, dict[str, list[str]]] = {}
    read = {part: _readable(part, corpus, config, announce, notes) for part, corpus in found.items()}
    return Parts(read, tuple(sources.sources.values()), notes, unplaced)


def _announce_splits(parts: dict[str, Corpus], sources: Sources, announce: Announce) -> None:
    """Say which splits the parts are, where their names do not say it, and which are of none."""
    for part, corpus in parts.items():
        if corpus.splits not in ((), (part,)):
            announce(f"{part}: {', '.join(corpus.splits)}")
    unused = [each for each in dict.fromkeys(sources.unused) if each not in sources.used]
    several = len(sources.sources) > 1
    if named := [f"{split} of {name}" if several else split for name, split in unused]:
        announce(f"not used: {', '.join(named)} (--train, --valid or --test CORPUS@split=NAME would)")


def _placed(corpora: dict[str, Corpus]) -> tuple[dict[str, Corpus], tuple[LeftOut, ...]]:
    """Return the parts, each with what was left out of it alone, and what may be of several of them."""
    holders: dict[LeftOut, list[str]] = {}
    for part, corpus in corpora.items():
        for each in corpus.left_out:
            holders.setdefault(each, []).append(part)
    for each, parts in holders.items():
        # a part that was held out of another has no split of its own: the row stays with its split's
        holders[each] = [part for part in parts if each.split and part_of(each.split) == part] or parts
    placed = {
        part: replace(corpus, left_out=tuple(each for each in corpus.left_out if holders[each] == [part]))
        for part, corpus in corpora.items()
    }
    return placed, tuple(each for each, parts in holders.items() if len(parts) > 1)


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
        if text is not None and (unfit := _unfit(part, utterance, text)) is not None:
            tally.add(unfit)
            continue
        for problem in examine(samples):
            kind = problem.partition(" (")[0].partition(" of ")[0]
            notes.setdefault(part, {}).setdefault(kind, []).append(utterance.id)
        if is_beginning(1.02 * len(samples) / 16_000, utterance.duration):  # but for what an mp3's header estimates
            notes.setdefault(part, {}).setdefault("shorter than its duration says", []).append(utterance.id)
        if corpus.begins(utterance):
            notes.setdefault(part, {}).setdefault("longer than its duration says", []).append(utterance.id)
        kept.append(replace(utterance, text=text, duration=len(samples) / 16_000))
        if done % 200 == 0 or done == len(corpus):
            announce(f"{part}: read {done} of {len(corpus)}")
    if part in ("train", "valid", "test"):
        silent = [utterance for utterance in kept if utterance.text is None]
        if silent and part != "train":
            kept = [utterance for utterance in kept if utterance.text is not None]
            for utterance in silent:
                tally.count(of_corpus(utterance, "no text"))
    if not kept:
        raise UserError(f"{part}: no utterance is left of {len(corpus)} in {corpus.folder}")
    return replace(corpus, utterances=tuple(kept), left_out=(*corpus.left_out, *tally.left_out))


def _unfit(part: str, utterance: Utterance, text: str) -> BadRow | None:
    """Return why a normalised text is not one to train or test on."""
    reason, what = "no word", "no word"
    if text:
        if (marker := marker_in(text)) is None:
            return None
        reason, what = "symbol of language models", f"{marker}, which language models have by themselves"
    return BadRow(
        of_corpus(utterance, reason), f"{part}: utterance {utterance.id}: text {utterance.text!r} holds {what}"
    )


def spellable(corpus: Corpus, units: Units, rules: TextRules, *, skip_bad: bool) -> tuple[Corpus, list[str]]:
    """Return the utterances that CTC can be trained on, and what is wrong with the text of each of the others.

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
    counts = (("outside the units", len(outside)), ("longer text than frames", len(short)))
    left_out = (*corpus.left_out, *(LeftOut(reason, None, count) for reason, count in counts if count))
    kept = known.select(lambda each: each.id not in names)
    problems = [*(f"{name}: {problem}" for name, problem in outside.items()), *map(str, short)]
    return replace(kept, left_out=left_out), problems


def unwritable(corpus: Corpus, units: Units, rules: TextRules) -> dict[str, list[str]]:
    """Return by kind the utterances whose text no model can write: with symbols outside the units, or too long."""
    outside = outside_units(corpus.utterances, units, rules)
    short = impossible(corpus.select(lambda each: each.id not in outside), units, rules)
    found = {"text outside the units": list(outside), "longer text than frames": [each.utterance.id for each in short]}
    return {kind: names for kind, names in found.items() if names}


def no_longer(part: str, corpus: Corpus, seconds: float, *, skip_bad: bool) -> Corpus:
    """Return the utterances of at most so many seconds, which a pretrained teacher hears at once.

    Raises:
        UserError: one is longer and ``skip_bad`` is off, or none is left.
    """
    tally, kept = Tally(skip_bad), []
    for each in corpus.utterances:
        if each.duration <= seconds:
            kept.append(each)
            continue
        problem = f"{each.duration:g} s, wanted at most {seconds:g} s, which a pretrained teacher hears at once"
        tally.add(
            BadRow(
                of_corpus(each, "too long for the teacher"),
                f"{part}: utterance {each.id} ({corpus.path(each)}): got {problem}",
            )
        )
    if not kept:
        raise UserError(f"{part}: no utterance of {len(corpus)} in {corpus.folder} is of at most {seconds:g} s")
    return replace(corpus, utterances=tuple(kept), left_out=(*corpus.left_out, *tally.left_out))
