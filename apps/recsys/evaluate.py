"""Full-ranking evaluation: every item is a candidate except those the user has seen already."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from apps.recsys.data.histories import Histories
from apps.recsys.data.splits import Split
from apps.recsys.metrics import (
    USER_METRICS,
    Metric,
    count_relevant,
    coverage,
    distinct,
    find_hits,
    gini,
    novelty,
    parse_metric,
    self_information,
)
from apps.recsys.models.base import Recommender
from apps.recsys.topk import BLOCK_BYTES, Search, inference
from kdcore.config import UserError
from kdcore.run import atomic_path

DEFAULT_METRICS = (
    *("ndcg@10", "recall@10", "hr@10", "mrr@10", "map@10", "precision@10"),
    *("coverage@10", "novelty@10", "gini@10"),
)
_TABLE_CELLS = 1 << 24  # users x items up to which relevance is kept as a table: a look-up instead of a search


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation, user by user.

    ``users`` int32 [n] have at least one relevant item; ``n_relevant`` int64 [n] counts the distinct ones.
    ``per_user[name]`` is float64 [n]; ``means[name]`` its mean; ``lists[name]`` the values over all lists.
    The hits are kept as triples: row in ``users``, position in the list from 0, item (int32 [m] each), as far as
    the longest cutoff reaches, so that other views (:func:`slices`) need no second ranking.
    """

    part: str
    users: np.ndarray
    n_relevant: np.ndarray
    per_user: Mapping[str, np.ndarray]
    means: Mapping[str, float]
    lists: Mapping[str, float]
    hit_row: np.ndarray = field(repr=False)
    hit_position: np.ndarray = field(repr=False)
    hit_item: np.ndarray = field(repr=False)

    @property
    def values(self) -> dict[str, float]:
        """Return means and list-level values in one mapping, for metrics.json."""
        return {**self.means, **self.lists}

    def interval(self, name: str, *, level: float = 0.95, samples: int = 1000, seed: int = 0) -> tuple[float, float]:
        """Return the percentile bootstrap interval of a mean, resampling users."""
        values = self.per_user[name]
        generator = np.random.default_rng(seed)
        means = np.array([values[generator.integers(len(values), size=len(values))].mean() for _ in range(samples)])
        low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def save(self, path: str | Path) -> None:
        """Write everything to one .npz file, atomically and without pickle."""
        header = {"part": self.part, "means": dict(self.means), "lists": dict(self.lists)}
        arrays: dict[str, Any] = {f"per_user/{name}": values for name, values in self.per_user.items()}
        for name in ("users", "n_relevant", "hit_row", "hit_position", "hit_item"):
            arrays[name] = getattr(self, name)
        with atomic_path(path) as temporary, open(temporary, "wb") as handle:
            np.savez_compressed(handle, header=np.array(json.dumps(header)), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read what :meth:`save` wrote; raises UserError if the file is not of that kind."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            header = json.loads(str(arrays.pop("header")))
            per_user = {name.removeprefix("per_user/"): arrays.pop(name) for name in list(arrays) if "/" in name}
            return cls(header["part"], per_user=per_user, means=header["means"], lists=header["lists"], **arrays)
        except FileNotFoundError:
            raise UserError(f"{path}: there is no such file") from None
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: not a saved evaluation ({error})") from error


class Evaluator:
    """An evaluation prepared for repeated use, for example after every epoch: only the model changes.

    ``metrics`` are names like ``ndcg@10``; ``users`` restricts the users (those without a relevant item in ``part``
    are left out in any case). Items the user has before ``part`` (``split.history(part)``) are never recommended;
    a sequential model reads the same history, the others what they were fitted on (``split.train``).

    Raises UserError for unknown metrics, an unknown part, or if no user has a relevant item.
    """

    def __init__(
        self,
        split: Split,
        part: str = "test",
        metrics: Sequence[str] = DEFAULT_METRICS,
        *,
        users: np.ndarray | None = None,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        if part not in ("valid", "test"):
            raise UserError(f"part: got {part!r}, wanted 'valid' or 'test'")
        self.split, self.part, self.block_bytes = split, part, block_bytes
        self.metrics = tuple(dict.fromkeys(parse_metric(text) for text in metrics))
        if not self.metrics:
            raise UserError("metrics: got none, wanted at least one, for example ndcg@10")
        self.k = max(metric.k for metric in self.metrics)
        self.relevant: Histories = split.test if part == "test" else split.valid
        self.seen: Histories = split.history(part)
        chosen = np.arange(split.n_users) if users is None else np.unique(np.asarray(users))
        self.users = chosen[self.relevant.counts()[chosen] > 0].astype(np.int64)
        if len(self.users) == 0:
            raise UserError(f"{part}: no user has an item to find in this part of the split")
        self.n_relevant = count_relevant(self.relevant, self.users)
        if any(metric.kind == "novelty" for metric in self.metrics):
            self.information = self_information(split.train)
        self.table: np.ndarray | None = None
        if len(self.users) * split.n_items <= _TABLE_CELLS:
            self.table = np.zeros((len(self.users), split.n_items), dtype=bool)
            self.table[self.relevant.rows(self.users)] = True

    def __call__(self, model: Recommender, *, progress: Callable[[int, int], None] | None = None) -> Evaluation:
        """Rank all items for every user and measure; ``progress`` hears (users done, users in all)."""
        self._check(model)
        n = len(self.users)
        per_user = {metric.name: np.empty(n) for metric in self.metrics if metric.per_user}
        exposure = {m.k: np.zeros(self.split.n_items, dtype=np.int64) for m in self.metrics if not m.per_user}
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        histories = self.seen if model.sequential else self.split.train
        with inference(model):
            search = Search(model, self.k, histories, self.seen, block_bytes=self.block_bytes)
            for start, stop in search.blocks(n):
                ranked = search(self.users[start:stop])[1].cpu().numpy()
                hits = self._hits(ranked, start, stop)
                for metric in self.metrics:
                    if metric.per_user:
                        compute = USER_METRICS[metric.kind]
                        per_user[metric.name][start:stop] = compute(hits, self.n_relevant[start:stop], metric.k)
                for k, counts in exposure.items():
                    head = ranked[:, :k]
                    counts += np.bincount(head[head >= 0], minlength=len(counts))
                row, position = hits.nonzero()
                found.append((row + start, position, ranked[row, position]))
                if progress is not None:
                    progress(stop, n)
        return Evaluation(
            part=self.part,
            users=self.users.astype(np.int32),
            n_relevant=self.n_relevant,
            per_user=per_user,
            means={name: float(values.mean()) for name, values in per_user.items()},
            lists={m.name: self._over_lists(m, exposure[m.k]) for m in self.metrics if not m.per_user},
            hit_row=np.concatenate([row for row, _, _ in found]).astype(np.int32),
            hit_position=np.concatenate([position for _, position, _ in found]).astype(np.int32),
            hit_item=np.concatenate([item for _, _, item in found]).astype(np.int32),
        )

    def _check(self, model: Recommender) -> None:
        if (model.n_users, model.n_items) != (self.split.n_users, self.split.n_items):
            raise UserError(
                f"the model knows {model.n_users} users and {model.n_items} items, "
                f"the data has {self.split.n_users} and {self.split.n_items}"
            )

    def _hits(self, ranked: np.ndarray, start: int, stop: int) -> np.ndarray:
        if self.table is None:
            return find_hits(ranked, self.relevant, self.users[start:stop])
        # id -1 reads the last column, so it is taken out afterwards
        return self.table[np.arange(start, stop)[:, None], ranked] & (ranked >= 0)

    def _over_lists(self, metric: Metric, exposure: np.ndarray) -> float:
        if metric.kind == "coverage":
            return coverage(exposure)
        if metric.kind == "gini":
            return gini(exposure)
        return novelty(exposure, self.information)


def evaluate(
    model: Recommender,
    split: Split,
    part: str = "test",
    metrics: Sequence[str] = DEFAULT_METRICS,
    *,
    users: np.ndarray | None = None,
    progress: Callable[[int, int], None] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Evaluation:
    """Evaluate once; :class:`Evaluator` has the details and is the cheaper choice for many calls."""
    return Evaluator(split, part, metrics, users=users, block_bytes=block_bytes)(model, progress=progress)


def slices(
    evaluation: Evaluation, split: Split, metric: str = "ndcg@10", *, n_slices: int = 4
) -> list[dict[str, str | int | float]]:
    """Return a per-user metric for slices of the users and of the items: {axis, position, slice, n, value}.

    Axis ``activity`` cuts the evaluated users by the length of their training history, axis ``popularity`` the
    relevant items by their number of training interactions; cuts are at quantiles, equal numbers stay together, so
    there may be fewer slices than ``n_slices``. In a popularity slice only the items inside it count as relevant
    and ``n`` is the number of users who have one. Positions are those in the full list.

    Raises UserError if ``metric`` has no value per user or reaches deeper than the evaluation did.
    """
    parsed = parse_metric(metric)
    depth = max(parse_metric(name).k for name in (*evaluation.per_user, *evaluation.lists))
    if not parsed.per_user or parsed.k > depth:
        raise UserError(f"slices: got metric {metric!r}, wanted one with a value per user and a cutoff up to {depth}")
    rows = []
    activity = split.train.counts()[evaluation.users]
    for position, (label, inside) in enumerate(_quantile_slices(activity, n_slices)):
        hit = inside[evaluation.hit_row]
        values = _from_hits(evaluation, parsed, hit, evaluation.n_relevant)[inside]
        rows.append(_slice_row("activity", position, label, values))
    relevant = split.test if evaluation.part == "test" else split.valid
    row, item = relevant.rows(evaluation.users.astype(np.int64))
    row, item = np.divmod(distinct(row * split.n_items + item), split.n_items)
    popularity = split.train.item_counts()
    for position, (label, inside) in enumerate(_quantile_slices(popularity[item], n_slices)):
        low, high = popularity[item[inside]].min(), popularity[item[inside]].max()
        of_hit = popularity[evaluation.hit_item]
        n_relevant = np.bincount(row[inside], minlength=len(evaluation.users))
        values = _from_hits(evaluation, parsed, (of_hit >= low) & (of_hit <= high), n_relevant)
        rows.append(_slice_row("popularity", position, label, values[n_relevant > 0]))
    return rows


def _from_hits(evaluation: Evaluation, metric: Metric, keep: np.ndarray, n_relevant: np.ndarray) -> np.ndarray:
    """Return the metric of every user with only the hits in the mask ``keep``, float64 [n]."""
    hits = np.zeros((len(evaluation.users), metric.k), dtype=bool)
    keep = keep & (evaluation.hit_position < metric.k)
    hits[evaluation.hit_row[keep], evaluation.hit_position[keep]] = True
    return USER_METRICS[metric.kind](hits, n_relevant, metric.k)


def _quantile_slices(values: np.ndarray, n_slices: int) -> list[tuple[str, np.ndarray]]:
    """Cut integer ``values`` at their quantiles; return the label ``low-high`` and the mask of each slice."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, n_slices + 1)[1:-1], method="lower"))
    slot = np.searchsorted(edges, values, side="left")
    masks = [slot == index for index in np.unique(slot)]
    return [(f"{values[mask].min()}-{values[mask].max()}", mask) for mask in masks]


def _slice_row(axis: str, position: int, label: str, values: np.ndarray) -> dict[str, str | int | float]:
    return {"axis": axis, "position": position, "slice": label, "n": len(values), "value": float(values.mean())}
