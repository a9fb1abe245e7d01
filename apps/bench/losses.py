"""How fast the losses are: forward and backward on one thread, beside the libraries people use now.

A peer is timed if it can be imported (torchdistill from PyPI; RepDistiller's ``distiller_zoo`` and ``mdistiller`` from
their repositories on PYTHONPATH), else it is skipped with a word. All take turns in one process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kdcore import losses

Once = Callable[[], Tensor]
BATCH, CLASSES, WIDTH, TEMPERATURE = 256, 1000, 512, 4.0
# CRD as its authors set it for CIFAR-100, but a quarter of the negatives: two banks of 50,000 x 128
SAMPLES, NEGATIVES, CONTRAST_WIDTH = 50_000, 4096, 128
REPEATS = 21


@dataclass(frozen=True)
class Case:
    """One loss, what peers call the same, and the largest share of the fastest peer's time that is promised."""

    name: str
    target: float
    ours: Once
    peers: dict[str, Callable[[], Once]]
    # what receives the gradient
    student: Tensor


def measure(repeats: int = REPEATS) -> dict[str, Any]:
    """Time every loss and every peer at hand; return rows of median milliseconds, and what was skipped."""
    rows, skipped = [], {}
    with _one_thread():
        for case in _cases():
            runs: dict[str, Once] = {"kdsuite": case.ours}
            for peer, make in case.peers.items():
                try:
                    runs[peer] = make()
                except ImportError as error:
                    skipped[peer] = f"not installed ({error})"
            medians = _take_turns(runs, case.student, repeats)
            others = {name: value for name, value in medians.items() if name != "kdsuite"}
            ratio = medians["kdsuite"] / min(others.values()) if others else None
            rows.append({"loss": case.name, "ms": medians, "ratio": ratio, "target": case.target})
    sizes = {"batch": BATCH, "classes": CLASSES, "features": WIDTH, "repeats": repeats, "negatives": NEGATIVES}
    return {"rows": rows, "skipped": skipped, "sizes": sizes}


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _take_turns(runs: dict[str, Once], student: Tensor, repeats: int) -> dict[str, float]:
    """Return the median milliseconds of forward and backward of each; they alternate, to meet the same load."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            student.grad = None
            start = time.perf_counter()
            run().backward()
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) * 1e3 for name, values in seconds.items()}


def _peer(module: str, use: Callable[[ModuleType], Once]) -> Callable[[], Once]:
    return lambda: use(import_module(module))


_TORCHDISTILL = "torchdistill.losses.mid_level"


def _paths(student: Tensor, teacher: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what torchdistill's losses read: outputs by module path."""
    return {"x": {"output": student}}, {"x": {"output": teacher}}


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(BATCH, CLASSES, generator=generator).requires_grad_()
    said = torch.randn(BATCH, CLASSES, generator=generator)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    features = torch.randn(BATCH, WIDTH, generator=generator).requires_grad_()
    taught = torch.randn(BATCH, WIDTH, generator=generator)
    yield from _response_cases(logits, said, labels)
    yield from _relation_cases(features, taught)
    yield _contrast_case(generator)


def _response_cases(logits: Tensor, said: Tensor, labels: Tensor) -> Iterator[Case]:
    t = TEMPERATURE

    def torchdistill_kd(module: ModuleType) -> Once:
        loss = module.KDLoss("x", "output", "x", "output", temperature=t, alpha=0.0, beta=1.0)
        given = _paths(logits, said)
        return lambda: loss(*given)

    yield Case(
        "soft_targets",
        0.6,
        lambda: losses.soft_targets(logits, said, temperature=t),
        {
            "torchdistill": _peer(_TORCHDISTILL, torchdistill_kd),
            "RepDistiller": _peer("distiller_zoo", lambda m: lambda: m.DistillKL(t)(logits, said)),
            "mdistiller": _peer("mdistiller.distillers.KD", lambda m: lambda: m.kd_loss(logits, said, t)),
        },
        logits,
    )
    yield Case(
        "decoupled",
        0.7,
        lambda: losses.decoupled(logits, said, labels, alpha=1.0, beta=8.0, temperature=t),
        {"mdistiller": _peer("mdistiller.distillers.DKD", lambda m: lambda: m.dkd_loss(logits, said, labels, 1, 8, t))},
        logits,
    )


def _relation_cases(features: Tensor, taught: Tensor) -> Iterator[Case]:
    given = _paths(features, taught)

    def torchdistill_of(name: str, *args: Any, **kwargs: Any) -> Callable[[], Once]:
        def use(module: ModuleType) -> Once:
            loss = getattr(module, name)(*args, **kwargs)
            return lambda: loss(*given)

        return _peer(_TORCHDISTILL, use)

    yield Case(
        "distance_relations + angle_relations",
        0.08,
        lambda: losses.distance_relations(features, taught) + 2 * losses.angle_relations(features, taught),
        {
            "torchdistill": torchdistill_of("RKDLoss", "x", "x", dist_factor=1.0, angle_factor=2.0, reduction="mean"),
            "RepDistiller": _peer("distiller_zoo", lambda m: lambda: m.RKDLoss(1, 2)(features, taught)),
        },
        features,
    )
    yield Case(
        "similarity_preserving",
        1.0,
        lambda: losses.similarity_preserving(features, taught),
        {
            "torchdistill": torchdistill_of("SPKDLoss", "x", "x", reduction="batchmean"),
            "RepDistiller": _peer("distiller_zoo", lambda m: lambda: m.Similarity()([features], [taught])[0].sum()),
        },
        features,
    )
    yield Case(
        "probabilistic_transfer",
        1.0,
        lambda: losses.probabilistic_transfer(features, taught),
        {
            "torchdistill": torchdistill_of("PKTLoss", "x", "output", "x", "output"),
            "RepDistiller": _peer("distiller_zoo", lambda m: lambda: m.PKT()(features, taught)),
        },
        features,
    )


def _contrast_case(generator: torch.Generator) -> Case:
    """Return CRD: the same bank, negatives and heads; both update the bank as well, which torchdistill does inside."""
    student = torch.randn(BATCH, WIDTH, generator=generator).requires_grad_()
    teacher = torch.randn(BATCH, WIDTH, generator=generator)
    contrast = torch.randint(SAMPLES, (BATCH, NEGATIVES + 1), generator=generator)
    own = torch.randperm(SAMPLES, generator=generator)[:BATCH]
    contrast[:, 0] = own
    ours = losses.ContrastiveRepresentation(WIDTH, WIDTH, SAMPLES, dim=CONTRAST_WIDTH, generator=generator)
    ours.estimate_constants(student.detach(), teacher, contrast)

    def run() -> Tensor:
        value: Tensor = ours(student, teacher, contrast)
        ours.update(student.detach(), teacher, own)
        return value

    def use(module: ModuleType) -> Once:
        loss = module.CRDLoss("x", "e", "x", CONTRAST_WIDTH, SAMPLES, NEGATIVES, SAMPLES)
        heads = [torch.nn.Linear(WIDTH, CONTRAST_WIDTH) for _ in range(2)]
        supplement = {"pos_idx": own, "contrast_idx": contrast}

        def theirs() -> Tensor:
            embedded = [
                torch.nn.functional.normalize(head(x)) for head, x in zip(heads, (student, teacher), strict=True)
            ]
            value: Tensor = loss(
                {"x": {"output": embedded[0]}, "e": {"input": supplement}}, {"x": {"output": embedded[1]}}
            )
            return value.sum()

        return theirs

    return Case("contrastive_representation", 0.5, run, {"torchdistill": _peer(_TORCHDISTILL, use)}, student)
