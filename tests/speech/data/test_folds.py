"""Folds of speakers: every voice in one of them, and about as much in each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.speech.data.folds import NO_FOLD, speaker_folds
from apps.speech.data.utterance import Utterance
from kdcore.config import UserError

ROWS = st.lists(
    st.tuples(st.sampled_from(["", *"abcdefg"]), st.floats(0.1, 20), st.booleans()), min_size=1, max_size=40
)


def utterance(index: int, speaker: str, duration: float, spoken: bool = True) -> Utterance:
    return Utterance(f"u{index}", f"{index}.flac", "a" if spoken else None, duration, speaker)


@given(ROWS, st.integers(2, 5), st.randoms())
def test_a_speaker_is_in_one_fold_and_folds_are_of_about_one_length(rows, count, random) -> None:  # type: ignore[no-untyped-def]
    utterances = [utterance(index, *row) for index, row in enumerate(rows)]
    labelled = [each for each in utterances if each.text is not None]
    groups = {each.speaker or each.id for each in labelled}
    if len(groups) < count:
        with pytest.raises(UserError, match=f"got {count}, the training part has {len(groups)} speaker"):
            speaker_folds(utterances, count)
        return
    heaviest = max(sum(each.duration for each in labelled if (each.speaker or each.id) == group) for group in groups)
    total = sum(each.duration for each in labelled)
    try:
        folds = speaker_folds(utterances, count)
    except UserError as error:
        # only where one speaker has nearly everything
        assert "share the recordings more evenly" in str(error) and heaviest > 0.79 * total
        return
    assert heaviest < 0.88 * total
    assert folds.dtype == np.int64 and [fold == NO_FOLD for fold in folds] == [each.text is None for each in utterances]
    assert set(folds) - {NO_FOLD} == set(range(count))
    seconds, longest = np.zeros(count), dict.fromkeys(groups, 0.0)
    of_group: dict[str, int] = {}
    for each, fold in zip(utterances, folds.tolist(), strict=True):
        if fold != NO_FOLD:
            key = each.speaker or each.id
            assert of_group.setdefault(key, fold) == fold
            seconds[fold] += each.duration
            longest[key] += each.duration
    assert seconds.max() - seconds.min() <= max(longest.values()) + 1e-6
    # whatever the order of the utterances
    order = list(range(len(utterances)))
    random.shuffle(order)
    again = speaker_folds([utterances[place] for place in order], count)
    if len({round(value, 9) for value in longest.values()}) == len(longest):
        assert [folds[place] for place in order] == again.tolist()


def test_texts_are_what_counts() -> None:
    known = [utterance(0, "a", 2.0), utterance(1, "b", 1.0)]
    silent = replace(known[0], id="u2", text=None)
    assert speaker_folds([*known, silent], 2).tolist() == [0, 1, NO_FOLD]
