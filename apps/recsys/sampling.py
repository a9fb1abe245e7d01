"""Drawing items a user has not seen, vectorised, from an explicit generator."""

from __future__ import annotations

import torch
from torch import Tensor

from apps.recsys.data.histories import Histories

# up to this many cells a bitmap (one byte a cell) answers membership fastest
_BITMAP_CELLS = 1 << 27
_ROUNDS = 8
# cells of the table, users x items, of the few draws that rejection leaves over
_EXACT_CELLS = 1 << 24


class Membership:
    """Answers whether user u has item i, for many pairs at once."""

    def __init__(self, histories: Histories) -> None:
        self.n_users, self.n_items = histories.n_users, histories.n_items
        user = torch.from_numpy(histories.users().astype("int64"))
        keys = user * self.n_items + torch.from_numpy(histories.items.astype("int64"))
        # one of the two is built: a bitmap of all cells, or the sorted keys
        self._bitmap: Tensor | None = None
        self._keys = keys.new_empty(0)
        if self.n_users * self.n_items <= _BITMAP_CELLS:
            self._bitmap = torch.zeros(self.n_users * self.n_items, dtype=torch.bool)
            self._bitmap[keys] = True
        else:
            self._keys = keys.unique()

    def has(self, users: Tensor, items: Tensor) -> Tensor:
        """Return bool of the broadcast shape of ``users`` and ``items``, both int64."""
        keys = users * self.n_items + items
        if self._bitmap is not None:
            return self._bitmap[keys]
        return _among(self._keys, keys)


def sample_unseen(
    seen: Membership, users: Tensor, n: int, generator: torch.Generator, avoid: Tensor | None = None
) -> Tensor:
    """Draw ``n`` items uniformly from those not in ``seen``, with replacement, int64 [B, n] for users int64 [B].

    ``avoid`` int64 [B, K] names further items that a row must not draw. Rejection settles nearly all draws; the few
    left over (users who have almost everything) are drawn exactly. Where nothing is left outside ``avoid`` the draws
    are from all unseen items, and where a user has every item from all items: there is nothing else to draw.
    """
    items = torch.randint(seen.n_items, (len(users), n), generator=generator)
    # rows in ascending order, each sorted: one ascending list of keys, searched for all rows at once
    keys = None
    if avoid is not None:
        keys = (torch.arange(len(users))[:, None] * seen.n_items + avoid.sort(dim=1).values).flatten()
    taken = seen.has(users[:, None], items)
    if keys is not None:
        taken |= _among(keys, torch.arange(len(users))[:, None] * seen.n_items + items)
    row, column = taken.nonzero(as_tuple=True)
    for _ in range(_ROUNDS):
        if not len(row):
            return items
        fresh = torch.randint(seen.n_items, (len(row),), generator=generator)
        items[row, column] = fresh
        again = seen.has(users[row], fresh)
        if keys is not None:
            again |= _among(keys, row * seen.n_items + fresh)
        row, column = row[again], column[again]
    for rows in row.unique().split(max(1, _EXACT_CELLS // seen.n_items)):
        free = _free(seen, users[rows], None if avoid is None else avoid[rows])
        exact = torch.multinomial(free.float(), n, replacement=True, generator=generator)
        mine = torch.isin(row, rows)
        place = torch.searchsorted(rows, row[mine])
        items[row[mine], column[mine]] = exact[place, column[mine]]
    return items


def _among(keys: Tensor, wanted: Tensor) -> Tensor:
    """Return whether each of ``wanted`` int64 stands in ``keys`` int64 [m], ascending; bool of its shape."""
    if not len(keys):
        return torch.zeros_like(wanted, dtype=torch.bool)
    place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return keys[place] == wanted


def _free(seen: Membership, users: Tensor, avoid: Tensor | None) -> Tensor:
    """Return which items may be drawn for ``users`` int64 [R], bool [R, n_items], at least one a row."""
    unseen = ~seen.has(users[:, None], torch.arange(seen.n_items))
    free = unseen if avoid is None else unseen.scatter(1, avoid, False)
    free = torch.where(free.any(dim=1, keepdim=True), free, unseen)
    return free | ~unseen.any(dim=1, keepdim=True)
