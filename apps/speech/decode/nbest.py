"""The N best symbol sequences of a teacher, with exact scores, for distillation at the sequence level. No torch."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np

from apps.speech.decode.beam import FLOOR
from apps.speech.decode.ctc import Hypothesis, check_log_probs, ctc_log_probabilities


def n_best(
    log_probs: np.ndarray, n: int, *, beam: int = 16, tokens: int = 30, threshold: float = 20.0
) -> list[Hypothesis]:
    """Return the at most ``n`` most probable symbol sequences of ``log_probs`` [T, C], the best first.

    flashlight-text's prefix beam search finds them: paths with the same symbols are merged, none is twice there.
    Their scores are exact, log P(ids | x) over all paths, and order them. The empty sequence may be among them.

    Options:
        n: how many; the beam is at least twice that.
        beam: prefixes kept after each frame; one that ends in a blank and one that ends in its symbol count apart.
        tokens: classes tried in each frame, the most probable ones.
        threshold: prefixes further than this below the best one are dropped, natural log.

    Raises:
        ValueError: as ``check_log_probs``, or an option out of range.
    """
    from flashlight.lib.text import decoder

    if n < 1 or beam < 1 or tokens < 1 or not threshold > 0:
        raise ValueError(
            f"n, beam, tokens, threshold: got {n}, {beam}, {tokens}, {threshold}, wanted 1 or more each and more than 0"
        )
    values = check_log_probs(log_probs)
    frames, classes = values.shape
    if not frames:
        return [Hypothesis((), 0.0, (), ())]
    blank = classes - 1
    options = decoder.LexiconFreeDecoderOptions(
        beam_size=max(beam, 2 * n),
        beam_size_token=min(tokens, classes),
        beam_threshold=threshold,
        lm_weight=0.0,
        sil_score=0.0,
        log_add=True,
        criterion_type=decoder.CriterionType.CTC,
    )
    # the "silence" is what the decoder takes for the class before the first frame: the blank, or a symbol would be lost
    search = decoder.LexiconFreeDecoder(options, decoder.ZeroLM(), blank, blank, [])
    emissions = np.ascontiguousarray(np.maximum(values, np.log(FLOOR)), dtype=np.float32)
    results = search.decode(emissions.ctypes.data, frames, classes)
    found = [_hypothesis(result, values) for result in results]
    scores = ctc_log_probabilities(values, [hypothesis.ids for hypothesis in found])
    order = np.argsort(-scores, kind="stable")[:n].tolist()
    return [replace(found[index], score=float(scores[index])) for index in order if np.isfinite(scores[index])]


def _hypothesis(result: Any, values: np.ndarray) -> Hypothesis:
    """Return the symbols of flashlight's path; it has one class more than there are frames at both ends."""
    ids, frames, frame = [], [], 0
    for symbol, run in groupby(result.tokens[1:-1]):
        if symbol != values.shape[1] - 1:
            ids.append(symbol)
            frames.append(frame)
        frame += sum(1 for _ in run)
    probabilities = np.exp(values[frames, ids]).tolist()
    return Hypothesis(tuple(ids), float(result.score), tuple(frames), tuple(probabilities))
