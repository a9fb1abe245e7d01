"""Fits acoustic models, and asks them: the student's validation, and what teachers say of the training utterances."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch
from torch import Tensor

from apps.speech.config import ModelConfig
from apps.speech.data.batches import neighbours, padded
from apps.speech.data.store import FeatureStore
from apps.speech.decode.greedy import greedy
from apps.speech.distill import Lessons, SpeechStep, Utterances
from apps.speech.features import SILENCE
from apps.speech.latency import ComputeTime
from apps.speech.models import AcousticModel, new_model
from apps.speech.models.attention import AttentionCtc
from apps.speech.models.base import StreamingModel, output_lengths
from apps.speech.units import Units
from kdcore.teaching import Taps, Term, keep_rounded, round_weights
from kdcore.trainer import Trainer
from kdcore.trainer_config import TrainerConfig


@dataclass
class Fitted:
    """A fitted model and what it took; the seconds include validation."""

    model: AcousticModel
    seconds: float
    cpu_seconds: float
    epochs: int = 0
    updates: int = 0
    # of the best epoch
    validation: Mapping[str, float] = field(default_factory=dict)


@torch.no_grad()
def ask(
    model: AcousticModel, features: Sequence[np.ndarray], *, layers: Sequence[str] = ()
) -> dict[str, list[np.ndarray]]:
    """Return ``log_probs`` float32 [T', C] of some utterances, and of each layer what ``width`` counts, [T', D]."""
    training = model.training
    model.eval()
    lengths = torch.tensor([len(each) for each in features])
    counts = output_lengths(lengths).tolist()
    with Taps(model, {layer: layer for layer in layers}) as taps:
        logits = model(*_given(model, features, lengths))
        kept = taps.take()
    model.train(training)
    values = {layer: value[..., : model.width(layer)] for layer, value in kept.items()}
    values["log_probs"] = torch.log_softmax(logits, 2)
    return {
        name: [row[:count].numpy() for row, count in zip(value.cpu(), counts, strict=True)]
        for name, value in values.items()
    }


def _given(model: AcousticModel, features: Sequence[np.ndarray], lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a model is asked with, where the model is: features [B, T, 80] and lengths int64 [B]."""
    device = model.head.weight.device
    return torch.from_numpy(padded(list(features), SILENCE)).to(device), lengths.to(device)


@torch.no_grad()
def attention_targets(
    model: AttentionCtc, features: Sequence[np.ndarray], texts: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """Return log q float32 [T', C] of some utterances' features along their texts, as ``AttentionCtc`` says."""
    lengths = torch.tensor([len(each) for each in features])
    with Taps(model, {"encoder": "encoder"}) as taps:
        model(*_given(model, features, lengths))
        encoded = taps.take()["encoder"]
    return [each.numpy() for each in model.frame_targets(encoded, output_lengths(lengths), texts)]


def all_log_probs(model: AcousticModel, store: FeatureStore) -> Iterator[tuple[int, np.ndarray]]:
    """Yield row and log-posteriors [T', C] of every utterance of a store, those of about one length together."""
    order = np.argsort(store.lengths, kind="stable")
    for places in neighbours(store.lengths[order], 0, len(order), count=len(order)):
        rows = order[places.start : places.stop].tolist()
        yield from zip(rows, ask(model, [store[row] for row in rows])["log_probs"], strict=True)


def streaming_seconds(model: StreamingModel, features: Sequence[np.ndarray]) -> float:
    """Return the seconds of one core that a model takes for utterances [T, 80], one by one, in its own chunks.

    One thread does it, as on a device: several would spin for each other in steps as small as these, and all of them
    are counted.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if len(features):
            # what happens at a first call only is no cost of streaming
            model.stream(torch.from_numpy(np.array(features[0][: 8 * model.chunk_frames])))
        with ComputeTime() as spent:
            for each in features:
                model.stream(torch.from_numpy(np.array(each)))
    finally:
        torch.set_num_threads(threads)
    return spent.seconds


def greedy_texts(model: AcousticModel, store: FeatureStore, units: Units) -> list[str]:
    """Return the best path's text of every utterance of a store."""
    texts = {row: units.decode(greedy(log_probs).ids) for row, log_probs in all_log_probs(model, store)}
    return [texts[row] for row in range(len(store))]


def validator(
    store: FeatureStore, references: Sequence[str], units: Units
) -> Callable[[AcousticModel], dict[str, float]]:
    """Return the measure of a model in training: word and character error rate of its best paths, 0..1 and above."""

    def measure(model: AcousticModel) -> dict[str, float]:
        heard = greedy_texts(model, store, units)
        return {"wer": jiwer.wer(list(references), heard), "cer": jiwer.cer(list(references), heard)}

    return measure


def with_ctc(config: TrainerConfig) -> TrainerConfig:
    """Return how a CTC model is trained where that is left open: torch has CTC for CUDA and CPUs, not for MPS."""
    if config.accelerator != "auto":
        return config
    return replace(config, accelerator="cuda" if torch.cuda.is_available() else "cpu")


def fit_model(
    config: ModelConfig,
    data: Utterances,
    statistics: tuple[np.ndarray, np.ndarray],
    validate: Callable[[AcousticModel], dict[str, float]],
    units: Units,
    *,
    seed: int,
    folder: Path | None = None,
    key: str = "",
    context: Mapping[str, Any] | None = None,
    terms: Callable[[AcousticModel], Sequence[Term]] = lambda model: (),
    lessons: Lessons | None = None,
    layers: Sequence[str] = (),
    labels: float = 1.0,
    which: str = "",
) -> Fitted:
    """Fit one model on its training rows; selection is by ``validate``, never on test.

    Args:
        statistics: mean and deviation of the features, of training data.
        terms: what is taught beside the labels, given the student; ``lessons`` hold what they ask for.
        layers: the terms are given the student's layers as ``student.LAYER``.
        labels: the weight of the labels.
        which: what tells the model from its likes in the log, behind its label.
    """
    started = time.perf_counter(), time.process_time()
    torch.manual_seed(seed)
    model = new_model(config.kind, units.blank + 1, config.options)
    model.set_statistics(*(torch.from_numpy(each) for each in statistics))
    rounded = config.quantize == "int8" and round_weights(model, active=False) > 0
    step = SpeechStep(
        model,
        data,
        validate,
        epochs=config.trainer.max_epochs,
        terms=[*model.own_terms(), *terms(model)],
        optimization=config.optimization,
        augment=config.augment,
        lessons=lessons,
        taps={layer: layer for layer in (*layers, *model.own_layers())},
        labels=labels,
        rounded_from=math.ceil(config.quantize_from * config.trainer.max_epochs) if rounded else None,
    )
    named = {**(context or {}), "model": f"{model.label()}{which}"}
    description = f"{named.get('role', '')} {named['model']}".strip()
    trainer = Trainer(
        with_ctc(config.trainer), seed=seed, folder=folder, key=key, context=named, description=description
    )
    result = trainer.fit(step)
    # wherever it was trained: it is stored, and measured on what it is made for
    model.cpu()
    if rounded:
        keep_rounded(model)
    seconds = max(time.perf_counter() - started[0], result.seconds)
    cpu_seconds = max(time.process_time() - started[1], result.cpu_seconds)
    return Fitted(model.eval(), seconds, cpu_seconds, result.epochs, result.steps, result.best_metrics)
