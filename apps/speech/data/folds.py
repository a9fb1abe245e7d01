"""Folds of speakers: what a model is trained without, so that it can say what it makes of voices it never heard."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from apps.speech.data.utterance import Utterance
from kdcore.config import UserError

# an utterance that belongs to no fold
NO_FOLD = -1


def speaker_folds(utterances: Sequence[Utterance], count: int) -> np.ndarray:
    """Return the fold of each utterance, int64 [N]: 0 to below ``count``, all of a speaker in one, of about one length.

    An utterance that names no speaker is as one of its own. One without a text is in no fold, ``NO_FOLD``.

    Raises:
        UserError: fewer speakers than folds, or one fold that holds nearly everything.
    """
    seconds: dict[str, float] = {}
    keys = [f"speaker {each.speaker}" if each.speaker else f"utterance {each.id}" for each in utterances]
    for key, each in zip(keys, utterances, strict=True):
        if each.text is not None:
            seconds[key] = seconds.get(key, 0.0) + each.duration
    if len(seconds) < count:
        raise UserError(
            f"teacher.folds: got {count}, the training part has {len(seconds)} speakers; wanted at most as many folds"
        )
    held, of_speaker = np.zeros(count), {}
    # the longest first, each where there is least: a function of the speakers, whatever their order
    for key in sorted(seconds, key=lambda key: (-seconds[key], key)):
        fold = of_speaker[key] = int(held.argmin())
        held[fold] += seconds[key]
    rest = held.sum() - held.max()
    if rest < held.sum() * (1 - 1 / count) / 4:
        raise UserError(
            f"teacher.folds: one of {count} holds {held.max():.1f} s, its teacher would be trained on {rest:.1f} s; "
            "wanted speakers who share the recordings more evenly"
        )
    return np.array(
        [NO_FOLD if each.text is None else of_speaker[key] for key, each in zip(keys, utterances, strict=True)],
        np.int64,
    )
