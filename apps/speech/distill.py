"""The teaching step of CTC models: utterances in buckets, hidden stretches, and a weighted sum of terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from apps.speech.augment import Augment
from apps.speech.data.batches import bucketed, padded
from apps.speech.data.store import FeatureStore
from apps.speech.features import SILENCE
from apps.speech.models.base import AcousticModel, output_lengths
from kdcore.losses.contract import Reduction
from kdcore.teaching import Taps, Term, set_rounding
from kdcore.teaching.terms import Terms
from kdcore.trainer import Batch, TeachingStep


@dataclass(frozen=True)
class Optimization:
    """How weights move: AdamW under a learning rate that rises, then falls as a cosine to a share of its peak."""

    learning_rate: float = 2e-3
    # of all updates: those in which the rate rises from 0
    warm_up: float = 0.05
    # the rate at the end, as a share of the peak
    final: float = 0.01
    weight_decay: float = 1e-4
    # feature frames (10 ms) a batch, padding included
    batch_frames: int = 6000

    def __post_init__(self) -> None:
        if not self.learning_rate > 0 or not 0 <= self.warm_up < 1 or not 0 <= self.final <= 1:
            raise ValueError(f"optimization: wanted learning_rate > 0, warm_up and final shares, got {self}")
        if self.batch_frames < 1 or not self.weight_decay >= 0:
            raise ValueError(f"optimization: wanted batch_frames >= 1 and weight_decay >= 0, got {self}")

    def rate(self, progress: float) -> float:
        """Return the learning rate at a share of training, 0..1."""
        if progress < self.warm_up:
            return self.learning_rate * progress / self.warm_up
        share = (progress - self.warm_up) / (1 - self.warm_up)
        return self.learning_rate * (self.final + (1 - self.final) * (1 + math.cos(math.pi * share)) / 2)


class Lessons(Protocol):
    """What a teacher says of utterances: tensors by name, first axis the rows, that terms may ask for."""

    def of(self, rows: np.ndarray, views: np.ndarray, frames: int) -> dict[str, Tensor]:
        """Return the values of rows, each in its view; what is given a frame has ``frames`` of them, padded by 0."""
        ...


@dataclass(frozen=True)
class Utterances:
    """What a model is trained on: features of each view, and labels; a row without a text has no labels.

    ``views`` are of the same utterances in the same order; each epoch hears one view of each, drawn at random.
    """

    views: Sequence[FeatureStore]
    # symbols of every utterance, None where there is no text
    labels: Sequence[Sequence[int] | None]
    # rows that are trained on (others are impossible, or bad)
    rows: np.ndarray

    def labelled(self) -> bool:
        """Return whether any row has a text."""
        return any(self.labels[row] is not None for row in self.rows)

    def with_texts(self, *, as_long: bool = False) -> Utterances:
        """Return the rows with a text; ``as_long`` repeats them evenly to the frames of all, for as many updates."""
        known = self.rows[[self.labels[row] is not None for row in self.rows]]
        if as_long and 0 < len(known) < len(self.rows):
            lengths = self.views[0].lengths
            count = round(len(known) * float(lengths[self.rows].sum() / lengths[known].sum()))
            known = known[np.arange(count) * len(known) // count]
        return replace(self, rows=known)


def ctc(
    student: Tensor,
    lengths: Tensor,
    labels: Tensor,
    label_lengths: Tensor,
    *,
    mask: Tensor,
    blank: int,
    reduction: Reduction = "mean",
) -> Tensor:
    """Return -log P(labels) of the rows of ``mask``, by CTC (Graves et al., 2006).

    Shapes: student logits [B, T, C]; lengths int64 [B]; labels int64 [B, U]; label_lengths int64 [B]; mask bool [B].
    """
    if not bool(mask.any()):
        return student.sum() * 0.0
    log_probs = torch.log_softmax(student[mask].float(), 2).transpose(0, 1)
    value = F.ctc_loss(
        log_probs, labels[mask], lengths[mask], label_lengths[mask], blank=blank, reduction="sum", zero_infinity=True
    )
    return value / int(mask.sum()) if reduction == "mean" else value


class SpeechStep(TeachingStep):
    """Teach a student on utterances: CTC on the labels beside terms on what a teacher says.

    Terms see: ``student`` (logits), ``lengths`` (frames of logits), ``labels``, ``label_lengths``, ``mask`` (labelled
    rows), ``student.NAME`` of the taps, and whatever ``lessons`` give.
    """

    def __init__(
        self,
        student: AcousticModel,
        data: Utterances,
        validate: Callable[[AcousticModel], dict[str, float]],
        *,
        epochs: int,
        terms: Sequence[Term] = (),
        optimization: Optimization | None = None,
        augment: Augment | None = None,
        lessons: Lessons | None = None,
        taps: Mapping[str, str] | None = None,
        labels: float = 1.0,
        rounded_from: int | None = None,
    ) -> None:
        super().__init__()
        if not len(data.rows):
            raise ValueError("data: wanted at least one utterance")
        self.student: AcousticModel = student
        self.data, self.validator, self.epochs = data, validate, epochs
        self.optimization = optimization or Optimization()
        self.augment, self.lessons, self.taps = augment, lessons, dict(taps or {})
        own = Term("ctc", ctc, {"mask": "mask"}, {"blank": student.classes - 1}, labels)
        self.terms = Terms([*([own] if data.labelled() else []), *terms])
        # the epoch from which training feels int8 weights; None: never
        self.rounded_from = rounded_from
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def weights(self) -> Mapping[str, float]:  # type: ignore[override]
        """The weights of the terms in this epoch."""
        return self.terms.weights

    def optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW over the student and the losses that have parameters."""
        self._optimizer = torch.optim.AdamW(
            [p for p in self.parameters() if p.requires_grad],
            lr=self.optimization.learning_rate,
            weight_decay=self.optimization.weight_decay,
        )
        return self._optimizer

    def begin_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Set the weights of the terms, and whether the student's are rounded."""
        self.terms.begin_epoch(epoch)
        if self.rounded_from is not None and epoch >= self.rounded_from:
            set_rounding(self.student, True)

    def batch_count(self) -> int:
        """Return the number of batches of the first epoch; views of other lengths move it a little."""
        return len(self._plan(torch.Generator().manual_seed(0))[0])

    def _plan(self, generator: torch.Generator) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the batches of an epoch, rows of ``data.rows``, and the view of each."""
        rows = self.data.rows
        views = torch.randint(len(self.data.views), (len(rows),), generator=generator).numpy()
        lengths = np.stack([store.lengths[rows] for store in self.data.views])[views, np.arange(len(rows))]
        return bucketed(lengths, self.optimization.batch_frames, generator), views

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yield batches of utterances of about one length, each in a view of its own; move the learning rate."""
        batches, views = self._plan(generator)
        for number, places in enumerate(batches):
            rate = self.optimization.rate((epoch + (number + 0.5) / len(batches)) / self.epochs)
            for group in self._optimizer.param_groups if self._optimizer is not None else ():
                group["lr"] = rate
            yield self._batch(self.data.rows[places], views[places])

    def _batch(self, rows: np.ndarray, views: np.ndarray) -> Batch:
        given = [self.data.views[view][row] for row, view in zip(rows, views, strict=True)]
        labels = [np.array(self.data.labels[row] or [], np.int64) for row in rows]
        batch = {
            "features": torch.from_numpy(padded(given, SILENCE)),
            "feature_lengths": torch.tensor([len(each) for each in given]),
            "labels": torch.from_numpy(padded(labels)),
            "label_lengths": torch.tensor([len(each) for each in labels]),
            "mask": torch.tensor([self.data.labels[row] is not None for row in rows]),
        }
        batch["lengths"] = output_lengths(batch["feature_lengths"])
        if self.lessons is not None:
            batch |= self.lessons.of(rows, views, int(batch["lengths"].max()))
        return batch

    def shard(self, batch: Batch, rank: int, world_size: int) -> Batch:
        """Return the utterances that a process hears; where there are too few, one that counts for nothing."""
        share = super().shard(batch, rank, world_size)
        if len(share["features"]):
            return share
        # every process has gradients to give, and no network hears no utterance
        return {**{name: rows[:1] for name, rows in batch.items()}, "unheard": torch.ones(1)}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Return the utterances each term sums over."""
        return self.terms.counts(batch, len(batch["features"]))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the sum of every term over the utterances."""
        features, lengths = batch["features"], batch["feature_lengths"]
        if self.augment is not None and self.training:
            features = self.augment(features, lengths, self.student.mean)
        with Taps(self.student, self.taps) if self.taps else nullcontext() as taps:
            logits = self.student(features, lengths)
            tapped = {f"student.{name}": value for name, value in taps.take().items()} if taps is not None else {}
        values = dict(self.terms({**batch, "student": logits, **tapped}))
        return {name: 0.0 * value for name, value in values.items()} if "unheard" in batch else values

    def validate(self) -> dict[str, float]:
        """Return the validation metrics of the student."""
        return self.validator(self.student)
