"""One student for AN4, spoken digits (FSDD) and simulated speech, tried on speakers of digits that it never heard."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apps.speech.config import SpeechConfig, load_config
from apps.speech.data.corpora import find_data, parse_corpus
from apps.speech.data.formats import read_corpus
from apps.speech.data.utterance import hold_out_speakers
from apps.speech.decode.lexicon import Grammar
from apps.speech.evaluate import Scores, compare
from apps.speech.measurement import Measurement
from apps.speech.pipeline import ROLES, Pipeline
from kdcore.config import UserError
from kdcore.progress import Announcer

RECIPE = "ctc_sequence_level"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# spoken digits come over 8 kHz lines: what the other corpora have above 4 kHz is taken away in half of the views; and a
# word by itself is spoken up to half as fast again by one as by another
_VIEWS = (
    *("clean", "speed:0.9", "speed:1.1+tempo:1.3"),
    *("lowpass:3900", "speed:0.85+tempo:1.5+lowpass:3900", "tempo:1.3+lowpass:3900"),
)
# fewer than the recipe has: an epoch of all corpora is more than twice as long as one of the words
_EPOCHS = 80
# the takes of the other speakers' digits that validate; the corpus calls them its test part
_VALID_TAKES = "0,1,2,3,4"


# a folder -> corpora in it
Simulated = Callable[[Path], Sequence[Path]]


@dataclass(frozen=True)
class Found:
    """What one model makes of the test part: digits right and of how many by speaker, and errors on the words."""

    digits: dict[str, tuple[int, int]]
    scores: Scores


def run(
    work: Path,
    simulated: Simulated,
    only: Sequence[str] = (),
    *,
    words: str = "an4",
    digits: str = "fsdd",
    valid_speakers: int = 8,
    overrides: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """Measure a fold for each speaker of ``digits``, who is left out, and a student of the corpus ``words`` alone.

    With a grammar of the ten digits, a clip is right if its one word is. The same speakers of ``words`` validate
    everywhere. ``simulated`` makes corpora of simulated speech in a folder, whose training parts are trained on.
    ``only`` are some of teacher, student_alone and student.

    Raises:
        UserError: a model that is not there.
    """
    if unknown := sorted(set(only) - set(ROLES)):
        raise UserError(f"--only: got {', '.join(unknown)}, wanted some of {', '.join(ROLES)}")
    roles = [role for role in ROLES if role in only or not only]
    made = [str(corpus) for corpus in simulated(work)]
    part = read_corpus(find_data(words)).split("train")
    held = sorted({each.speaker for each in hold_out_speakers(part, count=valid_speakers, seed=0)[1].utterances})
    names = ",".join(held)
    kept, valid = f"{words}@split=train@speaker!={names}", f"{words}@split=train@speaker={names}"
    test = f"{words}@split=test"
    speakers = sorted({each.speaker for each in read_corpus(find_data(digits)).utterances})
    settings = _settings(overrides)

    def fitted(name: str, **parts: list[str]) -> dict[str, Found]:
        given = [(f"data.{part}", json.dumps(corpora)) for part, corpora in parts.items()]
        config: SpeechConfig = load_config(recipe=RECIPE, overrides=[*settings, *given])
        pipeline = Pipeline(config, work / f"speech-digits-{name}", Announcer())
        return {role: _found(pipeline, role, _named(words), _named(digits)) for role in roles}

    base = fitted("none", train=[kept], valid=[valid], test=[test, digits])
    folds = {}
    for speaker in speakers:
        others = f"{digits}@speaker!={speaker}"
        folds[speaker] = fitted(
            speaker,
            train=[kept, f"{others}@index!={_VALID_TAKES}", *made],
            valid=[valid, f"{others}@index={_VALID_TAKES}"],
            test=[test, f"{digits}@speaker={speaker}"],
        )
    return {
        "words": _named(words),
        "data": f"{words}, {digits} and simulated speech; speakers left out: {', '.join(speakers)}",
        "digits": {
            "all corpora": _shares(
                {role: {each: folds[each][role].digits[each] for each in speakers} for role in roles}
            ),
            "one corpus": _shares({role: {each: base[role].digits[each] for each in speakers} for role in roles}),
        },
        "wer": _rates(folds, base, roles),
        "targets": {"digits": 0.9, "wer_difference": 0.005},
    }


def _settings(overrides: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return what all models of the benchmark have beside their data."""
    views = json.dumps([{"student": view, "teacher": view} for view in _VIEWS])
    epochs = [(f"{role}.trainer.max_epochs", str(_EPOCHS)) for role in ("teacher", "student")]
    # greedy alone: the grammar is what digits are decoded with
    return [("views", views), *epochs, *overrides, ("decode.order", "0"), ("seeds", "[0]")]


def _named(corpus: str) -> str:
    """Return what a corpus is called in a run of several."""
    return find_data(parse_corpus(corpus)[0]).resolve().name.split(".")[0]


def _found(pipeline: Pipeline, role: str, words: str, digits: str) -> Found:
    """Return what a model of a run says of the test part, once it is trained."""
    fit: dict[str, Callable[[int], Any]] = {
        "teacher": pipeline.teach,
        "student_alone": pipeline.fit_alone,
        "student": pipeline.fit_student,
    }
    fit[role](0)
    measurement, prepared = Measurement(pipeline), pipeline.prepared
    heard = measurement.hear(next(cell for cell in pipeline.cells(0) if cell.role == role), "test")
    grammar = Grammar(prepared.units, WORDS, max_words=1)
    counts: dict[str, tuple[int, int]] = {}
    for utterance, log_probs in zip(prepared.corpora["test"].utterances, heard.log_probs, strict=True):
        if utterance.extra["corpus"] == digits:
            speaker = utterance.speaker.removeprefix(f"{digits}/")
            # one word, not none: a clip holds a digit
            said = next((each for each in grammar.decode(log_probs, n=2) if each.words), None)
            hit = said is not None and " ".join(said.words) == utterance.text
            right, count = counts.get(speaker, (0, 0))
            counts[speaker] = right + hit, count + 1
    scores = measurement.greedy("test", heard).scores
    return Found(counts, scores.part(np.array([name.startswith(f"{words}/") for name in scores.ids])))


def _shares(counts: dict[str, dict[str, tuple[int, int]]]) -> dict[str, Any]:
    """Return the share of right digits of every model by speaker, and the mean over the speakers."""
    found = {}
    for role, by_speaker in counts.items():
        values = {speaker: right / count for speaker, (right, count) in by_speaker.items()}
        clips = sum(count for _, count in by_speaker.values())
        found[role] = {"mean": statistics.fmean(values.values()), "by_speaker": values, "clips": clips}
    return found


def _rates(folds: dict[str, dict[str, Found]], base: dict[str, Found], roles: Sequence[str]) -> dict[str, Any]:
    """Return the word error rates of the words' test part, and the paired differences of models of all corpora."""
    scores = {role: [fold[role].scores for fold in folds.values()] for role in roles}
    return {
        "all corpora": {role: statistics.fmean([each.wer for each in of_role]) for role, of_role in scores.items()},
        "one corpus": {role: base[role].scores.wer for role in roles},
        "differences": {role: compare(scores[role], [base[role].scores]).as_dict() for role in roles},
    }
