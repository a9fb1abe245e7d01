"""Who interacted with what, oldest first: the compressed form every model and metric reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp


@dataclass(frozen=True)
class Histories:
    """The items of every user in time order, as compressed rows.

    ``indptr`` int64 [n_users + 1]; ``items`` int32 [n]; user u has ``items[indptr[u]:indptr[u + 1]]``.
    """

    indptr: np.ndarray
    items: np.ndarray
    n_items: int

    @classmethod
    def from_pairs(
        cls,
        user: np.ndarray,
        item: np.ndarray,
        n_users: int,
        n_items: int,
        order: np.ndarray | None = None,
    ) -> Histories:
        """Group pairs by user; within a user by ``order`` (a timestamp), equal values by position in the input."""
        # both are stable: ties keep the input order
        rank = np.argsort(user, kind="stable") if order is None else np.lexsort((order, user))
        counts = np.bincount(user, minlength=n_users)
        indptr = np.zeros(n_users + 1, dtype=np.int64)
        np.cumsum(counts, out=indptr[1:])
        return cls(indptr, item[rank].astype(np.int32), n_items)

    @property
    def n_users(self) -> int:
        """Number of users, those without items counted."""
        return len(self.indptr) - 1

    def __len__(self) -> int:
        return len(self.items)

    def of(self, user: int) -> np.ndarray:
        """Return the items of one user, oldest first."""
        return self.items[self.indptr[user] : self.indptr[user + 1]]

    def counts(self) -> np.ndarray:
        """Return the number of interactions of every user, int64 [n_users]."""
        return np.diff(self.indptr)

    def users(self) -> np.ndarray:
        """Return the user of every entry of ``items``, int32 [n]."""
        return np.repeat(np.arange(self.n_users, dtype=np.int32), self.counts())

    def item_counts(self) -> np.ndarray:
        """Return the number of interactions of every item, int64 [n_items]."""
        return np.bincount(self.items, minlength=self.n_items)

    def matrix(self) -> sp.csr_matrix:
        """Return the binary user-by-item matrix, float32 [n_users, n_items]; a repeated pair counts once."""
        ones = np.ones(len(self.items), dtype=np.float32)
        matrix = sp.csr_matrix((ones, self.items.copy(), self.indptr.copy()), shape=(self.n_users, self.n_items))
        matrix.sum_duplicates()  # also sorts the column indices
        matrix.data[:] = 1.0
        return matrix

    def merge(self, later: Histories) -> Histories:
        """Return the histories with ``later``'s items appended to each user's own."""
        user = np.concatenate([self.users(), later.users()])
        item = np.concatenate([self.items, later.items])
        return Histories.from_pairs(user, item, self.n_users, self.n_items)

    def rows(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the pairs of some users as (row in ``users`` int64 [m], item int64 [m])."""
        start, stop = self.indptr[users], self.indptr[users + 1]
        lengths = stop - start
        row = np.repeat(np.arange(len(users)), lengths)
        offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return row, self.items[np.repeat(start, lengths) + offsets].astype(np.int64)
