"""What the page and other people look up: the model, its items and users."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from apps.recsys.serve.model import ServedModel

_NAMES = 200
# users looked at for a suggestion: millions are not read to their end
_SEARCHED = 200_000
_SHOWN = 50


class Catalogue:
    """Questions about a model that are no recommendations."""

    def __init__(self, model: ServedModel) -> None:
        self._model, self._prepared = model, model.prepared

    def about(self) -> dict[str, Any]:
        """Return what the model is; metrics are those of the run it comes from."""
        about, index = self._model.about, self._model.index
        names = self._prepared.categories.names
        segments = self._prepared.segments.table
        return {
            **{name: about[name] for name in ("label", "kind", "role", "users", "items", "dimension", "parameters")},
            "data": about["data"],
            "metrics": [row for row in about["metrics"] if row["split"] == "test"],
            "recipe": about["training"]["recipe"],
            "fold_in": about.get("fold_in"),
            "index": {"kind": self._model.index_kind, **(index.about if index is not None else {})},
            "categories": {"count": len(names), "names": names[:_NAMES]},
            "segments": {feature: sorted(values)[:_NAMES] for feature, values in segments.items()},
        }

    def items(self, query: str, limit: int) -> list[dict[str, Any]]:
        """Return items whose title or id holds a text, the most popular first."""
        ranks = self._prepared.search.ranks(query, limit) if query else range(min(limit, self._model.n_items))
        items = [int(self._prepared.popularity[rank]) for rank in ranks]
        return [{**self._item(item), "interactions": int(self._prepared.counts[item])} for item in items]

    def users(self, query: str, limit: int) -> list[dict[str, Any]]:
        """Return users whose id begins with a text, in index order, and how many items each had."""
        ids, found, start = self._prepared.users.ids, [], query.encode()
        for user in range(min(len(ids), _SEARCHED)):
            if ids[user].startswith(start):
                found.append({"user_id": ids[user].decode(), "interactions": len(self._prepared.seen(user))})
                if len(found) == limit:
                    break
        return found

    def history(self, user_id: str, stored: Sequence[str]) -> list[dict[str, Any]] | None:
        """Return a user's last items, newest first, stored events before the data; None for an unknown user."""
        user = self._prepared.users.get(user_id)
        if user is None and not stored:
            return None
        later = [item for item in map(self._prepared.items.get, stored) if item is not None]
        items = [*(self._prepared.seen(user).tolist() if user is not None else []), *later]
        return [self._item(item) for item in items[::-1][:_SHOWN]]

    def _item(self, item: int) -> dict[str, Any]:
        named: dict[str, Any] = json.loads(self._prepared.heads[item].removesuffix(b',"score":') + b"}")
        return named
