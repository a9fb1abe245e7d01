"""Losses of CTC students on a teacher's N best label sequences, of whole utterances or of segments of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcore.losses.contract import (
    Reduction,
    check_at_least,
    check_float,
    check_positive,
    hide,
    in_full_precision,
    reduce_rows,
    row_mask,
    teacher_like,
)
from kdcore.losses.examples import normal
from kdcore.losses.registry import register
from kdcore.losses.sequence import check_blank, checked_lengths, within

_N_BEST = "Takashima et al., ICASSP 2018 and 2019; Huang et al., Knowledge Distillation for Sequence Model, 2018"


def check_hypotheses(hypotheses: Tensor, lengths: Tensor, classes: int, blank: int | None) -> None:
    """Raise unless the first ``lengths`` [...] of ``hypotheses`` int64 [..., U] are classes other than the blank."""
    wrong = (hypotheses < 0) | (hypotheses >= classes)
    if blank is not None:
        wrong |= hypotheses == blank
    wrong &= within(lengths, hypotheses.shape[-1])
    if wrong.numel() and bool(wrong.any()):
        beside = "" if blank is None else f" other than the blank {blank}"
        raise ValueError(f"hypotheses: wanted classes in 0..{classes - 1}{beside}, got {int(hypotheses[wrong][0])}")


def hypothesis_weights(log_scores: Tensor, usable: Tensor, temperature: float) -> Tensor:
    """Return softmax(log_scores / temperature) over the ``usable`` of the last axis, 0 for the others and if none is.

    A score of -inf is that of a hypothesis that is not there.
    """
    usable = usable & (log_scores != -torch.inf)
    some = usable.any(-1, keepdim=True)
    scores = (log_scores / temperature).masked_fill(~usable & some, -torch.inf).masked_fill(~some, 0.0)
    return torch.softmax(scores, -1) * usable


def _frames_needed(hypotheses: Tensor, lengths: Tensor) -> Tensor:
    """Return how many frames a hypothesis takes at least: its symbols, and a blank between two that are the same."""
    again = hypotheses[..., 1:] == hypotheses[..., :-1]
    return lengths + (again & within(lengths - 1, again.shape[-1])).sum(-1)


def _expected_ctc(
    log_probs: Tensor,
    frames: Tensor,
    hypotheses: Tensor,
    lengths: Tensor,
    log_scores: Tensor,
    blank: int,
    temperature: float,
    chunk_size: int | None,
) -> Tensor:
    """Return sum_h w_h * -log P(h) [M] of log_probs [M, T, C], frames [M], hypotheses [M, N, U], lengths [M, N].

    torch's CTC is given the hypotheses in chunks; its gradient is right only behind the log-softmax of log_probs.
    """
    items, n_best = log_scores.shape
    # what has a graph also when nothing is left to sum up
    losses = log_probs.new_zeros(items) + log_probs.flatten()[:0].sum()
    if items == 0 or n_best == 0 or log_probs.shape[1] == 0:
        return losses
    fits = (_frames_needed(hypotheses, lengths) <= frames[:, None]) & (frames > 0)[:, None]
    weights = hypothesis_weights(log_scores, fits, temperature)
    # A hypothesis that counts nothing is replaced by the empty one, whose loss is finite.
    used = weights > 0
    target_lengths = lengths.masked_fill(~used, 0).cpu()
    input_lengths = frames.clamp(min=1).cpu()
    by_time = log_probs.transpose(0, 1)
    for start in range(0, n_best, chunk_size or n_best):
        part = slice(start, min(start + (chunk_size or n_best), n_best))
        size = part.stop - part.start
        repeated = by_time if size == 1 else by_time.repeat_interleave(size, 1)
        each = F.ctc_loss(
            repeated,
            hypotheses[:, part].flatten(0, 1),
            input_lengths.repeat_interleave(size),
            target_lengths[:, part].flatten(),
            blank=blank,
            reduction="none",
        ).unflatten(0, (items, size))
        losses = losses + (each.masked_fill(~used[:, part], 0.0) * weights[:, part]).sum(1)
    return losses


def _n_best(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    lengths = torch.randint(0, 4, (rows, 3), generator=generator)
    lengths[:, 0] = 1
    return {
        "student": normal(rows, 4, 4, generator=generator),
        "lengths": torch.randint(2, 5, (rows,), generator=generator),
        "hypotheses": torch.randint(1, 4, (rows, 3, 3), generator=generator),
        "hypothesis_lengths": lengths,
        "log_scores": normal(rows, 3, generator=generator),
    }


def _check_n_best(
    student: Tensor, hypotheses: Tensor, log_scores: Tensor, blank: int, temperature: float, chunk_size: int | None
) -> None:
    check_blank(blank, student.shape[-1])
    check_positive("temperature", temperature)
    if chunk_size is not None:
        check_at_least("chunk_size", chunk_size, 1)
    if hypotheses.dtype != torch.int64:
        raise ValueError(f"hypotheses: wanted int64 symbols, got {hypotheses.dtype}")
    if tuple(hypotheses.shape[:-1]) != tuple(log_scores.shape) or log_scores.shape[0] != student.shape[0]:
        wanted = f"{student.shape[0]} rows and log_scores {tuple(hypotheses.shape[:-1])}"
        raise ValueError(f"hypotheses: wanted {wanted}, got {tuple(hypotheses.shape)} and {tuple(log_scores.shape)}")


@register(
    "sequence_ctc",
    "sequence",
    _N_BEST,
    examples=_n_best,
    teacher=("log_scores",),
    laws=("nonnegative", "student_shift", "teacher_shift", "chunked"),
    variants=({}, {"temperature": 3.0}),
)
def sequence_ctc(
    student: Tensor,
    lengths: Tensor,
    hypotheses: Tensor,
    hypothesis_lengths: Tensor,
    log_scores: Tensor,
    *,
    blank: int = 0,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Sequence-level CTC over the teacher's N best: sum_h w_h * -log P_student(h), w = softmax(log_scores / tau).

    Shapes: student logits or log-probabilities [B, T, C]; lengths int64 [B], frames; hypotheses int64 [B, N, U],
    symbols without blanks; hypothesis_lengths int64 [B, N], in symbols; log_scores [B, N] of the teacher, -inf where
    there is no such hypothesis; mask bool [B]. What stands beyond a length is never looked at. N = 1 is the CTC loss
    of a pseudo-label. Zero only where the student is sure of the one hypothesis.

    Hypotheses that do not fit into the frames (two equal symbols need a blank between them) are left out and the
    weights renormalised; an utterance left with none counts 0.

    Options: ``temperature`` tau of the weights; ``blank``; ``chunk_size`` hypotheses are worked on at a time, which
    bounds the copies of the log-probabilities at chunk_size * B * T * C values (none for 1; None: all at a time,
    which is the fastest).

    Raises:
        ValueError: shapes do not fit, a length or a symbol is out of range, or an option is.

    Reference: Takashima et al., An Investigation of a Knowledge Distillation Method for CTC Acoustic Models, 2018.
    """
    check_float("student", student, 3)
    check_float("log_scores", log_scores, 2)
    _check_n_best(student, hypotheses, log_scores, blank, temperature, chunk_size)
    rows, classes = row_mask(mask, student.shape[0]), student.shape[2]
    lengths = checked_lengths("lengths", lengths, (student.shape[0],), student.shape[1], rows)
    shape, longest = tuple(log_scores.shape), hypotheses.shape[2]
    sizes = checked_lengths("hypothesis_lengths", hypothesis_lengths, shape, longest, rows)
    check_hypotheses(hypotheses, sizes, classes, blank)
    student = hide(in_full_precision(student), within(lengths, student.shape[1]))
    losses = _expected_ctc(
        torch.log_softmax(student, 2),
        lengths,
        F.pad(hypotheses, (0, int(longest == 0))),
        sizes,
        hide(teacher_like(log_scores, student), rows),
        blank,
        temperature,
        chunk_size,
    )
    return reduce_rows(losses, rows, reduction)


def cut_at_blanks(
    teacher_log_probs: Tensor,
    lengths: Tensor,
    *,
    blank: int = 0,
    threshold: float = 0.95,
    least: int = 10,
    delay: int = 0,
) -> Tensor:
    """Return the segments int64 [B, S, 2], first frame and the one behind the last, cut where the teacher is silent.

    A cut is in the middle of every run of at least ``least`` frames (default 10) whose blank has a probability above
    ``threshold`` (0.95). ``delay`` moves the cuts, not the ends of the utterance, by the frames a student is late:
    0 for the teacher's own decoding. Rows with fewer segments are filled up with empty ones at the end.

    Shapes: teacher_log_probs [B, T, C]; lengths int64 [B].

    Raises:
        ValueError: shapes differ, a length is not in 0..T, or an option is out of range.

    Reference: Ding et al., Compression of CTC-Trained Acoustic Models by Dynamic Frame-wise Distillation or
    Segment-wise N-best Hypotheses Imitation, Interspeech 2019.
    """
    check_float("teacher_log_probs", teacher_log_probs, 3)
    check_blank(blank, teacher_log_probs.shape[2])
    check_at_least("least", least, 1)
    check_at_least("delay", delay, 0)
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold: wanted a probability below 1, got {threshold}")
    rows, frames = teacher_log_probs.shape[:2]
    lengths = checked_lengths("lengths", lengths, (rows,), frames, None)
    silent = (teacher_log_probs.detach()[..., blank].exp() > threshold) & within(lengths, frames)
    edges = F.pad(silent, (1, 1)).int().diff(dim=1)  # [B, T + 1]: 1 where a run begins, -1 behind its end
    row, begin = (edges == 1).nonzero(as_tuple=True)
    end = (edges == -1).nonzero(as_tuple=True)[1]
    cut = (begin + end) // 2
    kept = (end - begin >= least) & (cut > 0)
    row, cut = row[kept], torch.minimum(cut[kept] + delay, lengths[row[kept]])
    count = torch.bincount(row, minlength=rows)
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    bounds = lengths[:, None].repeat(1, int(count.max()) + 2 if rows else 2)
    bounds[:, 0] = 0
    bounds[row, place + 1] = cut
    return torch.stack([bounds[:, :-1], bounds[:, 1:]], 2)


def _segments(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    lengths = torch.randint(0, 3, (rows, 2, 2), generator=generator)
    lengths[:, :, 0] = 1
    ends = torch.randint(4, 6, (rows,), generator=generator)
    cuts = torch.randint(1, 4, (rows,), generator=generator)
    starts = torch.stack([torch.zeros_like(cuts), cuts], 1)
    return {
        "student": normal(rows, 5, 3, generator=generator),
        "lengths": ends,
        "segments": torch.stack([starts, torch.stack([cuts, ends], 1)], 2),
        "hypotheses": torch.randint(1, 3, (rows, 2, 2, 2), generator=generator),
        "hypothesis_lengths": lengths,
        "log_scores": normal(rows, 2, 2, generator=generator),
    }


@register(
    "segment_ctc",
    "sequence",
    "Ding et al., Compression of CTC-Trained Acoustic Models by ... Segment-wise N-best Hypotheses Imitation, 2019",
    examples=_segments,
    teacher=("log_scores",),
    laws=("nonnegative", "student_shift", "teacher_shift", "chunked"),
    variants=({}, {"temperature": 3.0}),
)
def segment_ctc(
    student: Tensor,
    lengths: Tensor,
    segments: Tensor,
    hypotheses: Tensor,
    hypothesis_lengths: Tensor,
    log_scores: Tensor,
    *,
    blank: int = 0,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Segment-level CTC over the N best of each segment: sum over segments of what sequence_ctc gives of its frames.

    Shapes: student logits or log-probabilities [B, T, C]; lengths int64 [B]; segments int64 [B, S, 2], the first
    frame and the one behind the last (cut_at_blanks, with the student's delay), an empty one adding nothing;
    hypotheses int64 [B, S, N, U]; hypothesis_lengths int64 [B, S, N]; log_scores [B, S, N]; mask bool [B]. All as in
    sequence_ctc, which it equals where the one segment is the utterance. A segment without a hypothesis that fits
    adds 0. Memory beyond the inputs: the segments' frames, each padded to the longest.

    Raises:
        ValueError: shapes do not fit, a segment is not within its utterance, or as sequence_ctc.

    Reference: Ding et al., 2019.
    """
    check_float("student", student, 3)
    check_float("log_scores", log_scores, 3)
    _check_n_best(student, hypotheses, log_scores, blank, temperature, chunk_size)
    (batch, time, classes), longest = student.shape, hypotheses.shape[3]
    rows = row_mask(mask, batch)
    lengths = checked_lengths("lengths", lengths, (batch,), time, rows)
    shape = tuple(log_scores.shape)
    segments = checked_lengths("segments", segments, (batch, shape[1], 2), time, rows)
    if segments.numel() and bool(((segments[..., 0] > segments[..., 1]) | (segments[..., 1] > lengths[:, None])).any()):
        raise ValueError("segments: wanted 0 <= first <= end <= length, got one that is not")
    sizes = checked_lengths("hypothesis_lengths", hypothesis_lengths, shape, longest, rows)
    check_hypotheses(hypotheses, sizes, classes, blank)
    student = hide(in_full_precision(student), within(lengths, time))
    log_scores = hide(teacher_like(log_scores, student), rows)
    row, segment = (segments[..., 1] > segments[..., 0]).nonzero(as_tuple=True)
    first, end = segments[row, segment].unbind(1)
    widest = int((end - first).max()) if len(row) else 0
    places = (first[:, None] + torch.arange(widest, device=row.device)).clamp(max=max(time - 1, 0))
    losses = _expected_ctc(
        torch.log_softmax(student, 2)[row[:, None], places],
        end - first,
        F.pad(hypotheses[row, segment], (0, int(longest == 0))),
        sizes[row, segment],
        log_scores[row, segment],
        blank,
        temperature,
        chunk_size,
    )
    return reduce_rows(losses.new_zeros(batch).index_add(0, row, losses), rows, reduction)
