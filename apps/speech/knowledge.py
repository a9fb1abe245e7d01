"""Ways of teaching a CTC student: what each needs of the teacher, and the term it adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from apps.speech.hints import DelayedHint, delayed_attention
from apps.speech.lessons import Cuts, NBest, Segmented
from apps.speech.models.base import ATTENTION, FRAME_MS, OUTPUT
from kdcore import losses
from kdcore.config import UserError, build, nearest
from kdcore.losses.contract import Reduction
from kdcore.losses.sequence import SpikeForm
from kdcore.teaching import Schedule, Term

# frames that a student may be taught to be late at most: two seconds
MOST_DELAY = 50


def _check_least(options: Any, least: int, *names: str) -> None:
    """Raise ValueError for an option that is below its least value."""
    for name in names:
        if getattr(options, name) < least:
            raise ValueError(f"{name}: got {getattr(options, name)}, wanted {least} or more")


def _check_delay(delay: int) -> None:
    if not 0 <= delay <= MOST_DELAY:
        most = f"at most {MOST_DELAY}: it counts frames of {FRAME_MS} ms" if delay > 0 else "0 or more"
        raise ValueError(f"delay: got {delay}, wanted {most}")


def _check_temperature(temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: got {temperature}, wanted a finite number above 0")


def _check_lists(count: int, beam: int) -> None:
    """Raise ValueError for lists of hypotheses that the beam cannot give."""
    if count < 1:
        raise ValueError(f"count: got {count}, wanted 1 or more")
    if beam < count:
        raise ValueError(f"beam: got {beam}, wanted at least the count of hypotheses, {count}")


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

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        _check_least(self, 0, "window")
        _check_delay(self.delay)
        if self.monotone and not self.window:
            raise ValueError("monotone: got true with window 0, wanted a window of 1 or more with it")
        if self.blank_threshold is not None and not 0 <= self.blank_threshold <= 1:
            raise ValueError(f"blank_threshold: got {self.blank_threshold}, wanted a probability, or null for none")
        if not (math.isfinite(self.blank_weight) and self.blank_weight >= 0):
            raise ValueError(f"blank_weight: got {self.blank_weight}, wanted a finite weight >= 0")
        if self.blank_weight and self.blank_threshold is None:
            raise ValueError(f"blank_weight: got {self.blank_weight}, wanted a blank_threshold with it")


@dataclass(frozen=True)
class SequenceOptions:
    """Of sequence-level teaching over the teacher's N best."""

    count: int = 4
    beam: int = 16
    # of the weights of the hypotheses
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_lists(self.count, self.beam)
        _check_temperature(self.temperature)


@dataclass(frozen=True)
class SegmentOptions:
    """Of teaching by segments: N best of each stretch between the teacher's silences."""

    count: int = 4
    beam: int = 16
    temperature: float = 1.0
    least: int = 3
    threshold: float = 0.95
    delay: int = 0

    def __post_init__(self) -> None:
        _check_lists(self.count, self.beam)
        _check_temperature(self.temperature)
        _check_least(self, 1, "least")
        _check_delay(self.delay)
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold: got {self.threshold}, wanted a probability below 1")


@dataclass(frozen=True)
class GuidedOptions:
    """Of spikes where the teacher has them, ``delay`` frames later."""

    delay: int = 0
    form: SpikeForm = "probability"

    def __post_init__(self) -> None:
        _check_delay(self.delay)


@dataclass(frozen=True)
class AttentionTargets:
    """Of frames as the teacher's attention spreads a text's symbols over them, ``delay`` frames later."""

    delay: int = 0
    window: int = 0

    def __post_init__(self) -> None:
        _check_least(self, 0, "window")
        _check_delay(self.delay)


@dataclass(frozen=True)
class HintOptions:
    """Of the student's encoder against the teacher's, ``delay`` frames earlier."""

    delay: int = 0

    def __post_init__(self) -> None:
        _check_delay(self.delay)


@dataclass(frozen=True)
class LayersOptions:
    """Of blocks of a Conformer student against blocks of its teacher, pair by pair from the bottom, counted from 0."""

    student: list[int] = field(default_factory=lambda: [0])
    teacher: list[int] = field(default_factory=lambda: [0])
    delay: int = 0
    # epochs after which the next pair begins to count, so that lower layers come first; 0: all from the start
    progress: int = 0
    # the weight of where the blocks attend to, as a share of that of their outputs; 0: outputs alone. What is kept of
    # the teacher then takes three times the room
    attention: float = 0.0

    def __post_init__(self) -> None:
        if not self.student or len(self.student) != len(self.teacher):
            raise ValueError(f"layers: wanted as many blocks of both, at least one, got {self.student}, {self.teacher}")
        if min(*self.student, *self.teacher) < 0:
            raise ValueError(f"layers: wanted blocks counted from 0, got {self.student}, {self.teacher}")
        _check_least(self, 0, "progress")
        _check_delay(self.delay)
        if not (math.isfinite(self.attention) and self.attention >= 0):
            raise ValueError(f"attention: got {self.attention}, wanted a finite share >= 0")


@dataclass(frozen=True)
class Need:
    """What a term wants the teacher to be asked for, and the layers of both it compares."""

    posteriors: bool = False
    # frame targets of an attention decoder along the text
    attention: bool = False
    student_layers: tuple[str, ...] = ()
    teacher_layers: tuple[str, ...] = ()
    n_best: NBest | None = None
    segmented: Segmented | None = None


def delayed_spikes(
    student: Tensor, teacher: Tensor, lengths: Tensor, *, delay: int, reduction: Reduction = "mean", **options: Any
) -> Tensor:
    """Return ``guided_spikes`` of a student whose spikes are to come ``delay`` frames after the guide's."""
    frames = (lengths - delay).clamp(min=0)
    late = student[:, delay:]
    return losses.guided_spikes(late, teacher[:, : late.shape[1]], frames, reduction=reduction, **options)


# of a term: the same in every epoch, or not
Weight = float | Schedule


class Layered(Protocol):
    """A student or a teacher whose layers are compared."""

    def width(self, layer: str) -> int:
        """Return the width of a layer, by its path."""
        ...

    def heads(self) -> int:
        """Return how many heads its attention has."""
        ...

    def reach(self) -> int | None:
        """Return how many frames before its own a frame always attends to; None: all there are."""
        ...


@dataclass(frozen=True)
class Pair:
    """What terms are made for: the blank, and the two that are compared."""

    blank: int
    student: Layered
    teacher: Layered


@dataclass(frozen=True)
class Kind:
    """A way of teaching: its options, what it needs, and its terms."""

    options: type[Any]
    need: Callable[[Any], Need]
    terms: Callable[[Any, Weight, Pair], list[Term]]


def _frame(options: FrameOptions, weight: Weight, pair: Pair) -> list[Term]:
    return [Term("frame", losses.frame_ctc, {}, {"blank": pair.blank, **vars(options)}, weight)]


def _sequence(options: SequenceOptions, weight: Weight, pair: Pair) -> list[Term]:
    given = {"blank": pair.blank, "temperature": options.temperature}
    return [Term("sequence", losses.sequence_ctc, {}, given, weight)]


def _segment(options: SegmentOptions, weight: Weight, pair: Pair) -> list[Term]:
    given = {"blank": pair.blank, "temperature": options.temperature}
    listed = {name: f"segment.{name}" for name in ("hypotheses", "hypothesis_lengths", "log_scores")}
    return [Term("segment", losses.segment_ctc, listed, given, weight)]


def _attention(options: AttentionTargets, weight: Weight, pair: Pair) -> list[Term]:
    given = {"blank": pair.blank, **vars(options)}
    return [Term("attention", losses.frame_ctc, {"teacher": "teacher.attention"}, given, weight)]


def _guided(options: GuidedOptions, weight: Weight, pair: Pair) -> list[Term]:
    given = {"blank": pair.blank, "form": options.form}
    return [Term("guided", partial(delayed_spikes, delay=options.delay), {}, given, weight)]


def _compared(name: str, loss: Callable[..., Tensor], layers: tuple[str, str], weight: Weight) -> Term:
    """Return the term of a loss between a layer of the student's and one of the teacher's."""
    return Term(name, loss, {"student": f"student.{layers[0]}", "teacher": f"teacher.{layers[1]}"}, {}, weight)


def _hinted(name: str, layers: tuple[str, str], delay: int, weight: Weight, pair: Pair) -> Term:
    loss = DelayedHint(pair.student.width(layers[0]), pair.teacher.width(layers[1]), delay)
    return _compared(name, loss, layers, weight)


def _attending(layers: tuple[str, str], delay: int, pair: Pair) -> Callable[..., Tensor]:
    """Return the loss between where two blocks attend to, as far back as the student does."""
    widths = pair.student.width(layers[0]), pair.teacher.width(layers[1])
    options = {"student_heads": pair.student.heads(), "teacher_heads": pair.teacher.heads(), "delay": delay}
    back = min((far for far in (pair.student.reach(), pair.teacher.reach()) if far is not None), default=None)

    def attending(student: Tensor, teacher: Tensor, lengths: Tensor, *, reduction: Reduction = "mean") -> Tensor:
        own, theirs = student[..., : widths[0]], teacher[..., : widths[1]]
        return delayed_attention(own, theirs, lengths, back=back, reduction=reduction, **options)

    return attending


def _hint(options: HintOptions, weight: Weight, pair: Pair) -> list[Term]:
    return [_hinted("hint", ("encoder", "encoder"), options.delay, weight, pair)]


def _layers(options: LayersOptions, weight: Weight, pair: Pair) -> list[Term]:
    found = []
    for place, (own, theirs) in enumerate(zip(options.student, options.teacher, strict=True)):
        begun = _later(weight, place * options.progress)
        outputs = f"blocks.{own}.{OUTPUT}", f"blocks.{theirs}.{OUTPUT}"
        found.append(_hinted(f"layers_{place}", outputs, options.delay, begun, pair))
        if options.attention:
            layers = f"blocks.{own}.{ATTENTION}", f"blocks.{theirs}.{ATTENTION}"
            loss = _attending(layers, options.delay, pair)
            found.append(_compared(f"layers_{place}_attention", loss, layers, _share(begun, options.attention)))
    return found


def _later(weight: Weight, epoch: int) -> Schedule:
    """Return a weight that is 0 before an epoch."""
    if isinstance(weight, Schedule):
        return replace(weight, delay=weight.delay + epoch)
    return Schedule(weight, delay=epoch)


def _share(weight: Schedule, share: float) -> Schedule:
    """Return a share of a weight."""
    return replace(weight, start=weight.start * share, end=None if weight.end is None else weight.end * share)


def _blocks(numbers: Sequence[int], options: LayersOptions) -> tuple[str, ...]:
    parts = (OUTPUT, ATTENTION) if options.attention else (OUTPUT,)
    return tuple(f"blocks.{number}.{part}" for number in numbers for part in parts)


KNOWLEDGE: dict[str, Kind] = {
    "frame": Kind(FrameOptions, lambda options: Need(posteriors=True), _frame),
    "sequence": Kind(SequenceOptions, lambda options: Need(n_best=NBest(options.count, options.beam)), _sequence),
    "segment": Kind(
        SegmentOptions,
        lambda options: Need(
            segmented=Segmented(
                NBest(options.count, options.beam), Cuts(options.least, options.threshold, options.delay)
            )
        ),
        _segment,
    ),
    "attention": Kind(AttentionTargets, lambda options: Need(attention=True), _attention),
    "guided": Kind(GuidedOptions, lambda options: Need(posteriors=True), _guided),
    "hint": Kind(HintOptions, lambda options: Need(student_layers=("encoder",), teacher_layers=("encoder",)), _hint),
    "layers": Kind(
        LayersOptions,
        lambda options: Need(
            student_layers=_blocks(options.student, options), teacher_layers=_blocks(options.teacher, options)
        ),
        _layers,
    ),
}


def knowledge_options(name: str, options: Mapping[str, Any]) -> Any:
    """Return the checked options of a way of teaching; an unknown one is a UserError with the nearest."""
    if name not in KNOWLEDGE:
        raise UserError(f"knowledge: unknown {name!r}, {nearest(name, KNOWLEDGE)}")
    return build(KNOWLEDGE[name].options, dict(options), f"knowledge.{name}.options")


def needs(given: Mapping[str, Mapping[str, Any]]) -> Need:
    """Return all that some ways of teaching (name -> options) need together."""
    each = [KNOWLEDGE[name].need(knowledge_options(name, options)) for name, options in given.items()]
    # one way of teaching wants lists of utterances, and one those of segments
    return Need(
        any(need.posteriors for need in each),
        any(need.attention for need in each),
        tuple(dict.fromkeys(layer for need in each for layer in need.student_layers)),
        tuple(dict.fromkeys(layer for need in each for layer in need.teacher_layers)),
        next((need.n_best for need in each if need.n_best is not None), None),
        next((need.segmented for need in each if need.segmented is not None), None),
    )


def terms(name: str, options: Mapping[str, Any], weight: Weight, pair: Pair) -> list[Term]:
    """Return the terms of a way of teaching."""
    return KNOWLEDGE[name].terms(knowledge_options(name, options), weight, pair)
