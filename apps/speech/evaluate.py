"""Word and character error rates, with intervals over utterances and over speakers, and systems against each other.

Rates are shares (0.1 is 10 %) of whole corpora: errors over words of the references, so that long utterances weigh
more. An utterance whose reference is empty has no words; what is said there all the same is insertions, which count
into the rate of the corpus. No torch.

Words of one speaker are right or wrong together, more than those of different speakers. An interval over utterances
says how the rate moves with other sentences of *these* speakers; one over speakers, how with other people.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import special

from apps.speech.alignment import Alignment, align, count_characters
from apps.speech.text import TextRules
from kdcore.config import UserError, nearest
from kdcore.run import write_text
from kdcore.statistics import Estimate, paired_bootstrap

if TYPE_CHECKING:
    from apps.speech.data.utterance import Utterance

METRICS = ("wer", "cer")
UNITS = ("utterance", "speaker")
# What an utterance without reference words weighs. Its score is its insertions over this, so that score times weight is
# its insertions and the sum of weights that of words: paired_bootstrap then gives the rate of the corpus.
_NO_WORDS = 1e-9
_CHUNK = 1 << 21  # elements of the largest temporary array of a resampling step


@dataclass(frozen=True, eq=False)
class Scores:
    """The errors of one system on a set of utterances, one entry an utterance in all fields.

    ``references`` and ``hypotheses`` are normalised; ``durations`` are seconds, ``snrs`` decibels (NaN where not
    known, infinity for clean), both float64 [U].
    """

    ids: tuple[str, ...]
    speakers: tuple[str, ...]
    durations: np.ndarray
    snrs: np.ndarray
    references: tuple[str, ...]
    hypotheses: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def alignments(self) -> list[Alignment]:
        """The hypotheses word by word."""
        return align(self.references, self.hypotheses)

    @cached_property
    def words(self) -> np.ndarray:
        """Words of the references, int64 [U]."""
        return np.array([len(each.reference) for each in self.alignments], dtype=np.int64)

    @cached_property
    def edits(self) -> np.ndarray:
        """Substitutions, deletions and insertions of words, int64 [U, 3]."""
        return np.array([each.counts for each in self.alignments], dtype=np.int64).reshape(-1, 3)

    @cached_property
    def _characters(self) -> np.ndarray:
        return np.array(count_characters(self.references, self.hypotheses), dtype=np.int64).reshape(-1, 2)

    def counts(self, metric: str = "wer") -> tuple[np.ndarray, np.ndarray]:
        """Return errors and length of the references, int64 [U] each: words for ``wer``, characters for ``cer``."""
        _check_name("metric", metric, METRICS)
        if metric == "wer":
            return self.edits.sum(axis=1), self.words
        return self._characters[:, 0], self._characters[:, 1]

    def rate(self, metric: str = "wer") -> float:
        """Return the rate of the whole corpus, 0 or more."""
        errors, length = self.counts(metric)
        return float(errors.sum() / length.sum())

    @property
    def wer(self) -> float:
        """The word error rate."""
        return self.rate("wer")

    @property
    def cer(self) -> float:
        """The character error rate; the spaces between words count."""
        return self.rate("cer")

    @property
    def values(self) -> dict[str, float]:
        """``wer``, ``cer`` and ``ser`` (share of utterances with an error), for metrics.json."""
        return {"wer": self.wer, "cer": self.cer, "ser": float((self.edits.sum(axis=1) > 0).mean())}

    def part(self, inside: np.ndarray) -> Scores:
        """Return the scores of the utterances where ``inside``, bool [U], is true; UserError if they have no word."""
        rows = np.flatnonzero(inside)
        if not self.words[rows].sum():
            raise UserError("part: no reference of it has a word, so there is no error rate")
        texts = (self.ids, self.speakers, self.references, self.hypotheses)
        ids, speakers, references, hypotheses = (tuple(each[row] for row in rows) for each in texts)
        return Scores(ids, speakers, self.durations[rows], self.snrs[rows], references, hypotheses)

    def interval(
        self,
        metric: str = "wer",
        *,
        by: str = "utterance",
        level: float = 0.95,
        n_resamples: int = 10_000,
        seed: int = 0,
    ) -> Estimate:
        """Return the rate with its bootstrap interval, resampling utterances or whole speakers (``by``).

        Percentiles, widened for small numbers of units (``_widened``), but not below 0, which no rate is. Ten speakers
        of very uneven rates still get less than is said: 92 % where 95 % is asked for, in simulation. There is no
        interval where all units have one rate, as where no error was seen: resamples then say nothing of how far it
        may be from the truth.

        Raises: UserError as ``counts``, and if an utterance names no speaker.
        """
        errors, length = _grouped(self, metric, by)
        value, n_units = float(errors.sum() / length.sum()), len(errors)
        if n_units == 1:
            return Estimate(value, None, None, level, 1, 1, f"one {by}: no interval")
        totals = _resampled(np.stack([errors, length], axis=1), n_resamples, np.random.default_rng(seed))
        totals = totals[totals[:, 1] > 0]  # a draw of empty references only has no rate
        rates = totals[:, 0] / totals[:, 1]
        if rates.min() == rates.max():
            return Estimate(value, None, None, level, 1, n_units, f"all {by}s have one rate: no interval")
        low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
        method = f"bootstrap of {n_units:,} {by}s, {n_resamples:,} resamples"
        found = _widened(Estimate(value, float(low), float(high), level, 1, n_units, method))
        return replace(found, low=max(0.0, found.low or 0.0))

    def save(self, path: str | Path) -> None:
        """Write one line of JSON an utterance, atomically."""
        rows = zip(self.ids, self.speakers, self.durations, self.snrs, self.references, self.hypotheses, strict=True)
        lines = []
        for name, speaker, duration, snr, reference, hypothesis in rows:
            row = {"id": name, "speaker": speaker, "duration": float(duration), "snr": _to_json(float(snr))}
            lines.append(json.dumps(row | {"reference": reference, "hypothesis": hypothesis}, ensure_ascii=False))
        write_text(path, "".join(line + "\n" for line in lines))

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what ``save`` wrote; raises UserError, with the line, if the file is not of that kind."""
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text") from None
        rows = [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
        return _scores(rows, str(path))


def score(utterances: Sequence[Utterance], hypotheses: Sequence[str], rules: TextRules | None = None) -> Scores:
    """Return the errors of ``hypotheses``, one for each utterance in the same order; ``rules`` normalise both sides.

    Raises:
        UserError: an utterance has no text, an id stands twice, or no reference has a word.
        ValueError: there are not as many hypotheses as utterances.
    """
    if len(utterances) != len(hypotheses):
        raise ValueError(f"hypotheses: got {len(hypotheses)}, wanted one for each of {len(utterances)} utterances")
    rules = rules or TextRules()
    rows = []
    for utterance, hypothesis in zip(utterances, hypotheses, strict=True):
        if utterance.text is None:
            raise UserError(f"utterance {utterance.id}: has no text to compare with")
        snr = utterance.extra.get("snr")
        numeric = isinstance(snr, int | float) and not isinstance(snr, bool)
        rows.append(
            {
                "id": utterance.id,
                "speaker": utterance.speaker,
                "duration": float(utterance.duration),
                "snr": float(snr) if numeric and snr is not None else float("nan"),
                "reference": rules.normalise(utterance.text),
                "hypothesis": rules.normalise(hypothesis),
            }
        )
    return _scores(rows, "utterances")


def seed_scores(
    seeds: Sequence[Scores], metric: str = "wer", *, by: str = "utterance"
) -> tuple[np.ndarray, np.ndarray]:
    """Return what ``kdcore.statistics`` resamples: rates float64 [S, U] and weights float64 [U].

    Units are utterances, or speakers by name. The weighted mean of a row is that seed's rate of the corpus.

    Raises: UserError if the seeds were not tested on the same utterances with the same references.
    """
    if not seeds:
        raise ValueError("seeds: got none, wanted the scores of at least one")
    for other in seeds[1:]:
        _check_same(seeds[0], other)
    grouped = [_grouped(each, metric, by) for each in seeds]
    weights = np.where(grouped[0][1] > 0, grouped[0][1], _NO_WORDS).astype(np.float64)
    return np.stack([errors / weights for errors, _ in grouped]), weights


def compare(
    a: Sequence[Scores],
    b: Sequence[Scores],
    metric: str = "wer",
    *,
    by: str = "utterance",
    level: float = 0.95,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Return the rate of ``a`` minus that of ``b`` (below 0: ``a`` is better) with a paired interval.

    ``a`` and ``b`` are the same system's scores of several seeds each, in the same order, all of the same utterances;
    a system that was run once is compared with every seed of the other. Units (``by``) are resampled and the luck
    of training is added (``kdcore.statistics.paired_bootstrap``); then widened as ``Scores.interval``. Where all
    seeds have the same errors in every unit, the interval is the point 0.

    Raises: UserError as ``seed_scores``.
    """
    first, weights = seed_scores(a, metric, by=by)
    second, _ = seed_scores(b, metric, by=by)
    _check_same(a[0], b[0])
    generator = np.random.default_rng(seed)
    estimate = paired_bootstrap(
        first, second, generator=generator, n_resamples=n_resamples, level=level, weights=weights
    )
    method = estimate.method.replace(" units", f" {by}s")
    return _widened(replace(estimate, method=method))


def worst(scores: Scores, count: int = 10, *, width: int = 100) -> list[dict[str, Any]]:
    """Return the utterances with the most wrong words, worst first, none without an error.

    Each is {id, speaker, errors, words, reference, hypothesis, alignment}, the alignment as text (``Alignment.show``).
    """
    errors = scores.edits.sum(axis=1)
    order = sorted(range(len(scores)), key=lambda at: (-errors[at], scores.words[at], scores.ids[at]))
    return [
        {
            "id": scores.ids[at],
            "speaker": scores.speakers[at],
            "errors": int(errors[at]),
            "words": int(scores.words[at]),
            "reference": scores.references[at],
            "hypothesis": scores.hypotheses[at],
            "alignment": scores.alignments[at].show(width),
        }
        for at in order[:count]
        if errors[at] > 0
    ]


def _grouped(scores: Scores, metric: str, by: str) -> tuple[np.ndarray, np.ndarray]:
    """Return errors and lengths of each unit; speakers in the order of their names."""
    errors, length = scores.counts(metric)
    _check_name("by", by, UNITS)
    if by == "utterance":
        return errors, length
    if "" in scores.speakers:
        raise UserError(f"utterance {scores.ids[scores.speakers.index('')]}: names no speaker to resample by")
    _, inverse = np.unique(np.array(scores.speakers), return_inverse=True)
    return tuple(np.bincount(inverse, weights=each).astype(np.int64) for each in (errors, length))  # type: ignore[return-value]


def _resampled(units: np.ndarray, n_resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Return sums [R, 2] over units drawn with replacement from ``units`` [U, 2]."""
    n_units = len(units)
    step = max(1, _CHUNK // n_units)
    sums = np.empty((n_resamples, 2))
    for start in range(0, n_resamples, step):
        size = min(step, n_resamples - start)
        drawn = generator.integers(0, n_units, size=(size, n_units), dtype=np.int32)
        for column in range(2):
            sums[start : start + size, column] = units[:, column][drawn].sum(axis=1)
    return sums


def _widened(estimate: Estimate) -> Estimate:
    """Return the estimate with its bounds moved out by sqrt(n / (n - 1)) t[n - 1] / z, n its number of units.

    Percentiles of a bootstrap mean are too narrow by both: its variance divides by n, its tails are normal
    (Hesterberg, 2015). The factor is 1.22 for ten units and 1.02 for a hundred at 95 %.
    """
    n = estimate.n_units
    if estimate.low is None or estimate.high is None or n < 2:
        return estimate
    upper = (1 + estimate.level) / 2
    factor = float(np.sqrt(n / (n - 1)) * special.stdtrit(n - 1, upper) / special.ndtri(upper))
    low, high = (estimate.value + factor * (bound - estimate.value) for bound in (estimate.low, estimate.high))
    return replace(estimate, low=low, high=high)


def _check_same(a: Scores, b: Scores) -> None:
    """Refuse to compare systems that were not tested on the same."""
    if len(a) != len(b):
        raise UserError(f"systems to compare: one was tested on {len(a)} utterances, the other on {len(b)}")
    for first, second, mine, theirs in zip(a.ids, b.ids, a.references, b.references, strict=True):
        if first != second:
            raise UserError(f"systems to compare: utterance {first} of the one stands where the other has {second}")
        if mine != theirs:
            raise UserError(f"systems to compare: utterance {first} has the references {mine!r} and {theirs!r}")
    if a.speakers != b.speakers:
        raise UserError("systems to compare: the utterances have other speakers")


def _check_name(option: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise UserError(f"{option}: got {name!r}, {nearest(name, known)}")


def _scores(rows: Sequence[dict[str, Any]], source: str) -> Scores:
    name, times = max(Counter(row["id"] for row in rows).items(), key=lambda item: item[1], default=("", 0))
    if times > 1:
        raise UserError(f"{source}: id {name} stands {times} times")
    if not any(row["reference"] for row in rows):
        raise UserError(f"{source}: no reference has a word, so there is no error rate")
    return Scores(
        ids=tuple(row["id"] for row in rows),
        speakers=tuple(row["speaker"] for row in rows),
        durations=np.array([row["duration"] for row in rows], dtype=np.float64),
        snrs=np.array([row["snr"] for row in rows], dtype=np.float64),
        references=tuple(row["reference"] for row in rows),
        hypotheses=tuple(row["hypothesis"] for row in rows),
    )


def _to_json(snr: float) -> float | str | None:
    """Return decibels as JSON has them: it knows neither NaN nor infinity."""
    return snr if np.isfinite(snr) else None if np.isnan(snr) else "clean"


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, column {error.colno}: {error.msg}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: got {type(row).__name__}, wanted an object")
    for name in ("id", "speaker", "reference", "hypothesis"):
        if not isinstance(row.get(name), str):
            raise UserError(f"{where}: {name}: got {row.get(name)!r}, wanted text")
    snr = {None: float("nan"), "clean": float("inf")}.get(row.get("snr"), row.get("snr"))
    for name, value in (("duration", row.get("duration")), ("snr", snr)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{where}: {name}: got {value!r}, wanted a number")
    return row | {"snr": snr}
