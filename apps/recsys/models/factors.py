"""Models that are a vector per user and per item: matrix factorisation and the graph convolution above it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from apps.recsys.data.histories import Histories
from apps.recsys.models.base import DotRecommender, Encoded
from apps.recsys.models.options import above_zero, at_least


@dataclass(frozen=True)
class MatrixFactorizationOptions:
    """Size of a matrix factorisation."""

    dimension: int = 8
    # a learned popularity per item, which small dimensions would otherwise spend a coordinate on
    bias: bool = True
    # standard deviation of the initial vectors
    scale: float = 0.1

    def __post_init__(self) -> None:
        at_least(self, dimension=1)
        above_zero(self, "scale")


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

    def __post_init__(self) -> None:
        at_least(self, dimension=1, layers=0)
        above_zero(self, "scale")


class LightGCN(DotRecommender):
    """Mean of linear propagations of one embedding table over the interaction graph (He et al., SIGIR 2020).

    Only training needs the graph; ``finalize`` returns the propagated vectors as a matrix factorisation.
    """

    kind: ClassVar[str] = "lightgcn"

    def __init__(self, train: Histories, options: LightGCNOptions) -> None:
        super().__init__()
        self.n_users, self.n_items, self.options = train.n_users, train.n_items, options
        self.embedding = nn.Parameter(torch.randn(self.n_users + self.n_items, options.dimension) * options.scale)
        self._adjacency = _normalised_adjacency(train)

    def encode(self) -> Encoded:
        """Return the propagated vectors, averaged over 0..layers hops."""
        if self._adjacency.device != self.embedding.device:
            self._adjacency = self._adjacency.to(self.embedding.device)
        user, item = _Propagate.apply(self.embedding, self._adjacency, self.options.layers).split(
            [self.n_users, self.n_items]
        )
        return Encoded(user, item, None)

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


def _normalised_adjacency(train: Histories) -> Tensor:
    """Return D^-1/2 A D^-1/2 of the graph of users and items, float32 CSR [n_users + n_items] squared, symmetric."""
    pairs = train.matrix()
    degree = [np.maximum(pairs.getnnz(axis=axis), 1).astype(np.float32) for axis in (1, 0)]
    scaled = sparse.diags_array(degree[0] ** -0.5) @ pairs @ sparse.diags_array(degree[1] ** -0.5)
    matrix = sparse.block_array([[None, scaled], [scaled.T, None]], format="csr", dtype=np.float32)
    # scipy keeps 32-bit indices where they suffice, which the product wants: it would convert 64-bit ones each time
    indptr, indices, data = (torch.from_numpy(part) for part in (matrix.indptr, matrix.indices, matrix.data))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(indptr, indices, data, size=matrix.shape, check_invariants=True)


class _Propagate(torch.autograd.Function):
    """The mean over 0..layers hops, as a polynomial of the adjacency in Horner's form: one product a hop.

    The polynomial of a symmetric matrix is symmetric, so the gradient is the same propagation again. Autograd's own
    rule for sparse-times-dense transposes the matrix at every step, which costs more than the product.
    """

    @staticmethod
    def forward(ctx: object, embedding: Tensor, adjacency: Tensor, layers: int) -> Tensor:
        ctx.graph = (adjacency, layers)  # type: ignore[attr-defined]
        return _propagate(embedding, adjacency, layers)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _propagate(gradients[0].contiguous(), *ctx.graph), None, None  # type: ignore[attr-defined]


def _propagate(vectors: Tensor, adjacency: Tensor, layers: int) -> Tensor:
    """Return (E + A (E + A (...))) / (layers + 1) for vectors E [n, D]."""
    total = vectors
    for _ in range(layers):
        total = torch.addmm(vectors, adjacency, total)
    return total / (layers + 1)
