"""A model that answers: requests become queries, queries become items, items become JSON.

Nothing here knows of HTTP. A request is planned (who is it, what may be recommended), the index is asked, alone or for
many plans at once, and the result is encoded from parts that were encoded when the model was prepared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from apps.recsys.fold_in import fold_in
from apps.recsys.index import Filter, Index, fetch_size, first_filtered, open_index, search_filtered
from apps.recsys.runtime import pad_histories
from apps.recsys.serve.prepared import Prepared, open_prepared
from apps.recsys.serve.schema import RecommendRequest, ServiceError, invalid
from kdcore.config import UserError

_EMPTY = np.empty(0, np.int32)
# what is said to be near a recommended item, and how much of a history is looked at for it
_NEAREST, _LOOKED_AT = 3, 200
_SAMPLE_USERS = 300
Announce = Callable[[str], None]
Source = Literal["user", "history", "popular"]


@dataclass(slots=True)
class Plan:
    """One request as the model understands it.

    ``query`` float32 [d] asks the index; it is None as long as ``history`` (item indices, oldest first) has to be
    encoded, and for what is ``popular``, where ``order`` has all items, best first, and their scores.
    """

    k: int
    filter: Filter | None
    source: Source
    history: np.ndarray
    query: np.ndarray | None = None
    order: tuple[np.ndarray, np.ndarray] | None = None
    why: bool = False

    @property
    def to_encode(self) -> bool:
        """Whether the history must become a query first, which takes a model some time."""
        return self.query is None and self.order is None


class ServedModel:
    """An export, its index, and what turns a history into a query; may be asked from several threads."""

    def __init__(
        self,
        folder: Path,
        *,
        index: str = "auto",
        cache: Path | None = None,
        recall: float = 0.97,
        announce: Announce = lambda text: None,
    ) -> None:
        """Load an export, preparing and indexing it where that was not done before.

        Raises:
            UserError: no export, a missing, truncated or foreign file (by name), or a model that cannot answer.
        """
        self.prepared: Prepared = open_prepared(folder, cache, announce)
        about = self.prepared.about
        self.version, self.about = self.prepared.version, about
        self.n_items = len(self.prepared.items)
        self.reads_history = about["input"] == "history"
        self.index = self._open_index(index, recall, announce)
        self._session = self._open_session()
        self._try()

    @property
    def index_kind(self) -> str:
        """What finds the items: a kind of index, or ``scores`` for a model that has to score them all."""
        return self.index.kind if self.index is not None else "scores"

    def _open_index(self, kind: str, recall: float, announce: Announce) -> Index | None:
        vectors, users = self.prepared.vectors, self.prepared.user_vectors
        if vectors is None or users is None:
            if kind not in ("auto", "exact"):
                raise UserError(f"--index: {self.about['label']} has no vectors to index; wanted auto or exact")
            return None
        rows = np.random.default_rng(0).permutation(len(users))[:_SAMPLE_USERS]
        sample = np.stack([self._query(users[row]) for row in np.sort(rows)])
        sample = sample[np.any(sample[:, : users.shape[1]] != 0, axis=1)]  # a user without a history is a zero
        folder = self.prepared.cache / "index"
        return open_index(kind, vectors, folder, sample, fingerprint=self.version, recall=recall, announce=announce)

    def _open_session(self) -> Any:
        if not self.reads_history:
            return None
        import onnxruntime  # a model that needs no encoder does not pay for it

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        name = "encoder.onnx" if self.index is not None else "scorer.onnx"
        path = self.prepared.folder / name
        if name not in self.about["files"]:
            raise UserError(f"{path}: is missing; export the model again")
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def _try(self) -> None:
        """Answer once, so that a model that cannot is refused when it is loaded."""
        try:
            user = int(np.argmax(np.diff(self.prepared.seen_indptr)))
            history = np.asarray(self.prepared.seen(user)[-8:])
            if len(history):
                plan = Plan(min(10, self.n_items), None, "history", history)
                self.encode(plan, *self.answer(plan))
        except (ValueError, IndexError, TypeError, RuntimeError) as error:
            raise UserError(f"{self.prepared.folder}: the model does not answer: {error}") from None

    # -- plan --------------------------------------------------------------------------------------------------------

    def plan(self, request: RecommendRequest, stored: Sequence[str] = ()) -> Plan:
        """Return what a request asks for; ``stored`` are the items of events that came after the export.

        Raises ServiceError for an unknown user, item, category or segment, and for contradictions.
        """
        if request.user_id is not None and request.history is not None:
            raise invalid("wanted either user_id or history", "history")
        query, order, source = None, None, "history"
        if request.user_id is not None:
            history, query, source = self._known(request, stored)
        elif request.history is not None:
            history = self._items(request.history, "history", request.skip_unknown)
        else:
            history = _EMPTY
        if query is None and (len(history) == 0 or source == "popular"):
            order, source = self._popular(request.segment or {}), "popular"
        exclude = history if request.exclude_seen else _EMPTY
        if request.exclude:
            exclude = np.concatenate([exclude, self._items(request.exclude, "exclude", True)])
        allowed = self._allowed(request)
        filter = Filter(exclude, allowed) if len(exclude) or allowed is not None else None
        return Plan(request.k, filter, source, history, query, order, request.why)  # type: ignore[arg-type]

    def _known(self, request: RecommendRequest, stored: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None, str]:
        """Return history, query and source of a user id; the history of one that only events know is theirs."""
        later = [index for index in map(self.prepared.items.get, stored) if index is not None] if stored else []
        user = self.prepared.users.get(request.user_id)  # type: ignore[arg-type]
        if user is None:
            if later:
                return np.array(later, np.int32), None, "history"
            if request.unknown_user == "popular":
                return _EMPTY, None, "popular"
            raise ServiceError(404, "unknown_user", f"unknown user {str(request.user_id)[:80]!r}", "user_id")
        history = self.prepared.seen(user)
        if later:
            history = np.concatenate([history, np.array(later, np.int32)])
        vectors = self.prepared.user_vectors
        if vectors is None or (later and self.reads_history):
            return history, None, "user"
        return history, self._query(vectors[user]) if len(history) else None, "user"

    def _query(self, vector: np.ndarray) -> np.ndarray:
        """Return a user's vector as the index is asked: with a 1 against the item bias, if there is one."""
        if not self.prepared.has_bias:
            return np.asarray(vector, np.float32)
        query = np.empty(len(vector) + 1, np.float32)
        query[:-1], query[-1] = vector, 1.0
        return query

    def _items(self, identifiers: Sequence[str | int], field: str, skip_unknown: bool) -> np.ndarray:
        get, found = self.prepared.items.get, []
        for place, identifier in enumerate(identifiers):
            index = get(identifier)
            if index is not None:
                found.append(index)
            elif not skip_unknown:
                raise ServiceError(404, "unknown_item", f"unknown item {str(identifier)[:80]!r}", f"{field}[{place}]")
        return np.array(found, np.int32)

    def _popular(self, segment: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
        table = self.prepared.segments.table
        for feature, value in segment.items():
            if feature not in table:
                raise invalid(f"unknown feature {feature[:80]!r}; this model has {_listed(table)}", "segment")
            if value not in table[feature]:
                raise invalid(f"unknown {feature} {value[:80]!r}; wanted {_listed(table[feature])}", "segment")
        return self.prepared.segments.rank(segment, self.prepared.popularity, self.prepared.counts)

    def _allowed(self, request: RecommendRequest) -> np.ndarray | None:
        allowed = None
        if request.candidates is not None:
            allowed = np.unique(self._items(request.candidates, "candidates", request.skip_unknown))
        if request.categories is not None:
            categories = self.prepared.categories
            unknown = next((name for name in request.categories if name not in categories), None)
            if unknown is not None:
                raise invalid(f"unknown category {unknown[:80]!r}; see GET /v1/model", "categories")
            inside = categories.any_of(tuple(request.categories))
            allowed = inside if allowed is None else np.intersect1d(allowed, inside, assume_unique=True)
        return allowed

    # -- answer ------------------------------------------------------------------------------------------------------

    def answer(self, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and items of one plan, best first: k of them, or all that the filter leaves."""
        if plan.order is not None:
            return _most_popular(plan, *plan.order)
        if self.index is None:
            return self._score_all(plan)
        return search_filtered(self.index, self.query_of(plan), plan.k, plan.filter)

    def answer_many(self, plans: Sequence[Plan]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the answers of several plans; the index is asked for all of them at once."""
        asked = [plan for plan in plans if plan.order is None] if self.index is not None else []
        results: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        if len(asked) > 1 and self.index is not None:
            queries = np.stack([self.query_of(plan) for plan in asked])
            fetch = max(fetch_size(plan.k, plan.filter, self.n_items) for plan in asked)
            scores, items = self.index.search(queries, fetch)
            for plan, row, found in zip(asked, scores, items, strict=True):
                best = first_filtered(row, found, plan.k, plan.filter)
                if len(best[1]) == plan.k:
                    results[id(plan)] = best
        return [results.get(id(plan)) or self.answer(plan) for plan in plans]

    def query_of(self, plan: Plan) -> np.ndarray:
        """Return the query of a plan, encoding its history if need be."""
        if plan.query is not None:
            return plan.query
        if self.reads_history:
            vector = self._run(plan.history, "user_vector")
        else:
            vectors, bias = self.prepared.vectors, None
            if self.prepared.fold_in is None or vectors is None:
                raise ValueError("no fold_in: export the model again")
            if self.prepared.has_bias:
                vectors, bias = vectors[:, :-1], vectors[:, -1]
            vector = fold_in(self.prepared.fold_in, vectors, bias, plan.history)
        plan.query = self._query(vector)
        return plan.query

    def _run(self, history: np.ndarray, output: str) -> np.ndarray:
        padded, lengths = pad_histories([history], self.n_items, self.about["history_length"])
        fed = {"history": padded, "lengths": lengths, "k": np.ones(1, np.int64)}
        wanted = {each.name for each in self._session.get_inputs()}
        return np.asarray(self._session.run([output], {name: fed[name] for name in wanted})[0][0])

    def _score_all(self, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        scores = self._run(plan.history, "scores")
        items = np.arange(self.n_items)
        if plan.filter is not None and plan.filter.allowed is not None:
            items = np.asarray(plan.filter.allowed)
        keep = np.ones(self.n_items, bool)
        if plan.filter is not None:
            keep[plan.filter.exclude] = False
        items = items[keep[items]]
        order = np.argsort(-scores[items], kind="stable")[: plan.k]
        return scores[items[order]], items[order]

    # -- encode ------------------------------------------------------------------------------------------------------

    def encode(self, plan: Plan, scores: np.ndarray, items: np.ndarray) -> bytes:
        """Return the JSON list of some items with their scores."""
        rows = items.tolist()
        if not rows:
            return b"[]"
        values = msgspec.json.encode(scores.tolist())[1:-1].split(b",")
        if plan.why:
            reasons = self._reasons(rows, plan.history)
            values = [value + b',"why":' + reason for value, reason in zip(values, reasons, strict=True)]
        return b"[" + self.prepared.heads.interleaved(rows, values, b"},")[:-1] + b"]"

    def _reasons(self, items: list[int], history: np.ndarray) -> list[bytes]:
        """Return for each item the JSON of the nearest items of a history, by cosine."""
        vectors = self.prepared.vectors
        if vectors is None or len(history) == 0 or not items:
            return [b"[]"] * len(items)
        distinct = np.unique(history[::-1][:_LOOKED_AT])
        near = _unit(self._plain(distinct)) @ _unit(self._plain(np.array(items))).T
        reasons = []
        for item, column in zip(items, near.T, strict=True):
            order = [place for place in np.argsort(-column, kind="stable")[: _NEAREST + 1] if distinct[place] != item]
            said = [self._named(int(distinct[place]), float(column[place])) for place in order[:_NEAREST]]
            reasons.append(json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode())
        return reasons

    def _plain(self, items: np.ndarray) -> np.ndarray:
        """Return item vectors without the coordinate of the bias."""
        rows = self.prepared.vectors[items]  # type: ignore[index]
        return rows[:, :-1] if self.prepared.has_bias else rows

    def _named(self, item: int, similarity: float) -> dict[str, Any]:
        about = json.loads(self.prepared.heads[item].removesuffix(b',"score":') + b"}")
        return {**about, "similarity": round(similarity, 4)}


def _most_popular(plan: Plan, items: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first k of an order that pass the filter: k that are not excluded are among k + |exclude|."""
    everything = plan.filter is not None and plan.filter.allowed is not None
    excluded = len(plan.filter.exclude) if plan.filter is not None else 0
    enough = len(items) if everything else plan.k + excluded
    return first_filtered(scores[:enough], items[:enough], plan.k, plan.filter)


def _unit(rows: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(length > 0, length, 1.0))


def _listed(names: Any, most: int = 8) -> str:
    shown = [repr(name) for name in list(names)[:most]]
    return (", ".join(shown) + (", ..." if len(names) > most else "")) or "none"
