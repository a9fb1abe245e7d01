"""Sequence losses, slow and obvious: one utterance; CTC by enumerating every path through the frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise, product

from tests.kdcore.losses.references.common import kl, softmax

Frames = list[list[float]]


def monotone_paths(choices: list[list[int]]) -> Iterator[tuple[int, ...]]:
    return (p for p in product(*choices) if all(a <= b for a, b in pairwise(p)))


def ref_frame(
    student: Frames,
    teacher: Frames,
    length: int,
    blank: int = 0,
    temperature: float = 1.0,
    blank_threshold: float | None = None,
    blank_weight: float = 0.0,
    blank_free: bool = False,
    delay: int = 0,
    window: int = 0,
    monotone: bool = False,
) -> float:
    def chances(frame: list[float]) -> list[float]:
        return softmax([x for k, x in enumerate(frame) if not (blank_free and k == blank)], temperature)

    def cost(t: int, taught_by: int) -> float:
        return kl(chances(teacher[taught_by]), chances(student[t]))

    frames = range(delay, length)
    choices = [[u for u in range(length) if abs(u - (t - delay)) <= window] for t in frames]
    if monotone:
        path = min(monotone_paths(choices), key=lambda p: math.fsum(map(cost, frames, p)))
    else:
        path = tuple(min(c, key=lambda u, t=t: cost(t, u)) for t, c in zip(frames, choices, strict=True))
    total = weights = 0.0
    for t, u in zip(frames, path, strict=True):
        sure = blank_threshold is not None and softmax(teacher[u])[blank] > blank_threshold
        weight = blank_weight if sure else 1.0
        total += weight * cost(t, u)
        weights += weight
    return temperature**2 * total / weights if weights else 0.0


def ref_spikes(
    student: Frames, guide: Frames, length: int, alpha: float = 1.0, blank: int = 0, form: str = "probability"
) -> float:
    total = 0.0
    for s, g in zip(student[:length], guide[:length], strict=True):
        best = g.index(max(g))
        if best != blank:
            p = softmax(s)[best]
            total += p if form == "probability" else math.log(p)
    return -alpha * total


def chance_of(frames: Frames, symbols: list[int], blank: int) -> float:
    """The chance of a label sequence: the sum over all paths that collapse to it."""
    probabilities = [softmax(frame) for frame in frames]
    total = 0.0
    for path in product(range(len(frames[0])), repeat=len(frames)):
        if [k for k, _ in groupby(path) if k != blank] == symbols:
            total += math.prod(p[k] for p, k in zip(probabilities, path, strict=True))
    return total


def ref_sequence(
    student: Frames,
    length: int,
    hypotheses: list[list[int]],
    lengths: list[int],
    log_scores: list[float],
    blank: int = 0,
    temperature: float = 1.0,
) -> float:
    found = []
    for symbols, size, score in zip(hypotheses, lengths, log_scores, strict=True):
        chance = chance_of(student[:length], symbols[:size], blank)
        if chance > 0:
            found.append((math.exp(score / temperature), -math.log(chance)))
    return math.fsum(w * c for w, c in found) / math.fsum(w for w, _ in found) if found else 0.0


def ref_segments(
    student: Frames,
    length: int,
    segments: list[list[int]],
    hypotheses: list[list[list[int]]],
    lengths: list[list[int]],
    log_scores: list[list[float]],
    blank: int = 0,
    temperature: float = 1.0,
) -> float:
    assert segments[-1][1] == length
    return math.fsum(
        ref_sequence(student[first:end], end - first, *n_best, blank=blank, temperature=temperature)
        for (first, end), *n_best in zip(segments, hypotheses, lengths, log_scores, strict=True)
    )


def ref_words(student: Frames, teacher: Frames, length: int, temperature: float = 1.0) -> float:
    tokens = [
        kl(softmax(t, temperature), softmax(s, temperature))
        for s, t in zip(student[:length], teacher[:length], strict=True)
    ]
    return temperature**2 * math.fsum(tokens) / length


def ref_beam(
    student: list[Frames],
    hypotheses: list[list[int]],
    lengths: list[int],
    log_scores: list[float],
    temperature: float = 1.0,
    per_token: bool = False,
) -> float:
    total = 0.0
    for logits, tokens, size, weight in zip(
        student, hypotheses, lengths, softmax(log_scores, temperature), strict=True
    ):
        chance = math.prod(softmax(logits[u])[tokens[u]] for u in range(size))
        total -= weight * math.log(chance) / (size if per_token else 1)
    return total


REFERENCES: dict[str, Callable[..., float]] = {
    "frame_ctc": ref_frame,
    "guided_spikes": ref_spikes,
    "sequence_ctc": ref_sequence,
    "segment_ctc": ref_segments,
    "word_level": ref_words,
    "sequence_level": ref_beam,
}
