"""Teaching steps of the recommender: factor models from interactions, sequential models from histories."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from apps.recsys.data.histories import Histories
from apps.recsys.evaluate import Evaluator
from apps.recsys.knowledge import Knowledge, Score
from apps.recsys.models.base import DotRecommender, Encoded, Recommender, gather_rows
from apps.recsys.models.factors import LightGCN
from apps.recsys.models.kernels import LinearScore, linear_cross_entropy
from apps.recsys.models.sasrec import Sasrec, gather_windows
from apps.recsys.sampling import Membership, sample_unseen
from kdcore.config import UserError
from kdcore.losses import ranking
from kdcore.trainer import Batch, TeachingStep, iterate_rows

# scores of a chunk of positions, 2 MB of float32: what a core's cache holds
_CHUNK_SCORES = 1 << 19

# interactions whose negatives are drawn in one go
_DRAWN_TOGETHER = 1 << 16


@dataclass(frozen=True)
class Optimization:
    """How the weights of one model are found; tuned on validation for every model alike."""

    # bpr or bce for factor models, cross_entropy for sequential ones
    loss: str = "bpr"
    # interactions (factor models) or histories (sequential models) of a batch
    batch_size: int = 1024
    learning_rate: float = 1e-3
    # Adam's own l2 term (of Adam, not AdamW), as the published recommenders use it
    weight_decay: float = 0.0
    # unseen items drawn for each interaction
    negatives: int = 1

    def __post_init__(self) -> None:
        if self.loss not in ("bpr", "bce", "cross_entropy"):
            raise ValueError(f"loss: got {self.loss!r}, wanted 'bpr', 'bce' or 'cross_entropy'")
        for name in ("batch_size", "negatives"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted at least 1")
        if not self.learning_rate > 0 or self.weight_decay < 0:
            raise ValueError("learning_rate and weight_decay: wanted above 0, and 0 or more")


class RecommenderStep(TeachingStep):
    """What factor and sequential steps share: the optimiser, validation and the knowledge's terms."""

    def __init__(
        self,
        student: DotRecommender,
        train: Histories,
        evaluator: Evaluator,
        optimization: Optimization,
        knowledge: Mapping[str, tuple[float, Knowledge]],
        max_epochs: int,
    ) -> None:
        super().__init__()
        self.student = student
        self.train_histories, self.evaluator, self.optimization = train, evaluator, optimization
        self.max_epochs = max_epochs
        self.knowledge = nn.ModuleDict({name: module for name, (_, module) in knowledge.items()})
        self.weights = {optimization.loss: 1.0, **{name: weight for name, (weight, _) in knowledge.items()}}

    def optimizer(self) -> torch.optim.Optimizer:
        """Return Adam over student and knowledge (experts)."""
        options = self.optimization
        return torch.optim.Adam(
            self.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
        )

    def begin_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Let every knowledge refresh itself."""
        for module in self._knowledge():
            module.begin_epoch(epoch, self.max_epochs, self._student(), generator)

    def _student(self) -> DotRecommender:
        return self.student  # type: ignore[return-value]

    def _knowledge(self) -> list[Knowledge]:
        return list(self.knowledge.values())  # type: ignore[arg-type]

    def _draw(self, generator: torch.Generator) -> torch.Generator:
        """Draw every knowledge's lists of the epoch and return the generator of what it draws later.

        It is one of its own, so that the base loss sees the same batches in the same order with and without a teacher.
        """
        own = torch.Generator().manual_seed(int(torch.randint(1 << 62, (1,), generator=generator)))
        for module in self._knowledge():
            module.draw(own)
        return own

    def _prepare(self, batch: Batch, queries: Tensor, items: Tensor, generator: torch.Generator) -> Batch:
        """Add each knowledge's tensors under its name, with the queries it sums over."""
        for module in self._knowledge():
            asked = items if module.items_ask else queries
            batch[f"{module.name}.queries"] = asked
            for name, rows in module.prepare(asked, generator).items():
                batch[f"{module.name}.{name}"] = rows
        return batch

    def _taught(self, batch: Batch, score: Score, encoded: Encoded | None) -> dict[str, Tensor]:
        terms = {}
        for module in self._knowledge():
            prefix = f"{module.name}."
            own = {name.removeprefix(prefix): rows for name, rows in batch.items() if name.startswith(prefix)}
            terms[module.name] = module.loss(own, own["queries"], score, encoded)
        return terms

    def validate(self) -> dict[str, float]:
        """Return the validation metrics of the student."""
        model: Recommender = self._student()
        if isinstance(model, LightGCN):
            model = model.finalize()
        return self.evaluator(model).values


class InteractionStep(RecommenderStep):
    """Learns from (user, item) interactions against unseen items, and from the teacher for the users in the batch.

    Every interaction is visited once an epoch, in random order; negatives are drawn afresh.
    """

    def __init__(
        self,
        student: DotRecommender,
        train: Histories,
        evaluator: Evaluator,
        optimization: Optimization,
        knowledge: Mapping[str, tuple[float, Knowledge]] | None = None,
        max_epochs: int = 1,
    ) -> None:
        super().__init__(student, train, evaluator, optimization, knowledge or {}, max_epochs)
        self.users = torch.from_numpy(train.users().astype(np.int64))
        self.items = torch.from_numpy(train.items.astype(np.int64))
        self.seen = Membership(train)

    def batch_count(self) -> int:
        """Return the number of batches of an epoch."""
        return math.ceil(len(self.users) / self.optimization.batch_size)

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yield pairs with their negatives, and what the knowledge asks of their users."""
        own = self._draw(generator)
        order = torch.randperm(len(self.users), generator=generator)
        size = self.optimization.batch_size
        # negatives of many batches are drawn at once: rejection takes several rounds however few rows there are
        for rows in iterate_rows(order, max(_DRAWN_TOGETHER // size, 1) * size):
            users, positives = self.users[rows], self.items[rows]
            negatives = sample_unseen(self.seen, users, self.optimization.negatives, generator)
            for user, positive, negative in zip(
                users.split(size), positives.split(size), negatives.split(size), strict=True
            ):
                batch = {"user": user, "positive": positive, "negative": negative}
                if len(self.knowledge):
                    asked = torch.cat([positive, negative.flatten()]).unique()
                    self._prepare(batch, user.unique(), asked, own)
                yield batch

    def counts(self, batch: Batch) -> dict[str, int]:
        """Return pairs for the base loss, queries for each knowledge."""
        own = {module.name: len(batch[f"{module.name}.queries"]) for module in self._knowledge()}
        return {self.optimization.loss: len(batch["user"]), **own}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the summed base loss and the summed loss of each knowledge."""
        encoded = self._student().encode()
        # one gather of users and one of items: the gradients of gathers are most of a step of a factor model
        scores = encoded.lists(batch["user"], torch.cat([batch["positive"][:, None], batch["negative"]], dim=1))
        if self.optimization.loss == "bce":
            labels = torch.zeros_like(scores)
            labels[:, 0] = 1.0
            base = ranking.pointwise_bce(scores, labels, reduction="sum")
        else:
            negative = scores[:, 1:]
            wide = scores[:, :1].expand_as(negative)
            base = ranking.bpr(wide.flatten(), negative.flatten(), reduction="sum") / negative.shape[1]

        def score(queries: Tensor, items: Tensor | None = None) -> Tensor:
            return encoded.everything(queries) if items is None else encoded.lists(queries, items)

        return {self.optimization.loss: base, **self._taught(batch, score, encoded)}


class SequenceStep(RecommenderStep):
    """Learns the next item at every position of every history, with cross-entropy over all items.

    A history longer than the model reads is cut into windows; where the cuts fall moves from epoch to epoch, so that
    every item is predicted from contexts of different lengths.
    """

    def __init__(
        self,
        student: Sasrec,
        train: Histories,
        evaluator: Evaluator,
        optimization: Optimization,
        knowledge: Mapping[str, tuple[float, Knowledge]] | None = None,
        max_epochs: int = 1,
    ) -> None:
        super().__init__(student, train, evaluator, optimization, knowledge or {}, max_epochs)
        self.length = student.options.length
        counts = train.counts()
        self.positions = int(np.maximum(counts - 1, 0).sum())
        self.windows = int(np.ceil(np.maximum(counts - 1, 0) / self.length).sum())
        if not self.positions:
            raise UserError("train: no user has two items in a row, from which a sequential model could learn")

    def batch_count(self) -> int:
        """Return the number of batches of an epoch (a moving cut may add a few windows)."""
        return math.ceil(self.windows / self.optimization.batch_size)

    def _cut(self, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return start (into items) and length (inputs and last target: 2..length + 1) of every window."""
        train, length = self.train_histories, self.length
        first, targets = train.indptr[:-1], np.maximum(train.counts() - 1, 0)
        # the first window of a long history has 1..length targets, all later ones `length`
        shift = torch.randint(length, (train.n_users,), generator=generator).numpy()
        head = np.where(targets > length, length - shift, np.minimum(targets, length))
        pieces = np.where(targets > 0, 1 + np.ceil(np.maximum(targets - head, 0) / length), 0).astype(np.int64)
        user = np.repeat(np.arange(train.n_users), pieces)
        index = np.arange(len(user)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        begin = np.where(index == 0, 0, head[user] + (index - 1) * length)
        end = np.minimum(head[user] + index * length, targets[user])
        return first[user] + begin, end - begin + 1

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yield windows of similar length together, in random order: less padding, the same epoch."""
        own = self._draw(generator)
        start, lengths = self._cut(generator)
        noise = torch.rand(len(start), generator=generator).numpy()
        order = np.lexsort((noise, lengths))
        batches = np.array_split(order, max(1, math.ceil(len(order) / self.optimization.batch_size)))
        for index in torch.randperm(len(batches), generator=generator).tolist():
            rows = batches[index]
            windows, _ = gather_windows(self.train_histories, start[rows], lengths[rows])
            batch = {"windows": torch.from_numpy(windows)}
            if len(self.knowledge):
                # a query is the place in the training log of the last item its answer may know
                places = start[rows][:, None] + np.arange(windows.shape[1] - 1)
                queries = torch.from_numpy(places)[self._valid(batch)]
                self._prepare(batch, queries, queries, own)
            yield batch

    def _valid(self, batch: Batch) -> Tensor:
        """Return which positions have a target, bool [B, T - 1]."""
        return batch["windows"][:, 1:] < self.train_histories.n_items

    def shard(self, batch: Batch, rank: int, world_size: int) -> Batch:
        """Give every process whole windows, and the queries of their positions."""
        valid = self._valid(batch)
        mine = torch.zeros_like(valid)
        mine[rank::world_size] = True
        own = {name: rows[mine[valid]] for name, rows in batch.items() if name != "windows"}
        return {"windows": batch["windows"][rank::world_size], **own}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Return the predicted positions, the same for every term."""
        return dict.fromkeys(self.weights, int(self._valid(batch).sum()))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the summed cross-entropy of the next item and the summed loss of each knowledge."""
        student: Sasrec = self.student  # type: ignore[assignment]
        valid = self._valid(batch)
        hidden = student.hidden(batch["windows"][:, :-1])
        hidden = gather_rows(hidden.flatten(0, 1), valid.flatten().nonzero()[:, 0])
        targets = batch["windows"][:, 1:][valid]
        base = linear_cross_entropy(hidden, student.item_vectors(), targets)
        score = LinearScore(hidden, student.item_vectors())
        return {self.optimization.loss: base, **self._taught(batch, score, None)}
