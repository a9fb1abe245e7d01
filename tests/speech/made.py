"""A made-up language of tones: every symbol is a bin that sounds for some frames, so that tiny models learn it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from apps.speech.data.store import FeatureStore
from apps.speech.distill import Utterances
from apps.speech.features import FEATURES, SILENCE

SYMBOLS = 4
BLANK = SYMBOLS


def store(count: int, seed: int = 0, symbols: int = SYMBOLS) -> tuple[FeatureStore, list[list[int]]]:
    """Return features of ``count`` utterances of 2 to 4 symbols, 16 frames each and silence between, and the labels."""
    random = np.random.default_rng(seed)
    frames, offsets, labels = [], [0], []
    for _ in range(count):
        row = random.integers(0, symbols, random.integers(2, 5)).tolist()
        parts = []
        for symbol in row:
            sound = np.full((16, FEATURES), -8.0) + random.normal(0, 0.5, (16, FEATURES))
            sound[:, 10 + 15 * symbol : 20 + 15 * symbol] += 6
            parts += [np.full((random.integers(4, 9), FEATURES), SILENCE), sound]
        whole = np.concatenate([*parts, np.full((8, FEATURES), SILENCE)]).astype(np.float32)
        frames.append(whole)
        offsets.append(offsets[-1] + len(whole))
        labels.append(row)
    return FeatureStore(Path("."), np.concatenate(frames), np.array(offsets)), labels


def utterances(count: int, seed: int = 0) -> Utterances:
    """Return them as training rows in one view."""
    found, labels = store(count, seed)
    return Utterances([found], labels, np.arange(count))
