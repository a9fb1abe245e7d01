"""Models that are a vector per user and per item: matrix factorisation and the graph convolution above it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from apps.recsys.data.histories import Histories
from apps.recsys.models.base import DotRecommender, Encoded


@dataclass(frozen=True)
class MatrixFactorizationOptions:
    """Size of a matrix factorisation."""

    dimension: int = 8
    # a learned popularity per item, which small dimensions would otherwise spend a coordinate on
    bias: bool = True
    # standard deviation of the initial vectors
    scale: float = 0.1


class MatrixFactorization(DotRecommender):
    """score(u, i) = <p_u, q_i> + b_i (Koren, Bell and Volinsky, 2009)."""

    kind: ClassVar[str] = "mf"

    def __init__(self, n_users: int, n_items: int, options: MatrixFactorizationOptions) -> None:
        super().__init__()
        self.n_users, self.n_items, self.options = n_users, n_items, options
        self.user = nn.Parameter(torch.randn(n_users, options.dimension) * options.scale)
        self.item = nn.Parameter(torch.randn(n_items, options.dimension) * options.scale)
        self.bias = nn.Parameter(torch.zeros(n_items)) if options.bias else None

    @classmethod
    def from_vectors(cls, user: Tensor, item: Tensor, bias: Tensor | None = None) -> MatrixFactorization:
        """Return a model with the given vectors: user [n_users, D], item [n_items, D], bias [n_items]."""
        options = MatrixFactorizationOptions(dimension=user.shape[1], bias=bias is not None)
        model = cls(len(user), len(item), options)
        with torch.no_grad():
            model.user.copy_(user)
            model.item.copy_(item)
            if model.bias is not None and bias is not None:
                model.bias.copy_(bias)
        return model

    def encode(self) -> Encoded:
        """Return the parameters themselves."""
        return Encoded(self.user, self.item, self.bias)

    def user_vectors(self, users: Tensor, histories: Histories) -> Tensor:
        """Return p_u, float32 [B, D]."""
        return self.user[users]

    def item_vectors(self) -> Tensor:
        """Return q, float32 [n_items, D]."""
        return self.item

    def item_bias(self) -> Tensor | None:
        """Return b, float32 [n_items], or None."""
        return self.bias


@dataclass(frozen=True)
class LightGCNOptions:
    """Size of a LightGCN."""

    dimension: int = 64
    layers: int = 3
    scale: float = 0.1


class LightGCN(DotRecommender):
    """Mean of linear propagations of one embedding table over the interaction graph (He et al., SIGIR 2020).

    Only training needs the graph; ``finalize`` returns the propagated vectors as a matrix factorisation.
    """

    kind: ClassVar[str] = "lightgcn"

    def __init__(self, train: Histories, options: LightGCNOptions) -> None:
        super().__init__()
        self.n_users, self.n_items, self.options = train.n_users, train.n_items, options
        self.embedding = nn.Parameter(torch.randn(self.n_users + self.n_items, options.dimension) * options.scale)
        # the two halves of the symmetric normalised adjacency: users from items, items from users
        matrix = train.matrix()
        degrees = [torch.from_numpy(matrix.getnnz(axis=axis).astype("float32")).clamp(min=1) for axis in (1, 0)]
        self._to_user = _normalised(matrix.tocsr(), degrees[0], degrees[1])
        self._to_item = _normalised(matrix.T.tocsr(), degrees[1], degrees[0])

    def encode(self) -> Encoded:
        """Return the propagated vectors, averaged over 0..layers hops."""
        user, item = self.embedding[: self.n_users], self.embedding[self.n_users :]
        users, items = user, item
        for _ in range(self.options.layers):
            user, item = _Propagate.apply(item, user, self._to_user, self._to_item)
            users, items = users + user, items + item
        count = self.options.layers + 1
        return Encoded(users / count, items / count, None)

    @torch.no_grad()
    def finalize(self) -> MatrixFactorization:
        """Return the propagated vectors as a model that needs no graph."""
        encoded = self.encode()
        model = MatrixFactorization.from_vectors(encoded.user, encoded.item)
        model.name = self.label()
        return model

    def user_vectors(self, users: Tensor, histories: Histories) -> Tensor:
        """Return propagated user vectors, float32 [B, D]; ``finalize`` first where many blocks are scored."""
        return self.encode().user[users]

    def item_vectors(self) -> Tensor:
        """Return propagated item vectors, float32 [n_items, D]."""
        return self.encode().item


def _normalised(matrix: object, row_degree: Tensor, column_degree: Tensor) -> Tensor:
    """Return D_row^-1/2 A D_column^-1/2 as a torch CSR tensor."""
    indptr = torch.from_numpy(matrix.indptr.astype("int64"))  # type: ignore[attr-defined]
    indices = torch.from_numpy(matrix.indices.astype("int64"))  # type: ignore[attr-defined]
    row = torch.repeat_interleave(torch.arange(len(indptr) - 1), indptr.diff())
    values = (row_degree[row] * column_degree[indices]).rsqrt()
    return torch.sparse_csr_tensor(indptr, indices, values, size=matrix.shape)  # type: ignore[attr-defined]


class _Propagate(torch.autograd.Function):
    """One hop in both directions; the adjacency is symmetric, so the gradient is the hop itself.

    Autograd's own rule for sparse-times-dense transposes the matrix at every step, which costs more than the product.
    """

    @staticmethod
    def forward(ctx: object, item: Tensor, user: Tensor, to_user: Tensor, to_item: Tensor) -> tuple[Tensor, Tensor]:
        ctx.matrices = (to_user, to_item)  # type: ignore[attr-defined]
        return to_user @ item, to_item @ user

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        to_user, to_item = ctx.matrices  # type: ignore[attr-defined]
        user_gradient, item_gradient = gradients
        return to_item @ user_gradient.contiguous(), to_user @ item_gradient.contiguous(), None, None
