"""Models with a closed form or a solver: EASE, implicit ALS, and the truncated SVD of a teacher's scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from apps.recsys.data.histories import Histories
from apps.recsys.models.base import Recommender
from apps.recsys.models.factors import MatrixFactorization
from apps.recsys.models.options import above_zero, at_least
from kdcore.config import UserError

# an item-by-item matrix of this many items takes 3.2 GB in float64, and its inverse as much again
_EASE_MAX_ITEMS = 20_000
# a score matrix of up to this many cells (half a GB in float64) is scored once and kept
_SVD_HELD_CELLS = 64_000_000


@dataclass(frozen=True)
class EaseOptions:
    """Regularisation of EASE."""

    l2: float = 200.0

    def __post_init__(self) -> None:
        above_zero(self, "l2")


class Ease(Recommender):
    """Item-to-item linear model with zero diagonal in closed form (Steck, WWW 2019).

    ``weight`` float32 [n_items, n_items]; a user's scores are the sum of the rows of the items they had.
    """

    kind: ClassVar[str] = "ease"

    def __init__(self, n_users: int, n_items: int, options: EaseOptions) -> None:
        super().__init__()
        self.n_users, self.n_items, self.options = n_users, n_items, options
        self.weight: Tensor
        self.register_buffer("weight", torch.zeros(n_items, n_items))

    @classmethod
    def fit(cls, train: Histories, options: EaseOptions) -> Ease:
        """Solve B = I - P diag(1/P) with P = (X'X + l2 I)^-1, in float64 (float32 loses the small weights)."""
        if train.n_items > _EASE_MAX_ITEMS:
            raise UserError(
                f"teacher: EASE needs an {train.n_items} x {train.n_items} matrix; "
                f"wanted at most {_EASE_MAX_ITEMS} items (use sasrec, lightgcn or ials)"
            )
        matrix = train.matrix().astype(np.float64)
        gram = (matrix.T @ matrix).toarray()
        gram[np.diag_indices(train.n_items)] += options.l2
        precision = np.linalg.inv(gram)
        weight = precision / -np.diag(precision)
        np.fill_diagonal(weight, 0.0)
        model = cls(train.n_users, train.n_items, options)
        model.weight.copy_(torch.from_numpy(weight.astype(np.float32)))
        return model

    def scores(self, users: Tensor, histories: Histories) -> Tensor:
        """Return X[users] @ weight, float32 [B, n_items]."""
        row, item = histories.rows(users.cpu().numpy())
        dense = torch.zeros(len(users), self.n_items, device=self.weight.device)
        dense[torch.from_numpy(row), torch.from_numpy(item)] = 1.0
        return dense @ self.weight


@dataclass(frozen=True)
class IalsOptions:
    """Hyperparameters of implicit-feedback ALS."""

    dimension: int = 32
    regularization: float = 0.1
    alpha: float = 1.0
    iterations: int = 15

    def __post_init__(self) -> None:
        at_least(self, dimension=1, iterations=1, regularization=0)
        above_zero(self, "alpha")


def fit_ials(train: Histories, options: IalsOptions, seed: int, threads: int = 0) -> MatrixFactorization:
    """Factorise implicit feedback by ALS (Hu, Koren and Volinsky, 2008) with the ``implicit`` library."""
    from implicit.cpu.als import AlternatingLeastSquares
    from threadpoolctl import threadpool_limits

    # implicit runs its own threads, one small solve each: BLAS threads inside them only get in the way
    with threadpool_limits(1, "blas"):
        model = AlternatingLeastSquares(
            factors=options.dimension,
            regularization=options.regularization,
            alpha=options.alpha,
            iterations=options.iterations,
            random_state=seed,
            num_threads=threads,
            calculate_training_loss=False,
        )
        model.fit(train.matrix(), show_progress=False)
    fitted = MatrixFactorization.from_vectors(
        torch.from_numpy(np.asarray(model.user_factors)), torch.from_numpy(np.asarray(model.item_factors))
    )
    fitted.name = f"ials-{options.dimension}"
    return fitted


@torch.no_grad()
def fit_svd(
    teacher: Recommender, histories: Histories, dimension: int, seed: int, block_users: int = 512
) -> MatrixFactorization:
    """Return the best rank-``dimension`` factors of a teacher's score matrix (Eckart and Young, 1936).

    A large matrix is never held: the Lanczos solver multiplies it block of users by block of users.
    """
    n_users, n_items = teacher.n_users, teacher.n_items

    def blocks() -> list[np.ndarray]:
        return [np.arange(start, min(start + block_users, n_users)) for start in range(0, n_users, block_users)]

    def block_scores(users: np.ndarray) -> np.ndarray:
        return teacher.scores(torch.from_numpy(users), histories).numpy().astype(np.float64)

    def multiply(vector: np.ndarray) -> np.ndarray:
        return np.concatenate([block_scores(users) @ vector for users in blocks()])

    def multiply_transposed(vector: np.ndarray) -> np.ndarray:
        total = np.zeros((n_items, *vector.shape[1:]))
        for users in blocks():
            total += block_scores(users).T @ vector[users]
        return total

    if n_users * n_items <= _SVD_HELD_CELLS:
        scores = np.concatenate([block_scores(users) for users in blocks()])
        operator = scipy.sparse.linalg.aslinearoperator(scores)
    else:
        operator = scipy.sparse.linalg.LinearOperator(
            (n_users, n_items),
            matvec=multiply,
            rmatvec=multiply_transposed,
            matmat=multiply,
            rmatmat=multiply_transposed,
            dtype=np.float64,
        )
    kept = min(dimension, n_users, n_items)
    if kept < min(n_users, n_items):
        start = np.random.default_rng(seed).standard_normal(min(n_users, n_items))
        left, values, right = scipy.sparse.linalg.svds(operator, k=kept, v0=start)
    else:  # Lanczos finds all but the last; what is asked beyond the rank stays zero
        left, values, right = np.linalg.svd(operator.matmat(np.eye(n_items)), full_matrices=False)
    root = np.sqrt(values)
    user, item = (np.pad(side * root, ((0, 0), (0, dimension - kept))) for side in (left, right.T))
    fitted = MatrixFactorization.from_vectors(
        torch.from_numpy(user.astype(np.float32)), torch.from_numpy(item.astype(np.float32))
    )
    fitted.name = f"svd-{dimension}"
    return fitted
