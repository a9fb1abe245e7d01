"""Drawing items a user has not seen, vectorised, from an explicit generator."""

from __future__ import annotations

import torch
from torch import Tensor

from apps.recsys.data.histories import Histories

# up to this many cells a bitmap (one byte a cell) answers membership fastest
_BITMAP_CELLS = 1 << 27
_ROUNDS = 32


class Membership:
    """Answers whether user u has item i, for many pairs at once."""

    def __init__(self, histories: Histories, lists: Tensor | None = None) -> None:
        """Take each user's history and, if given, further items ``lists`` int [n_users, K]."""
        self.n_users, self.n_items = histories.n_users, histories.n_items
        user = torch.from_numpy(histories.users().astype("int64"))
        keys = user * self.n_items + torch.from_numpy(histories.items.astype("int64"))
        if lists is not None:
            rows = torch.arange(self.n_users)[:, None] * self.n_items
            keys = torch.cat([keys, (rows + lists.long()).flatten()])
        self._bitmap: Tensor | None = None
        self._keys: Tensor | None = None
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
        assert self._keys is not None  # one of the two forms was built
        place = torch.searchsorted(self._keys, keys).clamp(max=len(self._keys) - 1)
        return self._keys[place] == keys

    def row(self, user: int) -> Tensor:
        """Return whether ``user`` has each item, bool [n_items]."""
        return self.has(torch.full((self.n_items,), user), torch.arange(self.n_items))


def sample_unseen(seen: Membership, users: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draw ``n`` items uniformly from those not in ``seen``, with replacement, int64 [B, n] for users int64 [B].

    Rejection settles nearly all draws; the few left over (users who have almost everything) are drawn exactly. A user
    who has every item gets uniform draws from all of them: there is nothing else to draw.
    """
    items = torch.randint(seen.n_items, (len(users), n), generator=generator)
    users = users[:, None].expand_as(items)
    rejected = seen.has(users, items).nonzero(as_tuple=True)
    for _ in range(_ROUNDS):
        if not len(rejected[0]):
            return items
        fresh = torch.randint(seen.n_items, (len(rejected[0]),), generator=generator)
        items[rejected] = fresh
        still = seen.has(users[rejected], fresh)
        rejected = (rejected[0][still], rejected[1][still])
    for row, column in zip(rejected[0].tolist(), rejected[1].tolist(), strict=True):
        free = (~seen.row(int(users[row, column]))).nonzero()[:, 0]
        if len(free):
            items[row, column] = free[torch.randint(len(free), (1,), generator=generator)]
    return items
