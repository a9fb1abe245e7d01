"""Recommends from an exported folder, on a machine without torch: NumPy, safetensors and onnxruntime do it all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from apps.recsys.fold_in import fold_in
from kdcore.config import UserError

# of the folder; the number changes when an old reader would misread it
FORMAT = "kdsuite-recommender/2"


@dataclass(frozen=True)
class Recommendation:
    """One recommended item, with its title if the data have titles."""

    item_id: str | int
    score: float
    title: str | None = None


class ExportedRecommender:
    """What ``kd recsys export`` wrote, ready to answer.

    ``about`` is ``model.json``; its ``model_version`` identifies weights and data.
    """

    def __init__(self, folder: str | Path, threads: int = 1) -> None:
        """Load the folder.

        Raises:
            UserError: the folder is no export, or of a format this version does not read.
        """
        self.folder = Path(folder)
        self.about = read_about(self.folder)
        self.user_ids: list[str | int] = self._json("users.json")
        self.item_ids: list[str | int] = self._json("items.json")
        self.titles: list[str | None] | None = self._json("titles.json") if self._has("titles.json") else None
        self._user_index = {str(user): index for index, user in enumerate(self.user_ids)}
        self._item_index = {str(item): index for index, item in enumerate(self.item_ids)}
        seen = load_file(self.folder / "seen.safetensors")
        self._indptr, self._items = seen["indptr"], seen["items"]
        self._by_history = self.about["input"] == "history"
        self._vectors = {} if self._by_history else load_file(self.folder / "vectors.safetensors")
        import onnxruntime  # a service reads this module and, for most models, needs no ONNX

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        path = str(self.folder / "scorer.onnx")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    @property
    def model_version(self) -> str:
        """Identifies weights and data."""
        return str(self.about["model_version"])

    def recommend(
        self,
        user_id: str | int | None = None,
        *,
        history: Sequence[str | int] | None = None,
        k: int = 10,
        exclude_seen: bool = True,
    ) -> list[Recommendation]:
        """Return the ``k`` best items of a known user, or after a history of item ids, oldest first.

        A history takes the place of what is known of the user; ``exclude_seen`` leaves out what stands in it. A model
        that has a vector per user folds it in (``apps.recsys.fold_in``). Fewer than k come where fewer are left.

        Raises:
            UserError: an unknown user or item, both or neither given, or k out of range.
        """
        if (user_id is None) == (history is None):
            raise UserError("wanted either user_id or history")
        if not 1 <= k <= len(self.item_ids):
            raise UserError(f"k: got {k}, wanted 1 to {len(self.item_ids)}, the number of items")
        seen = self._seen(user_id) if history is None else self._indices(history)
        scores = self._scores(user_id, seen)
        if exclude_seen:
            scores[seen] = -np.inf
        # stable: equal scores in index order, as everywhere
        best = np.argsort(-scores, kind="stable")[:k]
        best = best[scores[best] > -np.inf]
        return [self._recommendation(int(item), float(scores[item])) for item in best]

    def _scores(self, user_id: str | int | None, seen: np.ndarray) -> np.ndarray:
        """Return the scores of all items, float32 [n_items]."""
        if not self._by_history:
            inputs = {"user_vector": self._user_vector(user_id, seen)[None]}
        else:
            history, lengths = pad_histories([seen], len(self.item_ids), self.about["history_length"])
            inputs = {"history": history, "lengths": lengths}
        wanted = {each.name for each in self._session.get_inputs()}
        inputs = {name: value for name, value in inputs.items() if name in wanted}
        scores: Any = self._session.run(["scores"], {**inputs, "k": np.ones(1, dtype=np.int64)})[0]
        return np.array(scores[0])

    def _user_vector(self, user_id: str | int | None, seen: np.ndarray) -> np.ndarray:
        """Return the vector of a known user, or that of a history, float32 [D]."""
        vectors = self._vectors
        if user_id is not None:
            return np.asarray(vectors["user_vectors"][self._user(user_id)])
        return fold_in(vectors["fold_in"], vectors["item_vectors"], vectors.get("item_bias"), seen)

    def _user(self, user_id: str | int | None) -> int:
        index = self._user_index.get(str(user_id))
        if index is None:
            raise UserError(f"user_id: unknown user {user_id!r}")
        return index

    def _seen(self, user_id: str | int | None) -> np.ndarray:
        user = self._user(user_id)
        return np.asarray(self._items[self._indptr[user] : self._indptr[user + 1]])

    def _indices(self, history: Sequence[str | int]) -> np.ndarray:
        unknown = [item for item in history if str(item) not in self._item_index]
        if unknown:
            raise UserError(f"history: unknown item {unknown[0]!r}")
        return np.array([self._item_index[str(item)] for item in history], dtype=np.int32)

    def _recommendation(self, item: int, score: float) -> Recommendation:
        return Recommendation(self.item_ids[item], score, self.titles[item] if self.titles else None)

    def _has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def _json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


def read_about(folder: Path) -> dict[str, Any]:
    """Return ``model.json`` of an export; a UserError if there is none of a format this version reads."""
    path = folder / "model.json"
    if not path.is_file():
        raise UserError(f"{folder}: no export here (model.json is missing)")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not the JSON of an export: {error}") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else None
        raise UserError(f"{path}: format {found!r}, wanted {FORMAT!r}")
    return about


def pad_histories(
    histories: Sequence[np.ndarray], n_items: int, length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the last ``length`` items (None: all) as int64 [B, T], padded right with ``n_items``, and lengths [B]."""
    kept = [history[-length:] if length else history for history in histories]
    lengths = np.array([len(history) for history in kept], dtype=np.int64)
    padded = np.full((len(kept), max(int(lengths.max(initial=0)), 1)), n_items, dtype=np.int64)
    for row, history in zip(padded, kept, strict=True):
        row[: len(history)] = history
    return padded, lengths
