"""Train, validation and test: leave-last-out, per-user ratio, global time, or the user's own files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from apps.recsys.data.dataset import Dataset, dataset_of
from apps.recsys.data.filters import renumber
from apps.recsys.data.formats import RawLog, find_log, read_log
from apps.recsys.data.histories import Histories
from kdcore.config import UserError
from kdcore.run import fingerprint

PARTS = ("train", "valid", "test")


@dataclass(frozen=True, eq=False)
class Split:
    """Three parts of one log over the same users and items.

    ``dropped`` counts what a protocol leaves out or cannot use: ``short_users`` have all their rows in train,
    ``cold`` rows of valid and test have a user or item that train lacks.
    """

    train: Histories
    valid: Histories
    test: Histories
    kind: str
    fingerprint: str
    n_users: int
    n_items: int
    dropped: Mapping[str, int] = field(default_factory=dict)

    def history(self, part: str) -> Histories:
        """Return what is known of each user when ``part`` is scored: train for valid, train + valid for test."""
        if part == "valid":
            return self.train
        if part == "test":
            known = self.__dict__.get("_known")
            if known is None:
                known = self.train.merge(self.valid)
                object.__setattr__(self, "_known", known)
            return known
        raise UserError(f"part: got {part!r}, wanted valid or test")


def make_split(
    kind: str, train: Histories, valid: Histories, test: Histories, dropped: Mapping[str, int] | None = None
) -> Split:
    """Return a split with the fingerprint of its arrays."""
    arrays = [array for part in (train, valid, test) for array in (part.indptr, part.items)]
    return Split(train, valid, test, kind, fingerprint(*arrays), train.n_users, train.n_items, dict(dropped or {}))


def _by_label(
    dataset: Dataset, label: np.ndarray, kind: str, dropped: Mapping[str, int], optional: tuple[str, ...] = ()
) -> Split:
    """Return the split of rows labelled 0 train, 1 valid, 2 test, -1 left out; refuse an empty part."""
    parts = []
    for number, part in enumerate(PARTS):
        rows = np.flatnonzero(label == number)
        if not len(rows) and part not in optional:
            raise UserError(
                f"{dataset.name}: the {kind} split leaves no interactions for {part}; "
                "wanted more data, or another --split.kind, --split.test or --split.valid"
            )
        parts.append(
            Histories.from_pairs(
                dataset.user[rows], dataset.item[rows], dataset.n_users, dataset.n_items, dataset.timestamp[rows]
            )
        )
    train, valid, test = parts
    return make_split(kind, train, valid, test, dropped)


def _position(order: np.ndarray, user: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return for every row its position within its user, where ``order`` has the rows grouped by user."""
    starts = np.cumsum(counts) - counts
    position = np.empty(len(user), dtype=np.int64)
    position[order] = np.arange(len(user)) - np.repeat(starts, counts)
    return position


def leave_last_out(dataset: Dataset) -> Split:
    """Put each user's last interaction in test, the one before in valid, the rest in train.

    Last by a stable sort on (user, timestamp, row): equal times are told apart by their row in the file. A user
    with fewer than 3 interactions stays in train and is counted as ``short_users``.
    Raises ``UserError`` if no user has 3.
    """
    counts = np.bincount(dataset.user, minlength=dataset.n_users)
    order = np.lexsort((dataset.timestamp, dataset.user))
    from_end = counts[dataset.user] - 1 - _position(order, dataset.user, counts)
    long = counts[dataset.user] >= 3
    label = np.where(long & (from_end == 0), 2, np.where(long & (from_end == 1), 1, 0))
    return _by_label(dataset, label, "leave_last_out", {"short_users": int((counts < 3).sum())})


def ratio(dataset: Dataset, test: float = 0.2, valid: float = 0.08, seed: int = 0) -> Split:
    """Put a random share of each user's interactions in test and in valid, the rest in train in time order.

    The whole log is shuffled as by pandas ``sample(frac=1, random_state=seed)``; of a user's n interactions the
    first round(test n) in that order are test, the next round(valid n) are valid. At least one stays in train.
    ``valid=0`` asks for no validation part. Users with no test row are counted as ``short_users``.
    """
    _check_shares(test, valid)
    counts = np.bincount(dataset.user, minlength=dataset.n_users)
    shuffled = np.random.RandomState(seed).permutation(len(dataset))
    order = shuffled[np.argsort(dataset.user[shuffled], kind="stable")]
    position = _position(order, dataset.user, counts)
    n_test = np.minimum(np.rint(test * counts), np.maximum(counts - 1, 0)).astype(np.int64)
    n_valid = np.minimum(np.rint(valid * counts), np.maximum(counts - n_test - 1, 0)).astype(np.int64)
    last_test, last_valid = n_test[dataset.user], (n_test + n_valid)[dataset.user]
    label = np.where(position < last_test, 2, np.where(position < last_valid, 1, 0))
    dropped = {"short_users": int((n_test == 0).sum())}
    return _by_label(dataset, label, "ratio", dropped, () if valid else ("valid",))


def _check_shares(test: float, valid: float) -> None:
    if not (0 < test < 1 and 0 <= valid < 1 and test + valid < 1):
        raise UserError(f"split: got test={test}, valid={valid}; wanted test > 0, valid >= 0, together below 1")


def global_time(dataset: Dataset, test: float = 0.1, valid: float = 0.1) -> Split:
    """Cut the log at two points in time: about the last ``test`` of it is test, the ``valid`` before it valid.

    Interactions at the very time of a cut all go to the later side. Rows of valid and test whose user or item does
    not occur in train are left out and counted as ``cold``.
    """
    _check_shares(test, valid)
    if not dataset.has_timestamp:
        raise UserError(f"{dataset.name}: a split by global time needs timestamps, and the data have none")
    n = len(dataset)
    ordered = np.sort(dataset.timestamp)
    test_from = ordered[min(round(n * (1 - test)), n - 1)]
    valid_from = ordered[min(round(n * (1 - test - valid)), n - 1)] if valid else test_from
    label = np.where(dataset.timestamp >= test_from, 2, np.where(dataset.timestamp >= valid_from, 1, 0))
    in_train = label == 0
    known_user = np.bincount(dataset.user[in_train], minlength=dataset.n_users) > 0
    known_item = np.bincount(dataset.item[in_train], minlength=dataset.n_items) > 0
    cold = ~in_train & ~(known_user[dataset.user] & known_item[dataset.item])
    label[cold] = -1
    return _by_label(dataset, label, "global_time", {"cold": int(cold.sum())}, () if valid else ("valid",))


def from_files(
    train: str | Path,
    valid: str | Path,
    test: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    skip_bad: bool = False,
    name: str | None = None,
) -> tuple[Dataset, Split]:
    """Return the data set of three files together and their split; any format of ``load_dataset``.

    Ids are mapped over all three, train first; features come from beside the training file. Rows of valid and
    test with a user or item unknown to train stay (the files are the protocol) and are counted as ``cold``.
    """
    paths = [Path(path) for path in (train, valid, test)]
    logs = [read_log(find_log(path), columns or {}, skip_bad) for path in paths]
    log = _joined(logs)
    dataset = dataset_of(log, name or paths[0].name.split(".")[0])
    label = np.repeat(np.arange(3), [len(each.user) for each in logs])
    in_train = label == 0
    known_user = np.bincount(dataset.user[in_train], minlength=dataset.n_users) > 0
    known_item = np.bincount(dataset.item[in_train], minlength=dataset.n_items) > 0
    cold = ~in_train & ~(known_user[dataset.user] & known_item[dataset.item])
    return dataset, _by_label(dataset, label, "from_files", {"cold": int(cold.sum())})


def _joined(logs: list[RawLog]) -> RawLog:
    """Return one log of several; a column is kept if every one has it."""
    user, user_ids = _joined_ids([(log.user, log.user_ids) for log in logs])
    item, item_ids = _joined_ids([(log.item, log.item_ids) for log in logs])
    times = [log.timestamp for log in logs if log.timestamp is not None]
    ratings = [log.rating for log in logs if log.rating is not None]
    reasons = {"bad": 0, "duplicate": 0, "rating": 0, "k_core": 0}
    for log in logs:
        reasons |= {reason: reasons.get(reason, 0) + count for reason, count in log.dropped.items()}
    return replace(
        logs[0],
        user=user,
        item=item,
        timestamp=np.concatenate(times) if len(times) == len(logs) else None,
        rating=np.concatenate(ratings) if len(ratings) == len(logs) else None,
        user_ids=user_ids,
        item_ids=item_ids,
        dropped=reasons,
    )


def _joined_ids(parts: list[tuple[np.ndarray, pa.Array]]) -> tuple[np.ndarray, pa.Array]:
    if len({ids.type for _, ids in parts}) > 1:  # one file has plain integers only, another has text
        parts = [(codes, ids.cast(pa.string())) for codes, ids in parts]
    blocks = [pa.DictionaryArray.from_arrays(pa.array(codes), ids) for codes, ids in parts]
    unified = pa.chunked_array(blocks).unify_dictionaries()
    codes = np.concatenate([chunk.indices.to_numpy(zero_copy_only=False) for chunk in unified.chunks])
    return renumber(codes, unified.chunk(0).dictionary)
