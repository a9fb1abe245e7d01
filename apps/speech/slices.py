"""Error rates of parts of a test set: by speaker, by length, by signal-to-noise ratio. No torch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from apps.speech.evaluate import Scores

NOT_STATED = "not stated"
SNR_EDGES = (0, 5, 10, 15, 20, 25, 30)

Row = dict[str, str | int | float | None]


def slices(scores: Scores, metric: str = "wer", *, n_lengths: int = 4) -> list[Row]:
    """Return rows {axis, position, slice, n, value} for ``slices.json``; role, model and seed are the caller's to add.

    Axis ``speaker`` has the speakers by name; ``length (s)`` cuts the durations at quantiles into at most
    ``n_lengths`` parts; ``SNR (dB)`` has steps of 5 dB from 0 to 30 and is there only if an utterance states its
    ratio. ``n`` counts utterances; ``value`` is None where the references of a slice have no word. The slices depend
    on the utterances alone, so they are the same for every system tested on them.

    Raises: UserError on an unknown metric.
    """
    errors, length = scores.counts(metric)
    rows: list[Row] = []
    for axis, parts in (
        ("speaker", _speakers(scores)),
        ("length (s)", _lengths(scores, n_lengths)),
        ("SNR (dB)", _ratios(scores)),
    ):
        for position, (label, inside) in enumerate(parts):
            total = int(length[inside].sum())
            value = float(errors[inside].sum() / total) if total else None
            rows.append({"axis": axis, "position": position, "slice": label, "n": int(inside.sum()), "value": value})
    return rows


def _speakers(scores: Scores) -> Iterator[tuple[str, np.ndarray]]:
    names = np.array(scores.speakers)
    for name in sorted(set(scores.speakers)):
        yield name or NOT_STATED, names == name


def _lengths(scores: Scores, count: int) -> Iterator[tuple[str, np.ndarray]]:
    # to the tenth that the labels show, so that no two parts have the same label
    seconds = np.round(scores.durations, 1)
    edges = np.unique(np.quantile(seconds, np.linspace(0, 1, count + 1)[1:-1], method="lower"))
    slot = np.searchsorted(edges, seconds, side="left")
    for index in np.unique(slot):
        inside = slot == index
        yield f"{seconds[inside].min():.1f}-{seconds[inside].max():.1f}", inside


def _ratios(scores: Scores) -> Iterator[tuple[str, np.ndarray]]:
    if np.isnan(scores.snrs).all():
        return
    labels = [f"below {SNR_EDGES[0]}", *(f"{low}-{low + 5}" for low in SNR_EDGES[:-1]), f"{SNR_EDGES[-1]} and above"]
    slot = np.searchsorted(SNR_EDGES, scores.snrs, side="right")
    known = np.isfinite(scores.snrs)
    # minus infinity, noise alone, is below every edge; infinity is no noise at all
    parts = [(label, (slot == index) & (known | np.isneginf(scores.snrs))) for index, label in enumerate(labels)]
    parts += [("clean", np.isposinf(scores.snrs)), (NOT_STATED, np.isnan(scores.snrs))]
    yield from ((label, inside) for label, inside in parts if inside.any())
