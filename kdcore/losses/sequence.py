"""Losses on frames of CTC models: teacher's posteriors frame by frame, delayed or aligned, and spikes of a guide."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kdcore.losses.contract import (
    Reduction,
    check_at_least,
    check_float,
    check_pair,
    check_positive,
    check_shape,
    hide,
    in_full_precision,
    reduce_rows,
    row_mask,
    teacher_like,
)
from kdcore.losses.examples import pair
from kdcore.losses.registry import register

SpikeForm = Literal["probability", "log"]


def checked_lengths(argument: str, lengths: Tensor, shape: tuple[int, ...], most: int, valid: Tensor | None) -> Tensor:
    """Return ``lengths`` with 0 in the rows that do not count; raise unless it is int64 of ``shape`` in 0..most.

    ``valid`` is the row mask bool [B]. Looking at the values waits for the device they are on.
    """
    if lengths.dtype != torch.int64:
        raise ValueError(f"{argument}: wanted int64, got {lengths.dtype}")
    check_shape(argument, lengths, shape)
    lengths = hide(lengths, valid)
    if lengths.numel() and bool(((lengths < 0) | (lengths > most)).any()):
        raise ValueError(f"{argument}: wanted 0..{most}, got {int(lengths.min())}..{int(lengths.max())}")
    return lengths


def within(lengths: Tensor, size: int) -> Tensor:
    """Return bool [..., size]: which of ``size`` places are below ``lengths`` [...]."""
    return torch.arange(size, device=lengths.device) < lengths[..., None]


def check_blank(blank: int, classes: int) -> None:
    """Raise unless ``blank`` is a class and not the only one."""
    if classes < 2:
        raise ValueError(f"blank: wanted it beside another class, at least 2 classes, got {classes}")
    if not 0 <= blank < classes:
        raise ValueError(f"blank: wanted a class in 0..{classes - 1}, got {blank}")


def divergences(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) over the last axis; a class with p = 0 (log-probability -inf) adds nothing, not 0 * inf."""
    ratio = (log_p - log_q).masked_fill_(log_p == -torch.inf, 0.0)  # in place: the difference is needed no more
    return (log_p.exp() * ratio).sum(-1)


def mean_of_places(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean [B] of ``values`` [B, T]; 0 where all weights of a row are 0."""
    total = weights.sum(1)
    return (values.masked_fill(weights == 0, 0.0) * weights).sum(1) / total.masked_fill(total == 0, 1.0)


def _frame_log_probs(logits: Tensor, temperature: float, blank: int, blank_free: bool) -> Tensor:
    if blank_free:
        logits = torch.cat([logits[..., :blank], logits[..., blank + 1 :]], -1)
    return torch.log_softmax(logits / temperature, -1)


def _path(costs: Tensor) -> Tensor:
    """Return the places [B, S] of the cheapest path through ``costs`` [B, S, W] that never goes back in the teacher.

    Place i of step s is teacher frame s - i + constant, so from place i a path may go to any place up to i + 1.
    """
    steps, width = costs.shape[1:]
    came = torch.zeros_like(costs, dtype=torch.int64)
    best = costs[:, 0]
    for step in range(1, steps):
        least, place = best.flip(1).cummin(1)  # the best of places >= i, after flipping back
        least, place = least.flip(1), width - 1 - place.flip(1)
        came[:, step] = torch.cat([place[:, :1], place[:, :-1]], 1)
        best = costs[:, step] + torch.cat([least[:, :1], least[:, :-1]], 1)
    path = came.new_zeros(costs.shape[:2])
    path[:, -1] = best.argmin(1)
    for step in range(steps - 1, 0, -1):
        path[:, step - 1] = came[:, step].gather(1, path[:, step : step + 1])[:, 0]
    return path


@torch.no_grad()
def _aligned(log_p: Tensor, log_q: Tensor, inside: Tensor, counted: Tensor, window: int, monotone: bool) -> Tensor:
    """Return the teacher frame [B, S] of each student frame: the nearest in divergence among s - window..s + window.

    Shapes: log_p [B, T, C]; log_q [B, S <= T, C], the student's frames after its delay; inside bool [B, T], the
    teacher's frames; counted bool [B, S], the student's.
    """
    frames = log_q.shape[1]
    if frames == 0:
        return counted.long()
    costs = log_q.new_full((*log_q.shape[:2], 2 * window + 1), torch.inf)
    for place, offset in enumerate(range(-window, window + 1)):
        first, last = max(0, offset), min(frames, log_p.shape[1] + offset)
        if first < last:
            there = slice(first - offset, last - offset)
            found = divergences(log_p[:, there], log_q[:, first:last])
            costs[:, first:last, place] = found.masked_fill(~inside[:, there], torch.inf)
    costs = costs.masked_fill(~counted[..., None], 0.0)
    chosen = _path(costs) if monotone else costs.argmin(2)
    steps = torch.arange(frames, device=chosen.device)
    return (steps - (chosen - window)).clamp(0, log_p.shape[1] - 1)


def _frames(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    lengths = torch.randint(4, 7, (rows,), generator=generator)
    return {**pair(rows, 6, 4, generator=generator), "lengths": lengths}


def _delayed_student(inputs: dict[str, Tensor], options: Mapping[str, Any]) -> dict[str, Tensor]:
    return {**inputs, "student": inputs["teacher"].roll(options.get("delay", 0), 1)}


def _check_frame_options(threshold: float | None, blank_weight: float, delay: int, window: int, monotone: bool) -> None:
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"blank_threshold: wanted a probability or None, got {threshold}")
    if not (math.isfinite(blank_weight) and blank_weight >= 0):
        raise ValueError(f"blank_weight: wanted a finite number >= 0, got {blank_weight}")
    check_at_least("delay", delay, 0)
    check_at_least("window", window, 0)
    if monotone and window == 0:
        raise ValueError("monotone: wanted a window > 0 with it, got window 0")


@register(
    "frame_ctc",
    "sequence",
    "Takashima et al., ICASSP 2019; delayed and aligned: Ding et al., 2019 and 2020; without blank: Tian et al., 2022",
    examples=_frames,
    laws=(
        "zero_at_equality",
        "stationary_at_equality",
        "nonnegative",
        "student_shift",
        "teacher_shift",
        "padding",
    ),
    variants=(
        {},
        {"temperature": 2.0, "blank": 3},
        {"blank_threshold": 0.4, "blank_weight": 0.25},
        {"blank_threshold": 0.4},
        {"blank_free": True, "blank": 1, "temperature": 0.5},
        {"delay": 2},
        {"window": 2, "delay": 1},
        {"window": 2, "monotone": True},
        {"window": 9, "monotone": True, "blank_free": True, "blank_threshold": 0.5},
    ),
    at_equality=_delayed_student,
)
def frame_ctc(
    student: Tensor,
    teacher: Tensor,
    lengths: Tensor,
    *,
    blank: int = 0,
    temperature: float = 1.0,
    blank_threshold: float | None = None,
    blank_weight: float = 0.0,
    blank_free: bool = False,
    delay: int = 0,
    window: int = 0,
    monotone: bool = False,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Frame-level CTC: mean over frames of T^2 * KL(softmax(teacher[t]/T) || softmax(student[t + delay]/T)).

    Shapes: student and teacher logits or log-probabilities [B, T, C]; lengths int64 [B], frames of an utterance
    (what stands beyond is never looked at); mask bool [B]. Zero where the student is the teacher, ``delay`` later.
    An utterance without a pair of frames counts 0.

    Options: a frame whose teacher gives the blank more than ``blank_threshold`` (None: none; at temperature 1) weighs
    ``blank_weight`` instead of 1, and the mean is weighted, so that 0 drops it; ``blank_free`` renormalises both over
    the symbols that are not ``blank``; ``delay`` in frames, that of a streaming student; ``window`` W > 0 takes for
    each student frame t the teacher frame of t - delay - W..t - delay + W with the least divergence, without a
    gradient through the choice, and ``monotone`` the cheapest path of such frames that never goes back. (Chosen by
    cross-entropy instead, the sharpest teacher frame would win, and a student equal to its teacher would not be at 0.)

    Raises:
        ValueError: shapes differ, a length is not in 0..T, or an option is out of range.

    Reference: Takashima et al., Investigation of Sequence-Level Knowledge Distillation Methods for CTC, 2019; Ding
    et al., 2019 (dynamic alignment) and 2020 (delay); Tian et al., 2022 (without blank frames).
    """
    check_pair(student, teacher, 3)
    check_blank(blank, student.shape[2])
    check_positive("temperature", temperature)
    _check_frame_options(blank_threshold, blank_weight, delay, window, monotone)
    rows = row_mask(mask, student.shape[0])
    lengths = checked_lengths("lengths", lengths, (student.shape[0],), student.shape[1], rows)
    inside = within(lengths, student.shape[1])
    student = hide(in_full_precision(student), inside)
    teacher = hide(teacher_like(teacher, student), inside)
    weights = inside.to(student.dtype)
    if blank_threshold is not None:
        sure = torch.log_softmax(teacher, 2)[..., blank].exp() > blank_threshold
        weights = torch.where(sure, weights * blank_weight, weights)
    counted = inside[:, delay:]
    log_q = _frame_log_probs(student[:, delay:], temperature, blank, blank_free)
    log_p = _frame_log_probs(teacher, temperature, blank, blank_free)
    if window:
        frame = _aligned(log_p, log_q, inside, counted, window, monotone)
        log_p = log_p.gather(1, frame[..., None].expand(-1, -1, log_p.shape[2]))
        weights = weights.gather(1, frame)
    else:
        log_p, weights = log_p[:, : log_q.shape[1]], weights[:, : log_q.shape[1]]
    losses = mean_of_places(divergences(log_p, log_q), weights * counted)
    return reduce_rows(losses * temperature**2, rows, reduction)


def _spikes(teacher: Tensor, inside: Tensor, blank: int) -> tuple[Tensor, Tensor]:
    """Return the guide's best symbol of each frame [B, T] and whether it is a spike, bool [B, T]."""
    symbols = teacher.argmax(2)
    return symbols, (symbols != blank) & inside


def spike_mask(teacher: Tensor, lengths: Tensor, *, blank: int = 0) -> Tensor:
    """Return M bool [B, T, C]: true where the symbol is the guide's best of the frame and not the blank.

    Shapes: teacher logits or probabilities [B, T, C] of the guide; lengths int64 [B].

    Raises:
        ValueError: shapes differ, a length is not in 0..T, or blank is no class.

    Reference: Kurata & Audhkhasi, 2019.
    """
    check_float("teacher", teacher, 3)
    check_blank(blank, teacher.shape[2])
    lengths = checked_lengths("lengths", lengths, (teacher.shape[0],), teacher.shape[1], None)
    inside = within(lengths, teacher.shape[1])
    symbols, spike = _spikes(hide(teacher.detach(), inside), inside, blank)
    return torch.zeros_like(teacher, dtype=torch.bool).scatter_(2, symbols[..., None], spike[..., None])


@register(
    "guided_spikes",
    "sequence",
    "Kurata & Audhkhasi, Guiding CTC Posterior Spike Timings for Improved Posterior Fusion, Interspeech 2019",
    examples=_frames,
    laws=("student_shift", "teacher_shift", "padding"),
    variants=({}, {"alpha": 0.5, "blank": 2}, {"form": "log"}),
)
def guided_spikes(
    student: Tensor,
    teacher: Tensor,
    lengths: Tensor,
    *,
    alpha: float = 1.0,
    form: SpikeForm = "probability",
    blank: int = 0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Spikes where the guide has them: -alpha * sum over frames and symbols of M * p, M = spike_mask(teacher).

    Shapes: student and teacher (the guide) logits or log-probabilities [B, T, C]; lengths int64 [B]; mask bool [B].
    Added to the CTC loss. Between -alpha * the number of the guide's spikes and 0; where the student is the guide it
    is not the least. ``alpha`` 1 as in the paper; ``form`` "log" takes -log p instead of -p, which is >= 0 and pulls
    hardest where the student has no spike at all.

    Raises:
        ValueError: shapes differ, a length is not in 0..T, or an option is out of range.

    Reference: Kurata & Audhkhasi, 2019.
    """
    check_pair(student, teacher, 3)
    check_blank(blank, student.shape[2])
    check_positive("alpha", alpha)
    if form not in get_args(SpikeForm):
        raise ValueError(f"form: wanted one of {', '.join(get_args(SpikeForm))}, got {form!r}")
    rows = row_mask(mask, student.shape[0])
    lengths = checked_lengths("lengths", lengths, (student.shape[0],), student.shape[1], rows)
    inside = within(lengths, student.shape[1])
    student = hide(in_full_precision(student), inside)
    symbols, spike = _spikes(hide(teacher.detach(), inside), inside, blank)
    log_probs = student.gather(2, symbols[..., None])[..., 0] - torch.logsumexp(student, 2)
    gains = log_probs if form == "log" else log_probs.exp()
    return reduce_rows(-alpha * hide(gains, spike).sum(1), rows, reduction)
