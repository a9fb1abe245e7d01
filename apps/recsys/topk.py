"""Exact top-k search over all items in bounded memory.

Scores exist for one block of users (and, with many items, one block of items) at a time. Equal scores are ordered
by ascending item index, also where the list is cut, so that a ranking never depends on the number of threads, on
the blocks or on the device's sort.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor

from apps.recsys.data.histories import Histories
from apps.recsys.models.base import DotRecommender, Recommender

BLOCK_BYTES = 128 << 20
CHUNK = 64  # items summarised by their maximum; wide enough to skip most of the work, narrow enough to gather
_MIN_ROWS = 16  # of a matrix product: BLAS kernels for fewer round the last bit otherwise, and near ties turn over
_MIN_USERS = 128  # users in a block before items are blocked too: fewer would reread the item vectors too often
_MAX_USERS = {False: 2048, True: 512}  # by Recommender.sequential: a sequence encoder keeps [users, T, D] tensors


def top_k(
    model: Recommender,
    users: np.ndarray,
    k: int,
    histories: Histories,
    exclude: Histories | None = None,
    *,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ``k`` best items of every user: ids int32 [B, k] and scores float32 [B, k], best first.

    ``histories`` is what the model reads, ``exclude`` what must not be recommended. Where a user has fewer than
    ``k`` candidates (items that are not excluded and whose score is not -inf) the row ends in id -1, score -inf.
    Memory beyond the result and the model is about twice ``block_bytes``.

    Raises ValueError if k < 1, a user is out of range, or the model gives NaN or a wrong shape.
    """
    users = np.asarray(users, dtype=np.int64)
    ids = np.empty((len(users), k), dtype=np.int32)
    scores = np.empty((len(users), k), dtype=np.float32)
    with inference(model):
        search = Search(model, k, histories, exclude, block_bytes=block_bytes)
        for start, stop in search.blocks(len(users)):
            values, columns = search(users[start:stop])
            ids[start:stop] = columns.cpu().numpy()
            scores[start:stop] = values.cpu().numpy()
    return ids, scores


@contextmanager
def inference(model: Recommender) -> Iterator[None]:
    """Put ``model`` into evaluation mode without gradients, in full float32, and give its modes back afterwards.

    Autocast is off and reduced-precision products are disallowed: a ranking must not depend on either.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = device_of(model)
    precision = torch.get_float32_matmul_precision()
    model.eval()
    torch.set_float32_matmul_precision("highest")
    autocast = torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
    try:
        with torch.no_grad(), autocast:
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for module, training in modes:
            module.training = training


def device_of(model: Recommender) -> torch.device:
    """Return where the model lives: the device of its first parameter or buffer, the CPU if it has none."""
    for tensor in model.parameters():
        return tensor.device
    for buffer in model.buffers():
        return buffer.device
    return torch.device("cpu")


class Search:
    """A prepared search: item vectors and score buffer are made once and serve every block of users.

    Use it inside :func:`inference`, and make a new one when the model has changed.
    """

    def __init__(
        self,
        model: Recommender,
        k: int,
        histories: Histories,
        exclude: Histories | None = None,
        *,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        if k < 1:
            raise ValueError(f"k: got {k}, wanted at least 1")
        self.model, self.k, self.histories, self.exclude = model, k, histories, exclude
        self.device = device_of(model)
        self.n_items = model.n_items
        self.users_per_block, self.items_per_block = _block_shape(model, block_bytes)
        self.buffer: Tensor | None = None
        if isinstance(model, DotRecommender):
            self.item_vectors = model.item_vectors().to(torch.float32)
            bias = model.item_bias()
            self.item_bias = None if bias is None else bias.to(torch.float32)

    def blocks(self, n_users: int) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) over ``n_users`` users such that each block fits in the buffer."""
        for start in range(0, n_users, self.users_per_block):
            yield start, min(start + self.users_per_block, n_users)

    def __call__(self, users: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return scores float32 [B, k] and item ids int64 [B, k] of at most ``users_per_block`` users int64 [B]."""
        if len(users) and not 0 <= int(users.min()) <= int(users.max()) < self.model.n_users:
            raise ValueError(f"users: got {users.min()}..{users.max()}, wanted 0..{self.model.n_users - 1}")
        users_on_device = torch.from_numpy(np.ascontiguousarray(users, dtype=np.int64)).to(self.device)
        vectors = self._user_vectors(users_on_device)
        row, item = self.exclude.rows(users) if self.exclude is not None else (None, None)
        best: tuple[Tensor, Tensor] | None = None
        for first in range(0, self.n_items, self.items_per_block):
            last = min(first + self.items_per_block, self.n_items)
            if vectors is None:
                block = self._block(len(users), last - first)
                self._fill_from_scores(block, users_on_device)
            else:
                block = self._block(len(vectors), last - first)
                self._fill_from_vectors(block, vectors, first, last)
                block = block[: len(users)]
            if row is not None and item is not None:
                if last - first < self.n_items:
                    inside = (item >= first) & (item < last)
                    _mask(block, row[inside], item[inside] - first)
                else:
                    _mask(block, row, item)
            values, columns = select(block, self.k)
            if values[:, 0].isnan().any():
                raise ValueError(f"{type(self.model).__name__} ({self.model.kind}) gives NaN scores")
            found = values, columns + first
            best = found if best is None else _merge(best, found, self.k)
        if best is None:
            raise ValueError("the model has no items")
        return _pad(best, self.k)

    def _user_vectors(self, users: Tensor) -> Tensor | None:
        """Return the user vectors, float32 [>= B, D], with rows of zeros below if B is small; None if it has none."""
        if not isinstance(self.model, DotRecommender):
            return None
        vectors = self.model.user_vectors(users, self.histories).to(torch.float32)
        missing = min(_MIN_ROWS, self.users_per_block) - len(vectors)
        return torch.nn.functional.pad(vectors, (0, 0, 0, missing)) if missing > 0 else vectors

    def _block(self, n_users: int, n_items: int) -> Tensor:
        """Return part of the buffer, float32 [n_users, width]; the columns past ``n_items`` fill up the last chunk."""
        width = -(-n_items // CHUNK) * CHUNK
        if self.buffer is None or self.buffer.numel() < n_users * width:
            self.buffer = torch.empty(n_users * width, dtype=torch.float32, device=self.device)
        block = self.buffer[: n_users * width].view(n_users, width)
        block[:, n_items:] = -torch.inf
        return block

    def _fill_from_scores(self, block: Tensor, users: Tensor) -> None:
        scores = self.model.scores(users, self.histories)
        if scores.shape != (len(users), self.n_items):
            raise ValueError(
                f"{type(self.model).__name__}.scores: got shape {tuple(scores.shape)}, "
                f"wanted {(len(users), self.n_items)}"
            )
        # A copy: masking in place could write into what the model keeps (popularity returns one expanded row).
        block[:, : self.n_items] = scores

    def _fill_from_vectors(self, block: Tensor, vectors: Tensor, first: int, last: int) -> None:
        # One wide product: a product per cache-sized panel is no faster, and every one is a barrier for the threads.
        out = block[:, : last - first]
        torch.mm(vectors, self.item_vectors[first:last].T, out=out)
        if self.item_bias is not None:
            out += self.item_bias[first:last]


def select(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the ``min(k, N)`` best values and columns int64 of ``scores`` float32 [B, N], exact with ties.

    Equal scores come in ascending column order; columns of -inf scores are arbitrary. A row with NaN begins with
    NaN. ``scores`` must be contiguous.

    Wide rows are reduced in two steps. A chunk of 64 columns is represented by its maximum. The k best chunks, by
    maximum and then by position, hold the k best columns: were a chosen column outside, k chunks would each have
    a column that comes before it.
    """
    n_users, n_items = scores.shape
    n_chunks = n_items // CHUNK
    take = k + 1  # one more than needed keeps torch.topk on its fast path: it wants width >= 64 times its k
    if n_items % CHUNK or n_chunks < 4 * take:
        return _select_narrow(scores, k)
    chunks = scores.view(n_users, n_chunks, CHUNK)
    _, chosen = _select_narrow(chunks.amax(dim=2), take)
    chosen = chosen.sort(dim=1).values  # so that position in the gathered row still means item order
    offsets = torch.arange(n_users, device=scores.device).unsqueeze(1) * n_chunks
    gathered = scores.view(-1, CHUNK).index_select(0, (chosen + offsets).view(-1)).view(n_users, take * CHUNK)
    values, columns = _select_narrow(gathered, k)
    return values, chosen.gather(1, columns // CHUNK) * CHUNK + columns % CHUNK


def _select_narrow(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Do the work of :func:`select` in one step: torch.topk, then repair the rows in which it met equal scores."""
    if k >= scores.shape[1]:
        values, columns = torch.sort(scores, dim=1, descending=True, stable=True)
        return values, columns
    values, columns = torch.topk(scores, k + 1, dim=1, sorted=True)
    tied = (values[:, 1:] == values[:, :-1]) & (values[:, 1:] > -torch.inf)
    rows = tied.any(dim=1).nonzero().squeeze(1)
    cut_rows = tied[:, -1].nonzero().squeeze(1)
    values, columns = values[:, :k].contiguous(), columns[:, :k].contiguous()
    if len(cut_rows):
        columns[cut_rows] = _first_at_cut(scores[cut_rows], values[cut_rows], columns[cut_rows])
    if len(rows):
        columns[rows] = _order_ties(values[rows], columns[rows])
    return values, columns


def _first_at_cut(scores: Tensor, values: Tensor, columns: Tensor) -> Tensor:
    """Among the columns that equal the last value of a row take the first ones; return int64 [R, k]."""
    k = values.shape[1]
    cut = values[:, -1:]
    position = torch.arange(scores.shape[1], device=scores.device, dtype=torch.int64)
    behind = torch.where(scores == cut, -position, -scores.shape[1])
    first = -torch.topk(behind, k, dim=1, sorted=True).values
    above = (values != cut).sum(dim=1, keepdim=True)  # higher, or NaN: in the list already, at its front
    slot = torch.arange(k, device=scores.device)
    return torch.where(slot < above, columns, first.gather(1, (slot - above).clamp(min=0)))


def _order_ties(values: Tensor, columns: Tensor) -> Tensor:
    """Return the columns [R, k] of rows sorted by value, with those of equal value in ascending order."""
    by_column = columns.argsort(dim=1)
    by_value = values.gather(1, by_column).argsort(dim=1, descending=True, stable=True)
    return columns.gather(1, by_column.gather(1, by_value))


def _merge(best: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Merge the lists of an item block into those of the blocks before it, whose items go first among equals."""
    values = torch.cat([best[0], found[0]], dim=1)
    columns = torch.cat([best[1], found[1]], dim=1)
    order = values.argsort(dim=1, descending=True, stable=True)[:, :k]
    return values.gather(1, order), columns.gather(1, order)


def _pad(best: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    values, columns = best
    columns = columns.masked_fill(values == -torch.inf, -1)
    missing = k - values.shape[1]
    if missing > 0:
        values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
        columns = torch.nn.functional.pad(columns, (0, missing), value=-1)
    return values, columns


def _mask(block: Tensor, row: np.ndarray, column: np.ndarray) -> None:
    """Set the scores at (row, column), int64 [m] each, to -inf."""
    flat = torch.from_numpy(row * block.shape[1] + column).to(block.device)
    block.view(-1).index_fill_(0, flat, -torch.inf)


def _block_shape(model: Recommender, block_bytes: int) -> tuple[int, int]:
    """Return users and items of a block of at most ``block_bytes`` bytes of float32 scores (one user at least)."""
    cells = max(block_bytes // 4, CHUNK)
    width = -(-model.n_items // CHUNK) * CHUNK
    n_users = min(cells // width, _MAX_USERS[model.sequential])
    if not isinstance(model, DotRecommender) or n_users >= _MIN_USERS:
        return max(1, n_users), model.n_items
    n_users = min(_MIN_USERS, cells // CHUNK)
    return n_users, cells // n_users // CHUNK * CHUNK
