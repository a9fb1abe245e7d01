"""Error rates against jiwer and by hand, intervals that cover what they say, comparisons of like with like."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.speech.data.utterance import Utterance
from apps.speech.evaluate import Scores, compare, score, seed_scores, worst
from apps.speech.text import TextRules
from kdcore.config import UserError

DATA = Path(os.environ.get("KD_DATA", "../shared/data"))
TEXTS = st.lists(st.sampled_from(["one", "two", "oh"]), max_size=5).map(" ".join)


def utterances(texts: list[str | None], speakers: list[str] | None = None) -> list[Utterance]:
    names = speakers or ["anna"] * len(texts)
    return [Utterance(f"u{at}", f"{at}.flac", text, 1.0 + at, names[at]) for at, text in enumerate(texts)]


def simulated(generator: np.random.Generator, sizes: np.ndarray, rates: np.ndarray, each: int = 8) -> Scores:
    """Return scores of speakers with ``sizes`` utterances of ``each`` words, of which a share ``rates`` is wrong."""
    texts, heard, names = [], [], []
    for speaker, (size, rate) in enumerate(zip(sizes, rates, strict=True)):
        for wrong in generator.random((size, each)) < rate:
            texts.append(" ".join(["a"] * each))
            heard.append(" ".join("b" if miss else "a" for miss in wrong))
            names.append(f"s{speaker}")
    return score(utterances(list(texts), names), heard)


def test_rates_by_hand() -> None:
    found = score(utterances(["one two three", "four"]), ["one too", "four five"])
    assert found.edits.tolist() == [[1, 1, 0], [0, 0, 1]]
    assert found.words.tolist() == [3, 1]
    assert found.wer == 3 / 4
    assert found.cer == pytest.approx((7 + 5) / (13 + 4))
    assert found.values == {"wer": found.wer, "cer": found.cer, "ser": 1.0}


@settings(max_examples=60)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6))
def test_rates_are_jiwers(pairs: list[tuple[str, str]]) -> None:
    references, hypotheses = map(list, zip(*pairs, strict=True))
    if not any(references):
        with pytest.raises(UserError, match="no reference has a word"):
            score(utterances(references), hypotheses)
        return
    found = score(utterances(references), hypotheses)
    assert found.wer == pytest.approx(jiwer.wer(references, hypotheses))
    assert found.cer == pytest.approx(jiwer.cer(references, hypotheses))


def test_an_empty_reference_has_no_words_but_insertions() -> None:
    found = score(utterances(["one two", "", ""]), ["one two", "oh oh", ""])
    assert found.words.tolist() == [2, 0, 0]
    assert found.counts("wer")[0].tolist() == [0, 2, 0]
    assert found.wer == 1.0
    assert found.values["ser"] == pytest.approx(1 / 3)
    rates, weights = seed_scores([found])
    assert (rates * weights).sum() / weights.sum() == pytest.approx(found.wer)
    assert np.isfinite(found.interval().high or np.nan)


def test_both_sides_are_normalised() -> None:
    found = score(utterances(["Yes, NO!"]), ["  yes no"])
    assert found.wer == 0 and found.references == ("yes no",)
    assert score(utterances(["Yes"]), ["yes"], TextRules(lower=False)).wer == 1


def test_seed_scores_give_back_the_rate_of_each_seed() -> None:
    generator = np.random.default_rng(0)
    seeds = [simulated(generator, np.array([5, 3, 9]), np.full(3, 0.3)) for _ in range(3)]
    for metric in ("wer", "cer"):
        for by, units in (("utterance", 17), ("speaker", 3)):
            rates, weights = seed_scores(seeds, metric, by=by)
            assert rates.shape == (3, units) and weights.shape == (units,)
            assert np.average(rates, axis=1, weights=weights) == pytest.approx([each.rate(metric) for each in seeds])


def test_intervals_over_speakers_cover_other_speakers_and_over_utterances_do_not() -> None:
    generator = np.random.default_rng(0)
    truth, trials = 0.2, 300
    covered = {"speaker": 0, "utterance": 0}
    for _ in range(trials):
        rates = generator.beta(2, 8, size=10)  # mean 0.2, and some people are far worse understood than others
        errors = generator.binomial(80, np.repeat(rates, 10))
        found = _counted(errors, 80, 10)
        for by in covered:
            estimate = found.interval(by=by, n_resamples=400)
            covered[by] += estimate.low <= truth <= estimate.high  # type: ignore[operator]
    assert 0.90 <= covered["speaker"] / trials <= 0.98
    assert covered["utterance"] / trials < 0.6


def test_intervals_over_utterances_cover_other_utterances() -> None:
    generator = np.random.default_rng(1)
    covered, trials = 0, 300
    for _ in range(trials):
        estimate = _counted(generator.binomial(8, 0.2, size=60), 8, 60).interval(n_resamples=400)
        covered += estimate.low <= 0.2 <= estimate.high  # type: ignore[operator]
    assert 0.92 <= covered / trials <= 0.98


def _counted(errors: np.ndarray, words: int, of_a_speaker: int) -> Scores:
    """Return scores with given errors; the counts are set, since aligning thousands of words takes long."""
    n = len(errors)
    found = Scores(
        ids=tuple(map(str, range(n))),
        speakers=tuple(f"s{at // of_a_speaker}" for at in range(n)),
        durations=np.ones(n),
        snrs=np.full(n, np.nan),
        references=("",) * n,
        hypotheses=("",) * n,
    )
    zeros = np.zeros(n, dtype=np.int64)
    vars(found)["edits"] = np.stack([errors, zeros, zeros], axis=1)
    vars(found)["words"] = np.full(n, words)
    return found


def test_one_unit_has_no_interval() -> None:
    found = score(utterances(["one", "two"]), ["one", "oh"])
    estimate = found.interval(by="speaker")
    assert (estimate.value, estimate.low, estimate.high) == (0.5, None, None)
    assert estimate.method == "one speaker: no interval"
    assert found.interval().n_units == 2


def test_no_bound_of_a_rate_is_below_zero() -> None:
    found = _counted(np.array([1, 1, *[0] * 58]), 8, 6)
    for by in ("utterance", "speaker"):
        estimate = found.interval(by=by)
        assert estimate.low == 0 < estimate.value < estimate.high  # type: ignore[operator]
    # that of a difference may be
    assert compare([found], [_counted(np.full(60, 2), 8, 6)]).high < 0  # type: ignore[operator]


def test_where_no_resample_differs_there_is_no_interval() -> None:
    for errors in (np.zeros(60, np.int64), np.full(60, 8)):
        for by in ("utterance", "speaker"):
            estimate = _counted(errors, 8, 6).interval(by=by)
            assert (estimate.low, estimate.high) == (None, None)
            assert estimate.method == f"all {by}s have one rate: no interval"
            assert estimate.n_units == (60 if by == "utterance" else 10)


def test_the_interval_depends_on_its_seed_only() -> None:
    found = simulated(np.random.default_rng(0), np.array([10, 10, 10]), np.array([0.1, 0.3, 0.5]))
    assert found.interval(seed=3) == found.interval(seed=3) != found.interval(seed=4)
    assert found.interval(level=0.5).low > found.interval(level=0.95).low  # type: ignore[operator]
    assert found.interval().value == found.wer


def test_comparison_sees_what_is_paired() -> None:
    generator = np.random.default_rng(0)
    texts = ["a " * int(size) for size in generator.integers(1, 12, size=80)]
    names = [f"s{at % 8}" for at in range(80)]

    def system(rate: float) -> Scores:
        heard = [" ".join("b" if generator.random() < rate else "a" for _ in text.split()) for text in texts]
        return score(utterances(list(texts), names), heard)

    good, bad = [system(0.1) for _ in range(3)], [system(0.25) for _ in range(3)]
    for by, units in (("utterance", 80), ("speaker", 8)):
        estimate = compare(good, bad, by=by)
        assert estimate.value == pytest.approx(np.mean([x.wer for x in good]) - np.mean([x.wer for x in bad]))
        assert estimate.high < 0 and (estimate.n_seeds, estimate.n_units) == (3, units)  # type: ignore[operator]
        back = compare(bad, good, by=by)
        assert back.value == pytest.approx(-estimate.value)
    assert compare(good, good).low == compare(good, good).high == 0
    once = compare(good, [bad[0]])
    assert once.value == pytest.approx(np.mean([x.wer for x in good]) - bad[0].wer)
    assert "speakers" in compare(good, bad, by="speaker").method


@pytest.mark.parametrize("by", ["utterance", "speaker"])
def test_comparisons_cover_the_difference(by: str) -> None:
    generator = np.random.default_rng(2)
    covered, trials = 0, 200
    for _ in range(trials):
        spread = generator.normal(0, 0.04, size=8) if by == "speaker" else np.zeros(8)
        rates = np.repeat(0.3 + spread, 10)
        a = _counted(generator.binomial(40, rates - 0.1), 40, 10)
        b = _counted(generator.binomial(40, np.full(80, 0.3)), 40, 10)
        estimate = compare([a], [b], by=by, n_resamples=400)
        covered += estimate.low <= -0.1 <= estimate.high  # type: ignore[operator]
    assert 0.90 <= covered / trials <= 0.985


def test_only_the_same_utterances_are_compared() -> None:
    base = score(utterances(["one", "two"]), ["one", "two"])
    shorter = score(utterances(["one"]), ["one"])
    other = score(utterances(["one", "three"]), ["one", "two"])
    renamed = score(utterances(["one", "two"])[::-1], ["two", "one"])
    speakers = score(utterances(["one", "two"], ["anna", "ben"]), ["one", "two"])
    for wrong, message in (
        (shorter, "2 utterances, the other on 1"),
        (other, "u1 has the references 'two' and 'three'"),
        (renamed, "u0 of the one stands where the other has u1"),
        (speakers, "other speakers"),
    ):
        with pytest.raises(UserError, match=message):
            compare([base], [wrong])
        with pytest.raises(UserError, match=message):
            seed_scores([base, wrong])


def test_the_worst_come_first_with_their_alignment() -> None:
    found = score(utterances(["one two three", "four", "five six", "seven"]), ["oh", "for", "five six", "sieben acht"])
    rows = worst(found)
    assert [row["id"] for row in rows] == ["u0", "u3", "u1"]  # as many errors in fewer words are worse
    assert rows[1]["alignment"].startswith("REF: ") and "sieben" in rows[1]["alignment"]
    assert (rows[0]["errors"], rows[0]["words"], rows[0]["speaker"]) == (3, 3, "anna")
    assert len(worst(found, 1)) == 1
    json.dumps(rows)


def test_saved_and_loaded(tmp_path: Path) -> None:
    items = utterances(["one", "two é", ""], ["anna", "", "ben"])
    for item, snr in zip(items, (12.5, float("inf"), None), strict=True):
        item.extra["snr"] = snr
    found = score(items, ["oh", "two é", "x"])
    assert found.snrs[:2].tolist() == [12.5, np.inf] and np.isnan(found.snrs[2])
    found.save(tmp_path / "scores.jsonl")
    again = Scores.load(tmp_path / "scores.jsonl")
    assert (again.ids, again.speakers, again.references) == (found.ids, found.speakers, found.references)
    assert again.hypotheses == found.hypotheses and again.values == found.values
    assert np.array_equal(again.snrs, found.snrs, equal_nan=True) and np.array_equal(again.durations, found.durations)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1, column 2"),
        ("[]", "line 1: got list, wanted an object"),
        ('{"id": 3}', "line 1: id: got 3, wanted text"),
        (
            '{"id":"a","speaker":"","reference":"x","hypothesis":"","duration":"1"}',
            "duration: got '1', wanted a number",
        ),
        ("", "no reference has a word"),
    ],
)
def test_damaged_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "scores.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        Scores.load(file)


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        Scores.load(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        Scores.load(tmp_path / "binary")


def test_bad_input() -> None:
    with pytest.raises(UserError, match="utterance u1: has no text"):
        score(utterances(["one", None]), ["one", "two"])
    with pytest.raises(ValueError, match="got 1, wanted one for each of 2"):
        score(utterances(["one", "two"]), ["one"])
    with pytest.raises(UserError, match="id u0 stands 2 times"):
        score(utterances(["one"]) * 2, ["one", "one"])
    found = score(utterances(["one", "two"], ["anna", ""]), ["one", "two"])
    with pytest.raises(UserError, match="u1: names no speaker"):
        found.interval(by="speaker")
    with pytest.raises(UserError, match="metric: got 'were', did you mean wer"):
        found.rate("were")
    with pytest.raises(UserError, match="by: got 'word'"):
        found.interval(by="word")
    with pytest.raises(ValueError, match="seeds: got none"):
        seed_scores([])


def test_an4_has_the_words_and_characters_its_source_states() -> None:
    manifest = DATA / "speech" / "an4" / "test.jsonl"
    if not manifest.exists():
        pytest.skip(f"{manifest} is not there")
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    items = [Utterance(r["id"], r["audio_filepath"], r["text"], r["duration"], r["speaker"]) for r in rows]
    found = score(items, [""] * len(items))
    assert len(found) == 130 and found.words.sum() == 773 and found.counts("cer")[1].sum() == 2565
    assert found.wer == found.cer == 1
    assert found.interval(by="speaker").n_units == 10
    perfect = score(items, [item.text or "" for item in items])
    assert perfect.values == {"wer": 0, "cer": 0, "ser": 0} and worst(perfect) == []


def test_no_torch() -> None:
    modules = "alignment, calibration, evaluate, latency, slices"
    code = f"import sys; from apps.speech import {modules}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
