"""Sequence losses: torch's CTC, alignments that are known, padding, hypotheses that do not fit, cuts at blanks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kdcore.losses import (
    cut_at_blanks,
    frame_ctc,
    guided_spikes,
    segment_ctc,
    sequence_ctc,
    sequence_level,
    soft_targets,
    spike_mask,
    word_level,
)

seeds = st.integers(0, 2**31)
law = settings(max_examples=20, deadline=None)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spikes(symbols: list[int], classes: int = 4, height: float = 9.0) -> Tensor:
    """Logits [1, T, C] of an utterance with one sharp symbol a frame."""
    return F.one_hot(torch.tensor([symbols]), classes).double() * height


# Frames.


def test_plain_frames_are_soft_targets_of_each_frame() -> None:
    student, teacher = normal(3, 5, 4).requires_grad_(), normal(3, 5, 4, seed=1)
    want = soft_targets(student.flatten(0, 1), teacher.flatten(0, 1), temperature=2.0)
    torch.testing.assert_close(frame_ctc(student, teacher, torch.full((3,), 5), temperature=2.0), want)
    log_probs = frame_ctc(student.log_softmax(2), teacher.log_softmax(2), torch.full((3,), 5), temperature=2.0)
    torch.testing.assert_close(log_probs, want, msg="log-probabilities are logits")


def test_without_blank_is_the_loss_of_the_other_classes() -> None:
    student, teacher, lengths = normal(2, 5, 4), normal(2, 5, 4, seed=1), torch.tensor([5, 3])
    keep = torch.tensor([0, 1, 3])
    got = frame_ctc(student, teacher, lengths, blank=2, blank_free=True)
    torch.testing.assert_close(got, frame_ctc(student[..., keep], teacher[..., keep], lengths))


def test_frames_the_teacher_calls_blank_may_be_dropped() -> None:
    teacher, student = spikes([0, 2, 0, 0, 1]), normal(1, 5, 4)
    lengths, kept = torch.tensor([5]), torch.tensor([1, 4])
    got = frame_ctc(student, teacher, lengths, blank_threshold=0.9)
    torch.testing.assert_close(got, frame_ctc(student[:, kept], teacher[:, kept], torch.tensor([2])))
    assert frame_ctc(student[:, :1], teacher[:, :1], torch.tensor([1]), blank_threshold=0.9).item() == 0
    torch.testing.assert_close(
        frame_ctc(student, teacher, lengths, blank_threshold=0.9, blank_weight=1.0),
        frame_ctc(student, teacher, lengths),
    )
    infinite = student.masked_fill(torch.arange(4) == 0, -torch.inf)  # in a dropped frame it must not become NaN
    assert frame_ctc(infinite, teacher, lengths, blank_threshold=0.9, blank_weight=0.0).item() == math.inf
    quiet = infinite.masked_fill((torch.arange(4) == 0) & torch.tensor([0, 1, 0, 0, 1]).bool()[:, None], 0.0)
    assert math.isfinite(frame_ctc(quiet, teacher, lengths, blank_threshold=0.9).item())


def test_a_late_student_is_taught_with_its_delay() -> None:
    teacher = spikes([0, 1, 0, 2, 0, 3, 0, 0])
    student = teacher.roll(2, 1)
    lengths = torch.tensor([8])
    assert frame_ctc(student, teacher, lengths, delay=2).item() == pytest.approx(0, abs=1e-12)
    assert frame_ctc(student, teacher, lengths).item() > 1
    assert frame_ctc(student, teacher, lengths, window=2, monotone=True).item() == pytest.approx(0, abs=1e-12)
    short = frame_ctc(student.requires_grad_(), teacher, torch.tensor([2]), delay=2)
    assert short.item() == 0 and short.requires_grad, "no pair of frames"
    assert frame_ctc(student, teacher, lengths, delay=50, window=3).item() == 0


@given(seed=seeds, window=st.integers(1, 6))
@law
def test_wider_windows_cost_less_and_monotone_paths_more(seed: int, window: int) -> None:
    student, teacher, lengths = normal(3, 7, 4, seed=seed), normal(3, 7, 4, seed=seed + 1), torch.tensor([7, 5, 1])

    def cost(**options: object) -> Tensor:
        return frame_ctc(student, teacher, lengths, reduction="none", **options)

    free, path = cost(window=window), cost(window=window, monotone=True)
    assert (free <= path + 1e-12).all() and (path <= cost() + 1e-12).all()
    assert (cost(window=window + 1, monotone=True) <= path + 1e-12).all()


def test_a_monotone_path_does_not_go_back() -> None:
    # the student swaps two symbols; only a path that goes back could match both
    teacher, student = spikes([1, 2]), spikes([2, 1])
    lengths = torch.tensor([2])
    assert frame_ctc(student, teacher, lengths, window=1).item() == pytest.approx(0, abs=1e-12)
    assert frame_ctc(student, teacher, lengths, window=1, monotone=True).item() > 4


def test_the_choice_of_frames_has_no_gradient_of_its_own() -> None:
    student, teacher = spikes([0, 0, 1, 0]).requires_grad_(), spikes([0, 1, 0, 0], height=5.0)
    (got,) = torch.autograd.grad(frame_ctc(student, teacher, torch.tensor([4]), window=1), student)
    aligned = teacher[:, [0, 0, 1, 2]]
    (want,) = torch.autograd.grad(frame_ctc(student, aligned, torch.tensor([4])), student)
    torch.testing.assert_close(got, want)


# Spikes.


def test_spike_mask_is_the_best_symbol_that_is_not_blank() -> None:
    guide = torch.cat([spikes([0, 2, 0, 3]), spikes([1, 1, 1, 0])])
    got = spike_mask(guide, torch.tensor([4, 2]))
    assert got.nonzero().tolist() == [[0, 1, 2], [0, 3, 3], [1, 0, 1], [1, 1, 1]]
    assert spike_mask(guide, torch.tensor([4, 2]), blank=1).nonzero().tolist() == [
        [0, 0, 0], [0, 1, 2], [0, 2, 0], [0, 3, 3],
    ]  # fmt: skip


def test_guided_spikes_equal_the_sum_over_the_mask() -> None:
    student, guide, lengths = normal(4, 6, 5), normal(4, 6, 5, seed=1), torch.tensor([6, 3, 0, 5])
    mask = spike_mask(guide, lengths)
    want = -(student.softmax(2) * mask).sum((1, 2))
    torch.testing.assert_close(guided_spikes(student, guide, lengths, reduction="none"), want)
    want = -2 * (student.log_softmax(2) * mask).sum((1, 2))
    torch.testing.assert_close(guided_spikes(student, guide, lengths, form="log", alpha=2.0, reduction="none"), want)


# N best.


def n_best(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "student": normal(3, 12, 5, seed=seed),
        "lengths": torch.tensor([12, 9, 7]),
        "hypotheses": torch.randint(1, 5, (3, 4, 3), generator=generator),
        "hypothesis_lengths": torch.randint(0, 4, (3, 4), generator=generator),
        "log_scores": normal(3, 4, seed=seed + 1),
    }


def test_one_hypothesis_is_the_ctc_loss() -> None:
    case = {k: v[:, :1] if k in ("hypotheses", "hypothesis_lengths", "log_scores") else v for k, v in n_best().items()}
    case["student"].requires_grad_()
    got = sequence_ctc(**case)
    want = F.ctc_loss(
        case["student"].log_softmax(2).transpose(0, 1),
        case["hypotheses"][:, 0],
        case["lengths"],
        case["hypothesis_lengths"][:, 0],
        reduction="none",
    ).mean()
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(value, case["student"])[0] for value in (got, want)]
    torch.testing.assert_close(*gradients)


def test_the_weights_are_the_teachers_chances() -> None:
    case = n_best()
    each = torch.stack(
        [
            sequence_ctc(
                **{k: v[:, h : h + 1] if k[:3] in ("hyp", "log") else v for k, v in case.items()}, reduction="none"
            )
            for h in range(4)
        ],
        1,
    )
    for temperature in (0.5, 1.0, 4.0):
        want = ((case["log_scores"] / temperature).softmax(1) * each).sum(1)
        torch.testing.assert_close(sequence_ctc(**case, temperature=temperature, reduction="none"), want)


def test_hypotheses_that_do_not_fit_are_left_out() -> None:
    student = normal(3, 4, 5).requires_grad_()
    case = {
        "lengths": torch.tensor([4, 3, 2]),
        # five symbols never fit; 1 1 2 takes four frames, for the blank between the two 1
        "hypotheses": torch.tensor([[[1, 1, 2, 0, 0], [3, 4, 1, 2, 3], [2, 1, 2, 0, 0]]] * 3),
        "hypothesis_lengths": torch.tensor([[3, 5, 3]] * 3),
        "log_scores": normal(3, 3, seed=1),
    }
    got = sequence_ctc(student, **case, reduction="none")
    pick = {k: v[:, [2]] if k != "lengths" else v for k, v in case.items()}
    torch.testing.assert_close(got[1], sequence_ctc(student, **pick, reduction="none")[1])
    pair = {k: v[:, [0, 2]] if k != "lengths" else v for k, v in case.items()}
    torch.testing.assert_close(got[0], sequence_ctc(student, **pair, reduction="none")[0])
    assert got[2].item() == 0
    got.sum().backward()
    assert student.grad.isfinite().all() and torch.equal(student.grad[2], torch.zeros(4, 5).double())


def test_a_score_of_minus_infinity_is_no_hypothesis() -> None:
    case = n_best()
    fewer = {k: v[:, :2] if k[:3] in ("hyp", "log") else v for k, v in case.items()}
    absent = torch.arange(4) >= 2
    case["log_scores"] = case["log_scores"].masked_fill(absent, -torch.inf)
    torch.testing.assert_close(sequence_ctc(**case), sequence_ctc(**fewer))
    case["log_scores"] = torch.full((3, 4), -torch.inf).double()
    assert sequence_ctc(**case).item() == 0


def test_what_stands_beyond_a_length_is_never_looked_at() -> None:
    case = n_best()
    student = case.pop("student")
    plain = student.clone().requires_grad_()
    want = sequence_ctc(plain, **case)
    want.backward()
    beyond = torch.arange(15) >= case["lengths"][:, None]
    padded = F.pad(student, (0, 0, 0, 3)).masked_fill(beyond[..., None], torch.nan).requires_grad_()
    symbols = F.pad(case["hypotheses"], (0, 2))
    case["hypotheses"] = symbols.masked_fill(torch.arange(5) >= case["hypothesis_lengths"][..., None], -100)
    got = sequence_ctc(padded, **case)
    got.backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(padded.grad[:, :12], plain.grad)
    assert torch.equal(padded.grad[:, 12:], torch.zeros(3, 3, 5).double())


def test_empty_hypotheses_and_empty_lists() -> None:
    student = normal(2, 3, 4).requires_grad_()
    lengths, nothing = torch.tensor([3, 2]), torch.zeros(2, 1, 0, dtype=torch.int64)
    got = sequence_ctc(student, lengths, nothing, torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1))
    silent = -student.log_softmax(2)[..., 0]
    torch.testing.assert_close(got, (silent[0].sum() + silent[1, :2].sum()) / 2)
    none = sequence_ctc(student, lengths, nothing[:, :0], torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0))
    none.backward()
    assert none.item() == 0 and torch.equal(student.grad, torch.zeros_like(student))


# Segments.


def test_cuts_are_in_the_middle_of_silent_runs() -> None:
    #        0  1  2  3  4  5  6  7  8  9 10 11
    first = [1, 0, 0, 0, 0, 2, 0, 3, 0, 0, 0, 1]
    second = [0, 0, 0, 1, 2, 3, 1, 0, 0, 0, 0, 0]
    log_probs = torch.cat([spikes(first), spikes(second)]).log_softmax(2)
    got = cut_at_blanks(log_probs, torch.tensor([12, 8]), least=3)
    assert got.tolist() == [[[0, 3], [3, 9], [9, 12]], [[0, 1], [1, 8], [8, 8]]]
    late = cut_at_blanks(log_probs, torch.tensor([12, 8]), least=3, delay=4)
    assert late.tolist() == [[[0, 7], [7, 12], [12, 12]], [[0, 5], [5, 8], [8, 8]]]
    assert cut_at_blanks(log_probs, torch.tensor([12, 8]), least=9).tolist() == [[[0, 12]], [[0, 8]]]
    assert cut_at_blanks(log_probs, torch.tensor([12, 8]), least=1, threshold=0.9999).tolist() == [[[0, 12]], [[0, 8]]]
    assert cut_at_blanks(log_probs[:0], torch.zeros(0, dtype=torch.int64)).shape == (0, 1, 2)


@given(seed=seeds, least=st.integers(1, 4))
@law
def test_segments_cover_the_utterance_once(seed: int, least: int) -> None:
    log_probs = (normal(4, 20, 3, seed=seed) * 4).log_softmax(2)
    lengths = torch.tensor([20, 13, 1, 0])
    segments = cut_at_blanks(log_probs, lengths, least=least, threshold=0.6)
    assert torch.equal(segments[:, 0, 0], torch.zeros(4).long()) and torch.equal(segments[:, -1, 1], lengths)
    assert torch.equal(segments[:, 1:, 0], segments[:, :-1, 1]) and (segments[..., 0] <= segments[..., 1]).all()


def test_one_segment_is_the_utterance() -> None:
    case = n_best()
    student, lengths = case["student"], case["lengths"]
    whole = torch.stack([torch.zeros_like(lengths), lengths], 1)[:, None]
    lists = (case[name][:, None] for name in ("hypotheses", "hypothesis_lengths", "log_scores"))
    torch.testing.assert_close(segment_ctc(student, lengths, whole, *lists), sequence_ctc(**case))


def test_segments_add_up_and_empty_ones_add_nothing() -> None:
    case = n_best()
    student, lengths = case["student"].requires_grad_(), case["lengths"]
    segments = torch.tensor([[[0, 5], [5, 12], [12, 12]], [[0, 4], [4, 4], [4, 9]], [[0, 7], [7, 7], [7, 7]]])
    lists = [case[name][:, None].repeat(1, 3, *(1,) * (case[name].dim() - 1)) for name in list(case)[2:]]
    got = segment_ctc(student, lengths, segments, *lists, reduction="none")
    want = torch.zeros(3, dtype=torch.float64)
    for b, s in ((0, 0), (0, 1), (1, 0), (1, 2), (2, 0)):
        first, end = segments[b, s].tolist()
        part = sequence_ctc(
            student[b : b + 1, first:end], torch.tensor([end - first]), *(x[b : b + 1, s] for x in lists)
        )
        want = want + F.one_hot(torch.tensor(b), 3) * part
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (got, want)]
    torch.testing.assert_close(*grads)
    none = segment_ctc(student, lengths, torch.zeros_like(segments), *lists)
    none.backward()
    assert none.item() == 0 and torch.equal(student.grad, torch.zeros_like(student))


def test_cuts_and_segments_work_together() -> None:
    teacher = spikes([1, 0, 0, 0, 2, 0, 0, 0, 3])
    lengths = torch.tensor([9])
    segments = cut_at_blanks(teacher.log_softmax(2), lengths, least=3)
    hypotheses = torch.tensor([[[[1]], [[2]], [[3]]]])
    ones = torch.ones(1, 3, 1, dtype=torch.int64)
    good = segment_ctc(teacher, lengths, segments, hypotheses, ones, torch.zeros(1, 3, 1))
    bad = segment_ctc(teacher, lengths, segments, hypotheses.flip(1), ones, torch.zeros(1, 3, 1))
    assert good.item() < 0.1 and bad.item() > 5


# Decoders.


def test_words_are_soft_targets_of_the_valid_tokens() -> None:
    student, teacher, lengths = normal(2, 5, 4), normal(2, 5, 4, seed=1), torch.tensor([5, 2])
    got = word_level(student, teacher, lengths, temperature=2.0, reduction="none")
    want = [soft_targets(student[b, :n], teacher[b, :n], temperature=2.0) for b, n in enumerate((5, 2))]
    torch.testing.assert_close(got, torch.stack(want))
    assert word_level(student, teacher, torch.zeros(2, dtype=torch.int64)).item() == 0


def test_one_beam_is_the_cross_entropy_of_its_tokens() -> None:
    student, tokens, sizes = normal(2, 1, 5, 4), torch.tensor([[[1, 2, 3, 0, 1]], [[0, 2, 9, 9, 9]]]), [5, 2]
    got = sequence_level(student, tokens, torch.tensor(sizes)[:, None], torch.zeros(2, 1), reduction="none")
    want = [F.cross_entropy(student[b, 0, :n], tokens[b, 0, :n], reduction="sum") for b, n in enumerate(sizes)]
    torch.testing.assert_close(got, torch.stack(want))


def test_padding_of_beams_is_never_looked_at() -> None:
    student, tokens = normal(2, 3, 4, 5), torch.randint(5, (2, 3, 4), generator=torch.Generator().manual_seed(0))
    sizes, scores = torch.tensor([[4, 2, 0], [1, 3, 2]]), normal(2, 3, seed=1)
    plain = student.clone().requires_grad_()
    want = sequence_level(plain, tokens, sizes, scores)
    want.backward()
    beyond = torch.arange(6) >= sizes[..., None]
    padded = F.pad(student, (0, 0, 0, 2)).masked_fill(beyond[..., None], torch.nan).requires_grad_()
    poisoned = F.pad(tokens, (0, 2)).masked_fill(beyond, -7)
    got = sequence_level(padded, poisoned, sizes, scores)
    got.backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(padded.grad[:, :, :4], plain.grad)
    # a third hypothesis of length 0 is none: the weights are those of the other two
    first = sequence_level(student[:1, :2], tokens[:1, :2], sizes[:1, :2], scores[:1, :2])
    torch.testing.assert_close(sequence_level(student[:1], tokens[:1], sizes[:1], scores[:1]), first)
    assert sequence_level(student, tokens, torch.zeros_like(sizes), scores).item() == 0


def test_out_of_range_options_are_named() -> None:
    student, teacher, lengths = normal(3, 12, 5), normal(3, 12, 5, seed=1), torch.tensor([12, 9, 7])
    case = n_best()
    beam = (normal(3, 4, 3, 5), case["hypotheses"], case["hypothesis_lengths"], case["log_scores"])
    whole = torch.stack([torch.zeros_like(lengths), lengths + 1], 1)[:, None].clamp(max=12)
    lists = [case[name][:, None] for name in ("hypotheses", "hypothesis_lengths", "log_scores")]
    wrong: list[tuple[str, object]] = [
        (
            r"lengths: wanted 0..12, got 7..13",
            lambda: frame_ctc(student, teacher, lengths.clamp(max=9) + 4 * (lengths > 9)),
        ),
        (r"lengths: wanted int64, got torch.int32", lambda: frame_ctc(student, teacher, lengths.int())),
        (r"blank: wanted a class in 0..4, got 5", lambda: frame_ctc(student, teacher, lengths, blank=5)),
        (r"at least 2 classes, got 1", lambda: frame_ctc(student[..., :1], teacher[..., :1], lengths)),
        (r"blank_threshold: .*got 1.5", lambda: frame_ctc(student, teacher, lengths, blank_threshold=1.5)),
        (r"blank_weight: .*got -1", lambda: frame_ctc(student, teacher, lengths, blank_weight=-1)),
        (r"delay: wanted at least 0, got -1", lambda: frame_ctc(student, teacher, lengths, delay=-1)),
        (r"monotone: .*got window 0", lambda: frame_ctc(student, teacher, lengths, monotone=True)),
        (r"alpha: .*got 0", lambda: guided_spikes(student, teacher, lengths, alpha=0)),
        (r"form: .*got 'odds'", lambda: guided_spikes(student, teacher, lengths, form="odds")),
        (r"hypotheses: .*other than the blank 1, got 1", lambda: sequence_ctc(**case, blank=1)),
        (r"hypotheses: wanted classes in 0..1 ", lambda: sequence_ctc(**{**case, "student": student[..., :2]})),
        (r"chunk_size: wanted at least 1", lambda: sequence_ctc(**case, chunk_size=0)),
        (r"temperature: .*got 0", lambda: sequence_ctc(**case, temperature=0)),
        (
            r"hypothesis_lengths: wanted 0..3, got 9..9",
            lambda: sequence_ctc(**{**case, "hypothesis_lengths": torch.full((3, 4), 9)}),
        ),
        (r"segments: wanted 0 <= first", lambda: segment_ctc(student, lengths, whole, *lists)),
        (r"hypotheses: wanted classes in 0..3, got 4", lambda: sequence_level(beam[0][..., :4], *beam[1:])),
        (r"least: wanted at least 1, got 0", lambda: cut_at_blanks(teacher, lengths, least=0)),
        (r"threshold: .*got 1", lambda: cut_at_blanks(teacher, lengths, threshold=1.0)),
    ]
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            call()
