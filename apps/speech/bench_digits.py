"""One student for AN4, spoken digits (FSDD) and simulated speech, tried on speakers of digits that it never heard."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apps.speech.bench_results import complete, test_scores
from apps.speech.config import SpeechConfig, load_config
from apps.speech.data.corpora import find_data, parse_corpus
from apps.speech.data.formats import read_corpus
from apps.speech.data.utterance import hold_out_speakers
from apps.speech.decode.lexicon import Grammar
from apps.speech.evaluate import Scores, compare
from apps.speech.measure import Measurement
from apps.speech.pipeline import Pipeline

RECIPE = "ctc_sequence_level"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# the takes of the other speakers' digits that validate; the corpus calls them its test part
_VALID_TAKES = "0,1,2,3,4"
_ROLES = ("teacher", "student_alone", "student")


def run(
    work: Path,
    simulated: Path,
    *,
    words: str = "an4",
    digits: str = "fsdd",
    valid_speakers: int = 8,
    overrides: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """Measure a fold for each speaker of ``digits``, who is left out, and a student of the corpus ``words`` alone.

    With a grammar of the ten digits, a clip is right if its one word is. The same speakers of ``words`` validate
    everywhere. ``simulated`` is a corpus of simulated speech, whose training part is trained on.
    """
    part = read_corpus(find_data(words)).split("train")
    held = sorted({each.speaker for each in hold_out_speakers(part, count=valid_speakers, seed=0)[1].utterances})
    names = ",".join(held)
    kept, valid = f"{words}@split=train@speaker!={names}", f"{words}@split=train@speaker={names}"
    test = f"{words}@split=test"
    speakers = sorted({each.speaker for each in read_corpus(find_data(digits)).utterances})
    # greedy alone: the grammar is what digits are decoded with
    settings = [*overrides, ("decode.order", "0"), ("seeds", "[0]")]

    def fitted(name: str, **parts: list[str]) -> Pipeline:
        given = [(f"data.{part}", json.dumps(corpora)) for part, corpora in parts.items()]
        config: SpeechConfig = load_config(recipe=RECIPE, overrides=[*settings, *given])
        return complete(config, work / f"speech-digits-{name}")[0]

    base = fitted("none", train=[kept], valid=[valid], test=[test, digits])
    runs = {}
    for speaker in speakers:
        others = f"{digits}@speaker!={speaker}"
        runs[speaker] = fitted(
            speaker,
            train=[kept, f"{others}@index!={_VALID_TAKES}", str(simulated)],
            valid=[valid, f"{others}@index={_VALID_TAKES}"],
            test=[test, f"{digits}@speaker={speaker}"],
        )
    folds = {speaker: _right(pipeline, _named(digits)) for speaker, pipeline in runs.items()}
    return {
        "data": f"{words}, {digits} and simulated speech; speakers left out: {', '.join(speakers)}",
        "digits": _shares(folds, _right(base, _named(digits)), speakers),
        "wer": _rates(runs, base, _named(words)),
        "targets": {"digits": 0.9, "wer_difference": 0.005},
    }


def _named(corpus: str) -> str:
    """Return what a corpus is called in a run of several."""
    return find_data(parse_corpus(corpus)[0]).resolve().name.split(".")[0]


def _right(pipeline: Pipeline, corpus: str) -> dict[str, dict[str, tuple[int, int]]]:
    """Return by role and speaker how many digits of the test part are right, of how many."""
    measurement = Measurement(pipeline)
    grammar = Grammar(pipeline.prepared.units, WORDS, max_words=1)
    utterances = pipeline.prepared.corpora["test"].utterances
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for cell in pipeline.cells(0):
        heard = measurement.hear(cell, "test").log_probs
        counts: dict[str, tuple[int, int]] = {}
        for utterance, log_probs in zip(utterances, heard, strict=True):
            if utterance.extra["corpus"] == corpus:
                speaker = utterance.speaker.removeprefix(f"{corpus}/")
                said = grammar.decode(log_probs)
                hit = bool(said) and " ".join(said[0].words) == utterance.text
                right, count = counts.get(speaker, (0, 0))
                counts[speaker] = right + hit, count + 1
        found[cell.role] = counts
    return found


def _shares(
    folds: dict[str, dict[str, dict[str, tuple[int, int]]]],
    base: dict[str, dict[str, tuple[int, int]]],
    speakers: Sequence[str],
) -> dict[str, Any]:
    """Return the share of right digits of every model by left-out speaker, and the mean of the folds."""

    def shares(counts: list[tuple[int, int]]) -> dict[str, Any]:
        values = [right / count for right, count in counts]
        by_speaker = dict(zip(speakers, values, strict=True))
        return {"mean": statistics.fmean(values), "by_speaker": by_speaker, "clips": sum(n for _, n in counts)}

    found = {role: shares([folds[speaker][role][speaker] for speaker in speakers]) for role in _ROLES}
    other = {role: shares([base[role][speaker] for speaker in speakers]) for role in _ROLES}
    return {"all corpora": found, "one corpus": other}


def _rates(runs: dict[str, Pipeline], base: Pipeline, corpus: str) -> dict[str, Any]:
    """Return the word error rates on the first corpus' test part, and the paired difference of the students."""
    scores = {role: [_of(pipeline, role, corpus) for pipeline in runs.values()] for role in _ROLES}
    others = {role: [_of(base, role, corpus)] for role in _ROLES}
    return {
        "all corpora": {role: statistics.fmean([each.wer for each in of_role]) for role, of_role in scores.items()},
        "one corpus": {role: of_role[0].wer for role, of_role in others.items()},
        "difference of students": compare(scores["student"], others["student"]).as_dict(),
    }


def _of(pipeline: Pipeline, role: str, corpus: str) -> Scores:
    """Return the test scores of a role on the utterances of one corpus."""
    scores = test_scores(pipeline, role)[0]
    return scores.part(np.array([name.startswith(f"{corpus}/") for name in scores.ids]))
