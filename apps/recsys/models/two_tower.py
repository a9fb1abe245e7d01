"""Two towers: a user's and an item's vector, each computed from ids and features through TorchRec's tables."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional

from apps.recsys.data.features import Bags, Feature, encode_table, fit_features
from apps.recsys.data.histories import Histories
from apps.recsys.models.base import DotRecommender, Encoded, gather_rows
from apps.recsys.models.options import above_zero, at_least
from kdcore.config import UserError

# users and items whose vectors are computed in one go without gradient: bounds the memory of the looked-up rows
_BLOCK = 1 << 15
# the table of ids beside those of features, whose keys begin otherwise
_ID = "id"


@dataclass(frozen=True)
class TwoTowerOptions:
    """Size of a two-tower model, and how its features become indices."""

    # width of the vectors whose product is the score, and of every row of the tables
    dimension: int = 8
    feature_dimension: int = 8
    # widths of the hidden layers of each tower; none: the vector is linear in the rows
    hidden: list[int] | int = field(default_factory=list)
    # a side without features has ids in any case
    use_ids: bool = True
    # a further output of the item tower that no user scales
    bias: bool = True
    # a token of fewer users or items is as good as unknown
    min_count: int = 5
    # of a numeric feature, each with the same number of users or items
    buckets: int = 16
    # features that are left out; a title names its item and nothing else
    ignore: list[str] = field(default_factory=lambda: ["title"])
    # standard deviation of the initial rows
    scale: float = 0.1

    def __post_init__(self) -> None:
        at_least(self, dimension=1, feature_dimension=1, min_count=1, buckets=1)
        above_zero(self, "scale")
        widths = self.hidden if isinstance(self.hidden, list) else [self.hidden]
        if not all(type(width) is int and width >= 1 for width in widths):
            raise ValueError(f"hidden: got {self.hidden!r}, wanted a width or a list of widths, 1 or more")
        object.__setattr__(self, "hidden", widths)
        if not isinstance(self.ignore, list) or not all(isinstance(name, str) for name in self.ignore):
            raise ValueError(f"ignore: got {self.ignore!r}, wanted a list of feature names")


@dataclass(frozen=True)
class Side:
    """What one tower reads: ``features``, ``n_ids`` ids (0: none), and how many indices all rows have together."""

    features: tuple[Feature, ...]
    n_ids: int
    n_values: int

    def sizes(self) -> dict[str, int]:
        """Return the number of rows of every table by its key."""
        ids = {_ID: self.n_ids} if self.n_ids else {}
        return ids | {_key(feature.name): feature.size for feature in self.features}

    def to_json(self) -> dict[str, Any]:
        """Return the side as JSON holds it."""
        features = [feature.to_json() for feature in self.features]
        return {"features": features, "n_ids": self.n_ids, "n_values": self.n_values}

    @classmethod
    def from_json(cls, about: Mapping[str, Any]) -> Side:
        """Return the side that ``to_json`` described; KeyError, TypeError or ValueError if it is not one."""
        features = tuple(map(Feature.from_json, about["features"]))
        return cls(features, int(about["n_ids"]), int(about["n_values"]))


def _key(name: str) -> str:
    """Return the key of a feature's table: a module's name, which has no dots."""
    return "is:" + name.replace("%", "%25").replace(".", "%2E")


class Tower(nn.Module):
    """Rows of the tables of one side, averaged within a bag, joined in the order of the keys, and mapped to vectors.

    The indices of all users or items are buffers, so that a stored model needs no data; they are inputs, not learned.
    """

    def __init__(self, side: Side, n_rows: int, options: TwoTowerOptions, outputs: int, *, constant: bool) -> None:
        super().__init__()
        torchrec = _torchrec()
        sizes = side.sizes()
        self.n_rows, self.outputs = n_rows, outputs
        self.keys, self._jagged = list(sizes), torchrec.KeyedJaggedTensor
        tables = [
            torchrec.EmbeddingBagConfig(
                name=key,
                embedding_dim=options.feature_dimension,
                num_embeddings=size,
                feature_names=[key],
                pooling=torchrec.PoolingType.MEAN,
                init_fn=lambda rows: nn.init.normal_(rows, std=options.scale),
            )
            for key, size in sizes.items()
        ]
        self.tables = torchrec.EmbeddingBagCollection(tables=tables)
        layers: list[nn.Module] = []
        width = options.feature_dimension * len(sizes)
        for hidden in options.hidden if isinstance(options.hidden, list) else [options.hidden]:
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        self.dense = nn.Sequential(*layers, nn.Linear(width, outputs, bias=constant))
        self.indptr: Tensor
        self.values: Tensor
        self.register_buffer("indptr", torch.zeros(len(sizes) * n_rows + 1, dtype=torch.int32))
        self.register_buffer("values", torch.zeros(side.n_values, dtype=torch.int32))

    def fill(self, bags: Mapping[str, Bags]) -> None:
        """Set the indices of all rows from one ``Bags`` a key."""
        offset, pointers, values = 0, [np.zeros(1, np.int64)], []
        for key in self.keys:
            pointers.append(bags[key].indptr[1:] + offset)
            values.append(bags[key].values)
            offset += len(bags[key].values)
        self.indptr.copy_(torch.from_numpy(np.concatenate(pointers)))
        self.values.copy_(torch.from_numpy(np.concatenate(values)))

    def forward(self, ids: Tensor) -> Tensor:
        """Return the outputs of users or items ``ids`` int64 [B], float32 [B, outputs]."""
        return self.read(self.jagged(ids))

    def jagged(self, ids: Tensor) -> Any:
        """Return the indices of ``ids`` int64 [B] for all keys as a KeyedJaggedTensor."""
        first = torch.arange(len(self.keys), device=ids.device)[:, None] * self.n_rows
        rows = (first + ids).flatten()
        start = self.indptr[rows].long()
        lengths = self.indptr[rows + 1].long() - start
        # the k-th index of a bag stands k places after its first one
        shift = torch.repeat_interleave(start - (lengths.cumsum(0) - lengths), lengths)
        values = self.values[shift + torch.arange(len(shift), device=ids.device)].long()
        return self._jagged(keys=self.keys, values=values, lengths=lengths)

    def read(self, jagged: Any) -> Tensor:
        """Return the outputs of a KeyedJaggedTensor of B bags a key, in any order of keys, float32 [B, outputs]."""
        # tables that are sharded over processes answer in an order of their own: by key, never by position
        rows = self.tables(jagged).to_dict()
        return self.dense(torch.cat([rows[key] for key in self.keys], dim=1))


class TwoTower(DotRecommender):
    """score(u, i) = <f(u), g(i)> + h(i); f, g and h are nets over ids and features (Covington et al., RecSys 2016).

    An id has a row of its own only if it occurs in training; any other user or item has no id, and is what its
    features say. Built by ``fit`` from data, by ``from_json`` from a description of what it reads.

    Reference for the tables: Ivchenko et al., TorchRec, RecSys 2022.
    """

    kind: ClassVar[str] = "two_tower"
    # more users and items than this together, and a training step computes only the vectors it asks for
    whole: ClassVar[int] = 1 << 14

    def __init__(self, n_users: int, n_items: int, options: TwoTowerOptions, user: Side, item: Side) -> None:
        super().__init__()
        self.n_users, self.n_items, self.options = n_users, n_items, options
        self.user_side, self.item_side = user, item
        self.user = Tower(user, n_users, options, options.dimension, constant=True)
        # what all items have in common ranks none of them: its gradient is rounding noise, which Adam would blow up
        self.item = Tower(item, n_items, options, options.dimension + options.bias, constant=False)
        self._cached: _Kept | None = None

    @classmethod
    def fit(
        cls, train: Histories, options: TwoTowerOptions, user_features: pa.Table | None, item_features: pa.Table | None
    ) -> TwoTower:
        """Return a fresh model; which tokens, buckets and ids it knows comes from users and items in training.

        Raises:
            UserError: there are no features and no ids, a feature is of a kind that has no indices, or ``ignore``
                names one that does not exist.
        """
        tables = [table for table in (user_features, item_features) if table is not None]
        names = [name for table in tables for name in table.column_names]
        for name in options.ignore:
            if name not in names and name != "title":  # left out by default, there or not
                raise UserError(f"two_tower.ignore: no feature {name!r}, got {', '.join(names) or 'none'}")
        seen = {"user": train.counts() > 0, "item": train.item_counts() > 0}
        fitted = {
            side: fit_features(
                table, seen[side], min_count=options.min_count, buckets=options.buckets, ignore=options.ignore
            )
            for side, table in (("user", user_features), ("item", item_features))
        }
        if not options.use_ids and not any(fitted.values()):
            raise UserError("two_tower.use_ids false: the data have no user or item features to learn from instead")
        user, user_bags = _side(fitted["user"], user_features, seen["user"], options.use_ids)
        item, item_bags = _side(fitted["item"], item_features, seen["item"], options.use_ids)
        model = cls(train.n_users, train.n_items, options, user, item)
        model.user.fill(user_bags)
        model.item.fill(item_bags)
        return model

    @classmethod
    def from_json(cls, n_users: int, n_items: int, options: TwoTowerOptions, reads: Mapping[str, Any]) -> TwoTower:
        """Return a model to load weights into, from what ``reads()`` returned."""
        return cls(n_users, n_items, options, Side.from_json(reads["user"]), Side.from_json(reads["item"]))

    def reads(self) -> dict[str, Any]:
        """Return what the towers read, vocabularies and bounds included, as JSON holds it."""
        return {"user": self.user_side.to_json(), "item": self.item_side.to_json()}

    def parameter_count(self) -> int:
        """Return the number of learned values: tables and layers.

        The indices of users and items are their features, data as a history is; the size on disk does count them.
        """
        return sum(parameter.numel() for parameter in self.parameters())

    def encode(self) -> Encoded:
        """Return all vectors of a small model, or those a training step will ask for."""
        if torch.is_grad_enabled() and self.n_users + self.n_items > self.whole:
            self._cached = None
            return LazyEncoded(self)
        item = self._items()
        bias = item[:, self.options.dimension] if self.options.bias else None
        return Encoded(_all(self.user), item[:, : self.options.dimension], bias)

    def user_vectors(self, users: Tensor, histories: Histories) -> Tensor:
        """Return the outputs of the user tower, float32 [B, D]."""
        return self.user(users)

    def item_vectors(self) -> Tensor:
        """Return the outputs of the item tower, float32 [n_items, D]; kept between calls without gradient."""
        return self._items()[:, : self.options.dimension].contiguous()

    def item_bias(self) -> Tensor | None:
        """Return the bias of all items, float32 [n_items], or None."""
        return self._items()[:, self.options.dimension].contiguous() if self.options.bias else None

    def new_items(self, features: pa.Table | None) -> tuple[Tensor, Tensor | None]:
        """Return vectors [n, D] and bias [n] (or None) of items the model was not built with, from features alone."""
        bags = {_key(name): each for name, each in encode_table(self.item_side.features, features).items()}
        if not bags or features is None:
            raise UserError("two_tower: the model reads no item features, so it knows nothing of a new item")
        if self.item_side.n_ids:
            bags[_ID] = Bags(np.zeros(features.num_rows + 1, np.int64), np.empty(0, np.int32))
        lengths = np.concatenate([np.diff(bags[key].indptr) for key in self.item.keys])
        values = np.concatenate([bags[key].values for key in self.item.keys])
        device = self.item.indptr.device
        jagged = self.item._jagged(
            keys=self.item.keys,
            values=torch.from_numpy(values).long().to(device),
            lengths=torch.from_numpy(lengths).to(device),
        )
        outputs, width = self.item.read(jagged), self.options.dimension
        return outputs[:, :width], outputs[:, width] if self.options.bias else None

    def _items(self) -> Tensor:
        """Return the outputs of the item tower for all items, bias last."""
        if torch.is_grad_enabled() or self.training:
            self._cached = None
            return _all(self.item)
        # a change in place raises a tensor's version and a move its address; but a fused optimiser raises no version,
        # so the layers, which every update changes, are compared as well
        state = [(value.data_ptr(), value._version) for value in self.item.state_dict(keep_vars=True).values()]
        layers = torch.cat([value.flatten() for value in self.item.dense.parameters()])
        kept = self._cached
        if kept is None or kept.state != state or not torch.equal(kept.layers, layers):
            self._cached = kept = _Kept(state, layers, _all(self.item))
        return kept.outputs


@dataclass(frozen=True)
class _Kept:
    """The item tower's outputs, and what they were computed with."""

    state: list[tuple[int, int]]
    layers: Tensor
    outputs: Tensor


class LazyEncoded(Encoded):
    """The vectors that one training step asks for, each computed once, on first use."""

    def __init__(self, model: TwoTower) -> None:
        dimension = model.options.dimension
        self._bias = model.options.bias
        self._user_rows, self._item_rows = LazyRows(model.user, dimension), LazyRows(model.item, dimension)
        self.user, self.item = self._user_rows, self._item_rows  # type: ignore[assignment]
        self.bias = None

    def _users(self, users: Tensor) -> Tensor:
        rows = self._user_rows.outputs(users)
        return functional.pad(rows, (0, 1), value=1.0) if self._bias else rows

    def pair(self, users: Tensor, items: Tensor) -> Tensor:
        """Return the scores [B] of pairs, users and items int64 [B]."""
        return (self._users(users) * self._item_rows.outputs(items)).sum(dim=-1)

    def lists(self, users: Tensor, items: Tensor) -> Tensor:
        """Return the scores [B, K] of item lists int64 [B, K] for users int64 [B]."""
        return (self._item_rows.outputs(items) * self._users(users)[:, None]).sum(dim=-1)

    def columns(self, items: Tensor, users: Tensor) -> Tensor:
        """Return the scores [B, K] of user lists int64 [B, K] for items int64 [B]."""
        return (self._users(users) * self._item_rows.outputs(items)[:, None]).sum(dim=-1)

    def everything(self, users: Tensor) -> Tensor:
        """Return the scores of all items [B, n_items] for users int64 [B]; this does compute every item."""
        items = torch.arange(self._item_rows.tower.n_rows, device=users.device)
        return self._users(users) @ self._item_rows.outputs(items).T


class LazyRows:
    """The vectors of one side, indexed like a tensor [n, D] but computed where they are first asked for."""

    def __init__(self, tower: Tower, dimension: int) -> None:
        self.tower, self.dimension = tower, dimension
        self.device = tower.indptr.device
        self.shape = torch.Size([tower.n_rows, dimension])
        # where the row of an id stands among those computed; -1: not yet
        self._place = torch.full((tower.n_rows,), -1, dtype=torch.int64, device=self.device)
        self._computed: Tensor | None = None

    def outputs(self, ids: Tensor) -> Tensor:
        """Return the tower's outputs for ``ids`` int64 of any shape, one more axis at the end."""
        place = self._place[ids]
        new = ids[place < 0].unique()
        if len(new):
            known = 0 if self._computed is None else len(self._computed)
            self._place[new] = torch.arange(known, known + len(new), device=self.device)
            rows = self.tower(new)
            self._computed = rows if self._computed is None else torch.cat([self._computed, rows])
            place = self._place[ids]
        if self._computed is None:
            return torch.zeros(*ids.shape, self.tower.outputs, device=self.device)  # nothing was asked for
        return gather_rows(self._computed, place)

    def __getitem__(self, ids: Tensor) -> Tensor:
        """Return the vectors of ``ids``, without the bias."""
        return self.outputs(ids)[..., : self.dimension]


def _all(tower: Tower) -> Tensor:
    """Return the outputs for all rows, in blocks where there is no gradient to keep."""
    ids = torch.arange(tower.n_rows, device=tower.indptr.device)
    if torch.is_grad_enabled() or len(ids) <= _BLOCK:
        return tower(ids)
    return torch.cat([tower(block) for block in ids.split(_BLOCK)])


def _side(
    features: tuple[Feature, ...], table: pa.Table | None, seen: np.ndarray, use_ids: bool
) -> tuple[Side, dict[str, Bags]]:
    """Return what a tower reads and the indices of every user or item by key."""
    bags = {_key(name): each for name, each in encode_table(features, table).items()}
    n_ids = int(seen.sum()) if use_ids or not features else 0
    if n_ids:
        indptr = np.concatenate([[0], np.cumsum(seen)]).astype(np.int64)
        bags[_ID] = Bags(indptr, np.arange(n_ids, dtype=np.int32))
    n_values = sum(len(each.values) for each in bags.values())
    if n_values > np.iinfo(np.int32).max:
        raise UserError(f"two_tower: got {n_values} feature values of one side, wanted at most 2^31 - 1")
    return Side(features, n_ids, n_values), bags


def _torchrec() -> ModuleType:
    """Import TorchRec, which takes seconds, where it is first needed."""
    # torch warns once of a change that concerns TorchRec's own authors, fbgemm of modules it will move
    logging.getLogger("torch.fx._symbolic_trace").addFilter(_about_tracing)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            import torchrec
    except ImportError as error:
        raise UserError(
            f"two_tower: TorchRec is not usable ({error}); pip install 'kdsuite[scale]', "
            "then pip install --no-deps torchrec==1.8.0"
        ) from None
    return torchrec


def _about_tracing(record: logging.LogRecord) -> bool:
    """Return whether a line of the log says something else."""
    return not record.getMessage().startswith("is_fx_tracing will return true")
