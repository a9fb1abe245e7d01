"""Features on disk: whole or not there, and what they hold."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from apps.speech.data.store import FeatureStore, build_store, open_store
from apps.speech.features import fbank


def audio(count: int = 3) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.normal(0, 0.1, 1600 * (row + 1)).astype(np.float32) for row in range(count)]


def test_holds_the_features_of_every_utterance(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    store = build_store(tmp_path / "store", "key", audio(), 3, lambda done, total: seen.append((done, total)))
    assert len(store) == 3 and store.lengths.tolist() == [10, 20, 30] and seen == [(1, 3), (2, 3), (3, 3)]
    for row, samples in enumerate(audio()):
        np.testing.assert_array_equal(store[row], fbank(samples))
    everything = np.concatenate([fbank(samples) for samples in audio()])
    mean, deviation = store.statistics()
    np.testing.assert_allclose(mean, everything.mean(0), rtol=1e-5)
    np.testing.assert_allclose(deviation, everything.std(0), rtol=1e-4)
    np.testing.assert_allclose(store.statistics(2)[0], everything[:30].mean(0), rtol=1e-5)


def test_what_is_there_is_not_computed_again_but_for_another_key(tmp_path: Path) -> None:
    build_store(tmp_path / "store", "key", audio(), 3)
    assert len(build_store(tmp_path / "store", "key", iter(()), 3)) == 3
    assert len(build_store(tmp_path / "store", "other", audio(2), 2)) == 2
    assert open_store(tmp_path / "store", "key") is None


def test_a_kill_leaves_nothing_that_reads_as_whole(tmp_path: Path) -> None:
    def killed() -> Iterator[np.ndarray]:
        yield audio()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_store(tmp_path / "store", "key", killed(), 3)
    assert open_store(tmp_path / "store", "key") is None
    assert len(build_store(tmp_path / "store", "key", audio(), 3)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [".store.lock", "store"]


def test_two_commands_compute_a_store_once(tmp_path: Path) -> None:
    seen = list[str]()

    def heard(name: str) -> Iterator[np.ndarray]:
        for samples in audio():
            seen.append(name)
            yield samples

    with ThreadPoolExecutor(1) as other:

        def first() -> Iterator[np.ndarray]:
            second = other.submit(build_store, tmp_path / "store", "key", heard("second"), 3)
            yield from heard("first")
            # it found nothing when it came, and waits
            assert not second.done()
            waiting.append(second)

        waiting = list[Future[FeatureStore]]()
        one = build_store(tmp_path / "store", "key", first(), 3)
        np.testing.assert_array_equal(one.frames, waiting[0].result(timeout=60).frames)
    assert seen == ["first"] * 3


@pytest.mark.parametrize("file", ["frames.f32", "offsets.npy", "store.json"])
def test_a_damaged_store_is_made_again(tmp_path: Path, file: str) -> None:
    build_store(tmp_path / "store", "key", audio(), 3)
    path = tmp_path / "store" / file
    path.write_bytes(path.read_bytes()[:-9])
    assert open_store(tmp_path / "store", "key") is None
    np.testing.assert_array_equal(build_store(tmp_path / "store", "key", audio(), 3)[2], fbank(audio()[2]))


def test_another_number_of_utterances_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wanted 4 utterances, got 3"):
        build_store(tmp_path / "store", "key", audio(), 4)


def test_no_frames_at_all(tmp_path: Path) -> None:
    store = build_store(tmp_path / "store", "key", [np.zeros(10, np.float32)], 1)
    assert store[0].shape == (0, 80)
