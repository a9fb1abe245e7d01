"""What is put on disk comes back as it was, and leaves no file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.speech.spool import Spool


@given(frames=st.lists(st.integers(0, 30), max_size=8), seed=st.integers(0, 9))
def test_arrays_come_back_in_order_whatever_the_order_they_came_in(
    frames: list[int], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, generator = tmp_path_factory.mktemp("spool"), np.random.default_rng(seed)
    given_ = [generator.normal(size=(count, 5)).astype(np.float32) for count in frames]
    spool = Spool(folder, len(given_))
    for row in generator.permutation(len(given_)):
        spool.put(int(row), given_[row])
    found = spool.arrays()
    del spool
    assert len(found) == len(given_) and list(folder.iterdir()) == []
    for one, other in zip(found, given_, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 2)
    spool.put(1, np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match="row 0: nothing was put there"):
        spool.arrays()


def test_columns_of_another_array_are_kept_as_they_look(tmp_path: Path) -> None:
    spool, wide = Spool(tmp_path, 1), np.arange(12, dtype=np.float64).reshape(3, 4)
    spool.put(0, wide[:, ::2])
    np.testing.assert_array_equal(spool.arrays()[0], wide[:, ::2])
