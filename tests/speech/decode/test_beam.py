from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.speech.decode.beam import PrefixSearch
from apps.speech.decode.nbest import n_best
from tests.speech.decode.made import Characters, an4_texts, beam_search, enumerate_all, noisy, posteriors


def split(log_probs: np.ndarray, cuts: list[int]) -> list[np.ndarray]:
    edges = [0, *sorted(min(cut, len(log_probs)) for cut in cuts), len(log_probs)]
    return [log_probs[first:last] for first, last in itertools.pairwise(edges)]


@pytest.mark.parametrize("seed", range(12))
def test_a_wide_beam_has_every_sequence_with_its_probability(seed: int) -> None:
    rng = np.random.default_rng(seed)
    log_probs = noisy(int(rng.integers(1, 7)), int(rng.integers(2, 5)), rng, scale=1.0)
    expected = enumerate_all(log_probs)
    search = PrefixSearch(log_probs.shape[1], beam=10_000, floor=0.0, threshold=600.0)
    search.accept(log_probs)
    found = {one.hypothesis.ids: one.hypothesis.score for one in search.candidates()}
    assert found.keys() == expected.keys()
    assert [found[ids] for ids in expected] == pytest.approx(list(expected.values()), abs=1e-5)


def test_it_finds_what_flashlight_finds() -> None:
    units, rng = Characters(), np.random.default_rng(2)
    for text in an4_texts("train")[:12]:
        log_probs = posteriors(units.encode(text), 29, rng)
        own, other = beam_search(log_probs, beam=16)[0], n_best(log_probs, 1)[0]
        assert own.ids == other.ids
        assert own.frames == other.frames
        assert other.score - 0.5 < own.score <= other.score + 1e-6  # the beam loses a little of the paths


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 260), max_size=8), seed=st.integers(0, 5))
def test_any_split_equals_the_whole(cuts: list[int], seed: int) -> None:
    log_probs = noisy(230, 5, np.random.default_rng(seed))
    whole, parts = PrefixSearch(5, beam=6), PrefixSearch(5, beam=6)
    whole.accept(log_probs)
    for part in split(log_probs, cuts):
        parts.accept(part)
    assert parts.frames == 230
    for one, other in zip(whole.candidates(), parts.candidates(), strict=True):
        assert one.hypothesis.ids == other.hypothesis.ids
        assert one.hypothesis.frames == other.hypothesis.frames
        assert one.hypothesis.score == pytest.approx(other.hypothesis.score)


def nodes(search: PrefixSearch) -> int:
    found, waiting = 0, [search._root]
    while waiting:
        node = waiting.pop()
        found += 1
        waiting += [child for child in node.children.values() if child is not None]
    return found


def links(search: PrefixSearch) -> int:
    seen = set()
    for node in search._beam:
        link = node.emitted
        while link:
            seen.add(id(link))
            link = link[2]
    return len(seen)


def test_memory_does_not_grow_with_the_audio() -> None:
    rng = np.random.default_rng(3)
    search = PrefixSearch(5, beam=8, unsettled=40)
    sizes = []
    for _ in range(12):
        search.accept(noisy(250, 5, rng, scale=4.0))
        sizes.append((nodes(search), links(search)))
    found = search.candidates()[0].hypothesis
    assert len(found.ids) > 1000
    assert len(found.ids) == len(found.frames) == len(found.probabilities)
    assert np.all(np.diff(found.frames) > 0)
    assert max(size for size, _ in sizes) < 800
    assert max(size for _, size in sizes) < 800


def test_settling_changes_nothing_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    log_probs = noisy(300, 5, np.random.default_rng(4), scale=3.0)
    often = beam_search(log_probs)
    monkeypatch.setattr("apps.speech.decode.beam.SETTLE_EVERY", 10**9)
    assert beam_search(log_probs) == often


def test_prefixes_that_never_agree_are_dropped_in_the_end() -> None:
    log_probs = np.log(np.full((600, 3), 1e-9, np.float32))
    log_probs[:, 2] = 0.0
    log_probs[1::2, :] = np.log([0.999, 1e-9, 1e-3]).astype(np.float32)
    log_probs[0] = np.log([0.5, 0.5, 1e-9])  # a doubt at the start that nothing later resolves
    search = PrefixSearch(3, beam=8, unsettled=20)
    search.accept(log_probs)
    deepest = max(node.depth for node in search._beam)
    assert deepest - search._root.depth <= 20 + 50
    assert search.candidates()[0].hypothesis.ids[1:10] == (0,) * 9


def test_a_posterior_of_zero_is_no_end() -> None:
    log_probs = np.full((4, 3), -np.inf, np.float32)
    log_probs[[0, 1, 2, 3], [0, 0, 2, 0]] = 0.0
    found = beam_search(log_probs)[0]
    assert found.ids == (0, 0)
    assert found.frames == (0, 3)


def test_no_frames_are_nothing_said() -> None:
    found = beam_search(np.zeros((0, 4), np.float32))
    assert [(one.ids, one.score) for one in found] == [((), 0.0)]


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="beam: got 0"):
        PrefixSearch(4, beam=0)
    with pytest.raises(ValueError, match="floor"):
        PrefixSearch(4, floor=1.0)
    with pytest.raises(ValueError, match=r"wanted \[T, 4\]"):
        PrefixSearch(4).accept(np.zeros((1, 3), np.float32))
