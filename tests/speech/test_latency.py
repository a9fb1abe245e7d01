"""Delays on words whose times are known, and the measures of cost."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.speech.latency import (
    ComputeTime,
    emission_delays,
    finalisation_latency,
    first_symbol_latency,
    peak_memory,
    real_time_factor,
    summarise,
)


def words(text: str, *, step: float = 0.5, late: float = 0.0) -> list[dict]:
    """Return words of 0.4 s, one each ``step``, that appear ``late`` after their end."""
    return [
        {"word": word, "start": at * step, "end": at * step + 0.4, "confidence": 0.9, "emitted": at * step + 0.4 + late}
        for at, word in enumerate(text.split())
    ]


def test_delays_of_the_words_that_are_right() -> None:
    student = words("one too oh three", late=0.24)
    found = emission_delays(student, words("one two three"))
    assert [(each.word, each.position) for each in found] == [("one", 0), ("three", 2)]
    # "three" is the student's fourth word: it appeared at 1.5 + 0.4 + 0.24 and ended at 1.4
    assert [each.delay_ms for each in found] == pytest.approx([240.0, 740.0])


def test_words_the_teacher_has_wrong_are_left_out() -> None:
    found = emission_delays(words("one two three", late=0.1), words("one who three"), "one two three")
    assert [(each.word, each.position) for each in found] == [("one", 0), ("three", 2)]
    assert [each.delay_ms for each in found] == pytest.approx([100.0, 100.0])
    assert emission_delays(words("two"), words("two"), "nine") == []
    assert emission_delays([], words("one")) == emission_delays(words("one"), []) == []


def test_a_word_may_appear_before_it_has_ended() -> None:
    assert emission_delays(words("one", late=-0.1), words("one"))[0].delay_ms == pytest.approx(-100.0)


@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=8), st.floats(-0.3, 2))
def test_a_student_that_is_always_right_has_its_delay_everywhere(said: list[str], late: float) -> None:
    text = " ".join(said)
    found = emission_delays(words(text, late=late), words(text))
    assert [each.delay_ms for each in found] == pytest.approx([1000 * late] * len(said), abs=1e-6)


def test_first_and_last() -> None:
    student, teacher = words("one two", late=0.2), words("one two")
    assert first_symbol_latency(student, teacher) == pytest.approx(600.0)
    assert first_symbol_latency(student, teacher, first_symbol=0.3) == pytest.approx(300.0)
    assert first_symbol_latency([], teacher, first_symbol=0.3) == pytest.approx(300.0)
    assert finalisation_latency(student, teacher) == pytest.approx(200.0)
    assert finalisation_latency(student, teacher, finalised=1.5) == pytest.approx(600.0)
    for measure in (first_symbol_latency, finalisation_latency):
        assert measure([], teacher) is None is measure(student, [])


def test_summary() -> None:
    assert summarise([*map(float, range(101)), None]) == {"n": 101, "p50": 50.0, "p90": 90.0, "p95": 95.0}
    assert summarise([None]) == {"n": 0, "p50": None, "p90": None, "p95": None} == summarise([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"emitted": None}, "emitted of the word 'one': got None"),
        ({"emitted": float("nan")}, "emitted of the word 'one': got nan"),
        ({"emitted": True}, "emitted"),
        ({"word": "one two"}, "word: got 'one two'"),
        ({"word": ""}, "word: got ''"),
    ],
)
def test_bad_words(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        emission_delays([{**words("one")[0], **change}], words("one"))


def test_real_time_factor() -> None:
    assert real_time_factor(0.5, 10.0) == 0.05
    assert real_time_factor(0.0, 1.0) == 0
    for seconds in ((1.0, 0.0), (-1.0, 1.0), (1.0, float("nan"))):
        with pytest.raises(ValueError, match="wanted"):
            real_time_factor(*seconds)


def test_compute_time_counts_work_and_adds_up() -> None:
    meter = ComputeTime()
    with meter:
        sum(range(200_000))
    once = meter.seconds
    with meter:
        sum(range(200_000))
    assert 0 < once < meter.seconds


def test_peak_memory_is_in_bytes_and_grows() -> None:
    code = (
        "from apps.speech.latency import peak_memory as peak; before = peak(); block = b'x' * (before + (64 << 20)); "
        "print(before, peak())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after = map(int, found.split())
    assert 1 << 22 < before < 1 << 32
    assert after >= before + (60 << 20)
    assert peak_memory() > 1 << 22
