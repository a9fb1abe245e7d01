"""How long a streaming recogniser lets people wait, and what it costs: delays in ms, real-time factor, memory.

Times are seconds from the start of the audio. ``emitted`` of a word is how much audio had been heard when the word
appeared; the time to compute comes on top and is the real-time factor's matter. When words were really said is taken
from the teacher's alignment. No torch.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from apps.speech.alignment import align

Word = Mapping[str, Any]  # word, start, end, confidence; of a streaming recogniser also emitted


class WordDelay(NamedTuple):
    """A word that was recognised, its position in the reference, and how long after its end it appeared."""

    word: str
    position: int
    delay_ms: float


def emission_delays(student: Sequence[Word], teacher: Sequence[Word], reference: str | None = None) -> list[WordDelay]:
    """Return the delay of each word that the student has right: its ``emitted`` minus the teacher's ``end``, in ms.

    Words are matched by aligning both with ``reference`` (normalised as they are); a word that either has wrong is
    left out. Without a reference the teacher's words are one, as they are if it was forced to align the transcript.
    A delay is negative where the student is sure of a word before it has ended.

    Raises: ValueError if a word lacks a time or has one that is not a finite number.
    """
    heard = " ".join(_text(word) for word in student)
    said = " ".join(_text(word) for word in teacher)
    of_student, of_teacher = align([said if reference is None else reference] * 2, [heard, said])
    ends = dict(of_teacher.hits)
    return [
        WordDelay(
            of_student.reference[position],
            position,
            1000 * (_time(student[mine], "emitted") - _time(teacher[ends[position]], "end")),
        )
        for position, mine in of_student.hits
        if position in ends
    ]


def first_symbol_latency(
    student: Sequence[Word], teacher: Sequence[Word], *, first_symbol: float | None = None
) -> float | None:
    """Return how long after the start of the first word something appeared, in ms; None if nothing did or was said.

    ``first_symbol`` is when the student's first symbol appeared, in seconds, where that is known; else the first
    word's ``emitted`` stands for it.
    """
    if not teacher or (not student and first_symbol is None):
        return None
    appeared = min(_time(word, "emitted") for word in student) if first_symbol is None else first_symbol
    return 1000 * (appeared - min(_time(word, "start") for word in teacher))


def finalisation_latency(
    student: Sequence[Word], teacher: Sequence[Word], *, finalised: float | None = None
) -> float | None:
    """Return how long after the end of the last word the text was final, in ms; None if nothing was said or heard.

    ``finalised`` is when the student declared it final (an endpoint), in seconds, where that is known; else the time
    the last word appeared stands for it, and a student that missed the last word looks too fast.
    """
    if not teacher or (not student and finalised is None):
        return None
    settled = max(_time(word, "emitted") for word in student) if finalised is None else finalised
    return 1000 * (settled - max(_time(word, "end") for word in teacher))


def summarise(delays_ms: Sequence[float | None]) -> dict[str, float | int | None]:
    """Return {n, p50, p90, p95} of delays in ms; None are not counted, and of no delays the percentiles are None."""
    values = np.array([each for each in delays_ms if each is not None], dtype=np.float64)
    names = {"p50": 0.5, "p90": 0.9, "p95": 0.95}
    found = {name: float(np.quantile(values, share)) if len(values) else None for name, share in names.items()}
    return {"n": len(values), **found}


@dataclass
class ComputeTime:
    """Measures the processor time of this process, all threads, in a ``with`` statement: ``seconds`` afterwards."""

    seconds: float = 0.0
    _started: float = 0.0

    def __enter__(self) -> ComputeTime:
        self._started = time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds += time.process_time() - self._started


def real_time_factor(cpu_seconds: float, audio_seconds: float) -> float:
    """Return the seconds of one core per second of audio; below 1 is faster than the speech comes.

    Raises: ValueError on audio of no length or negative computing time.
    """
    if not (audio_seconds > 0 and cpu_seconds >= 0):
        raise ValueError(
            f"got {cpu_seconds} s of computing for {audio_seconds} s of audio, wanted 0 or more for more than 0"
        )
    return cpu_seconds / audio_seconds


def peak_memory() -> int:
    """Return the most memory (resident set) this process has had at any time, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts kilobytes


def _text(word: Word) -> str:
    text = word.get("word")
    if not isinstance(text, str) or not text or text.split() != [text]:
        raise ValueError(f"word: got {text!r}, wanted one word")
    return text


def _time(word: Word, name: str) -> float:
    value = word.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating) or not np.isfinite(value):
        raise ValueError(f"{name} of the word {word.get('word')!r}: got {value!r}, wanted seconds")
    return float(value)
