"""What is popular among users of a kind: what a recommender has to say to somebody it knows nothing else about."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from safetensors.numpy import save_file

from apps.recsys.data.dataset import Dataset
from apps.recsys.data.features import Feature, fit_features
from apps.recsys.data.histories import Histories

# a feature with more values than this (a city, a postcode) has segments too small to say anything
_MAX_VALUES = 64
# and so has a value that fewer users have
_MIN_USERS = 5
# a feature most of whose values are that rare (a postcode) says little of anybody
_COVERED = 0.8
_LENGTH = 500


def write_segments(folder: Path, dataset: Dataset, histories: Histories) -> list[list[str]]:
    """Write ``segments.safetensors`` and return (feature, value) of its rows; nothing without user features.

    items int32 [rows, 500] (fewer if there are fewer items) and shares float32: the most popular items among the
    users of each value, and the share of these users' interactions that each has. Numbers (an age) are no
    segments, nor are features that say something of few users.
    """
    if dataset.user_features is None:
        return []
    everyone = np.ones(dataset.n_users, bool)
    names, items, shares = [], [], []
    user = histories.users()
    for feature in fit_features(dataset.user_features, everyone, min_count=_MIN_USERS):
        if feature.bounds is not None or len(feature.tokens) > _MAX_VALUES or all(map(str.isdecimal, feature.tokens)):
            continue
        values = _values(feature, dataset.user_features[feature.name])
        if np.any([members for _, members in values], axis=0).mean() < _COVERED:
            continue
        for value, members in values:
            counts = np.bincount(histories.items[members[user]], minlength=dataset.n_items)
            best = np.argsort(-counts, kind="stable")[:_LENGTH]
            names.append([feature.name, value])
            items.append(best.astype(np.int32))
            shares.append((counts[best] / max(counts.sum(), 1)).astype(np.float32))
    if names:
        save_file({"items": np.stack(items), "shares": np.stack(shares)}, folder / "segments.safetensors")
    return names


def _values(feature: Feature, column: pa.ChunkedArray) -> list[tuple[str, np.ndarray]]:
    """Return every value of a feature and which users have it, bool [n_users]."""
    bags = feature.encode(column)
    row = np.repeat(np.arange(len(bags)), np.diff(bags.indptr))
    values = []
    for index, token in enumerate(feature.tokens, start=1):
        members = np.zeros(len(bags), bool)
        members[row[bags.values == index]] = True
        values.append((token, members))
    return values
