"""Ways of teaching a CTC student: what each needs of the teacher, and the term it adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from apps.speech.lessons import Cuts, NBest
from kdcore import losses
from kdcore.config import UserError, build, nearest
from kdcore.losses.contract import Reduction
from kdcore.teaching import Schedule, Term


@dataclass(frozen=True)
class FrameOptions:
    """Of frame-level teaching; ``delay`` and ``window`` in frames of 40 ms (see kdcore.losses.frame_ctc)."""

    temperature: float = 1.0
    delay: int = 0
    window: int = 0
    monotone: bool = False
    # frames whose blank the teacher gives more than this weigh ``blank_weight``; None: all weigh the same
    blank_threshold: float | None = None
    blank_weight: float = 0.0
    blank_free: bool = False


@dataclass(frozen=True)
class SequenceOptions:
    """Of sequence-level teaching over the teacher's N best."""

    count: int = 4
    beam: int = 16
    # of the weights of the hypotheses
    temperature: float = 1.0


@dataclass(frozen=True)
class SegmentOptions:
    """Of teaching by segments: N best of each stretch between the teacher's silences."""

    count: int = 4
    beam: int = 16
    temperature: float = 1.0
    least: int = 3
    threshold: float = 0.95
    delay: int = 0


@dataclass(frozen=True)
class GuidedOptions:
    """Of spikes where the teacher has them, ``delay`` frames later."""

    delay: int = 0
    form: str = "probability"


@dataclass(frozen=True)
class HintOptions:
    """Of the student's encoder against the teacher's, ``delay`` frames earlier."""

    delay: int = 0


@dataclass(frozen=True)
class Need:
    """What a term wants the teacher to be asked for."""

    posteriors: bool = False
    hidden: bool = False
    n_best: NBest | None = None
    cuts: Cuts | None = None


class DelayedHint(nn.Module):
    """Mean over frames of half the squared distance of a projection of the student's frame to the teacher's.

    Reference: Romero et al., FitNets, 2015; with the delay of a streaming student.
    """

    def __init__(self, student: int, teacher: int, delay: int) -> None:
        super().__init__()
        self.project = nn.Linear(student, teacher)
        self.delay = delay

    def forward(self, student: Tensor, teacher: Tensor, lengths: Tensor, *, reduction: Reduction = "mean") -> Tensor:
        """Return the loss of frames [B, T, D] and [B, T, E]; lengths int64 [B]."""
        late = student[:, self.delay :]
        counted = torch.arange(late.shape[1], device=lengths.device) < (lengths - self.delay)[:, None]
        apart = (self.project(late) - teacher[:, : late.shape[1]]).pow(2).mean(2) / 2
        rows = apart.masked_fill(~counted, 0.0).sum(1) / counted.sum(1).clamp(min=1)
        return rows.sum() if reduction == "sum" else rows.mean()


def delayed_spikes(
    student: Tensor, teacher: Tensor, lengths: Tensor, *, delay: int, reduction: Reduction = "mean", **options: Any
) -> Tensor:
    """Return ``guided_spikes`` of a student whose spikes are to come ``delay`` frames after the guide's."""
    frames = (lengths - delay).clamp(min=0)
    late = student[:, delay:]
    return losses.guided_spikes(late, teacher[:, : late.shape[1]], frames, reduction=reduction, **options)


Make = Callable[[Any, int, int, int], tuple[Callable[..., Tensor], dict[str, Any]]]


@dataclass(frozen=True)
class Kind:
    """A way of teaching: its options, what it needs, and the loss of (options, blank, student and teacher widths)."""

    options: type[Any]
    need: Callable[[Any], Need]
    make: Make
    inputs: Mapping[str, str] = field(default_factory=dict)


def _frame(options: FrameOptions, blank: int, *widths: int) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    return losses.frame_ctc, {"blank": blank, **vars(options)}


def _sequence(options: SequenceOptions, blank: int, *widths: int) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    return losses.sequence_ctc, {"blank": blank, "temperature": options.temperature}


def _segment(options: SegmentOptions, blank: int, *widths: int) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    return losses.segment_ctc, {"blank": blank, "temperature": options.temperature}


def _guided(options: GuidedOptions, blank: int, *widths: int) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    return partial(delayed_spikes, delay=options.delay), {"blank": blank, "form": options.form}


def _hint(options: HintOptions, blank: int, *widths: int) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    return DelayedHint(widths[0], widths[1], options.delay), {}


KNOWLEDGE: dict[str, Kind] = {
    "frame": Kind(FrameOptions, lambda options: Need(posteriors=True), _frame),
    "sequence": Kind(SequenceOptions, lambda options: Need(n_best=NBest(options.count, options.beam)), _sequence),
    "segment": Kind(
        SegmentOptions,
        lambda options: Need(
            n_best=NBest(options.count, options.beam), cuts=Cuts(options.least, options.threshold, options.delay)
        ),
        _segment,
    ),
    "guided": Kind(GuidedOptions, lambda options: Need(posteriors=True), _guided),
    "hint": Kind(
        HintOptions,
        lambda options: Need(hidden=True),
        _hint,
        {"student": "student.hidden", "teacher": "teacher.hidden"},
    ),
}


def knowledge_options(name: str, options: Mapping[str, Any]) -> Any:
    """Return the checked options of a way of teaching; an unknown one is a UserError with the nearest."""
    if name not in KNOWLEDGE:
        raise UserError(f"knowledge: unknown {name!r}, {nearest(name, KNOWLEDGE)}")
    return build(KNOWLEDGE[name].options, dict(options), f"knowledge.{name}.options")


def needs(given: Mapping[str, Mapping[str, Any]]) -> Need:
    """Return all that some ways of teaching (name -> options) need together.

    Raises:
        UserError: two of them want different lists of hypotheses.
    """
    each = [KNOWLEDGE[name].need(knowledge_options(name, options)) for name, options in given.items()]
    listed = [need for need in each if need.n_best is not None]
    if len(listed) > 1:
        raise UserError("knowledge: wanted sequence or segment, not both in one student")
    return Need(
        any(need.posteriors for need in each),
        any(need.hidden for need in each),
        listed[0].n_best if listed else None,
        listed[0].cuts if listed else None,
    )


def term(
    name: str, options: Mapping[str, Any], weight: float | Schedule, *, blank: int, widths: tuple[int, int] = (0, 0)
) -> Term:
    """Return the term of a way of teaching; ``widths`` are those of the student's and the teacher's encoders."""
    kind = KNOWLEDGE[name]
    loss, given = kind.make(knowledge_options(name, options), blank, *widths)
    return Term(name, loss, kind.inputs, given, weight)
