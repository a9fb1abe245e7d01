"""The teaching step of CTC models: what terms see, what is learned, exact resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jiwer
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from apps.speech.augment import Augment
from apps.speech.data.store import FeatureStore
from apps.speech.decode.greedy import greedy
from apps.speech.distill import Optimization, SpeechStep, Utterances, ctc
from apps.speech.fitting import all_log_probs
from apps.speech.models import AcousticModel, new_model
from kdcore.checkpoint import load_state
from kdcore.teaching import Term
from kdcore.trainer import Trainer
from kdcore.trainer_config import TrainerConfig
from tests.speech.made import BLANK, SYMBOLS, store, utterances

TINY = {
    **{"channels": (4, 8), "width": 32, "hidden": 48, "layers": 1},
    **{"convolutions": 1, "kernel": 5, "dropout": 0.0},
}


def model(seed: int = 0, **options: object) -> AcousticModel:
    torch.manual_seed(seed)
    made = new_model("conv_rnn", SYMBOLS + 1, {**TINY, **options})
    made.set_statistics(torch.full((80,), -12.0), torch.full((80,), 4.0))
    return made


def errors(made: AcousticModel, held: FeatureStore, labels: list[list[int]]) -> float:
    said = {row: greedy(log_probs).ids for row, log_probs in all_log_probs(made, held)}
    texts = [" ".join(map(str, said[row])) for row in range(len(held))]
    return float(jiwer.wer([" ".join(map(str, row)) for row in labels], texts))


def step_of(
    epochs: int, data: Utterances | None = None, made: AcousticModel | None = None, **options: object
) -> SpeechStep:
    held, labels = store(30, seed=9)
    return SpeechStep(
        made or model(),
        data or utterances(60),
        lambda student: {"wer": errors(student, held, labels)},
        epochs=epochs,
        optimization=Optimization(learning_rate=0.01, batch_frames=300),
        **options,  # type: ignore[arg-type]
    )


def fit(step: SpeechStep, epochs: int, folder: Path | None = None) -> dict[str, float]:
    config = TrainerConfig(
        max_epochs=epochs,
        patience=0,
        monitor="wer",
        mode="min",
        gradient_clip=5.0,
        threads=1,
        tensorboard=False,
        accelerator="cpu",
        checkpoint_seconds=0,
    )
    return Trainer(config, seed=0, folder=folder, key="k", quiet=True).fit(step).best_metrics


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_student_learns_to_read_tones(cell: str) -> None:
    assert fit(step_of(14, made=model(cell=cell)), 14)["wer"] < 0.1


def test_ctc_is_minus_log_p_of_the_labelled_rows() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 9, 5), torch.tensor([[0, 1], [2, 0], [3, 3]])
    lengths, sizes = torch.tensor([9, 7, 9]), torch.tensor([2, 1, 2])
    mask = torch.tensor([True, False, True])
    got = ctc(logits, lengths, labels, sizes, mask=mask, blank=4, reduction="sum")
    expected = sum(
        F.ctc_loss(
            logits[row, : lengths[row]].log_softmax(1)[:, None],
            labels[row : row + 1, : sizes[row]],
            lengths[row : row + 1],
            sizes[row : row + 1],
            blank=4,
            reduction="sum",
        )
        for row in (0, 2)
    )
    torch.testing.assert_close(got, expected)
    nothing = ctc(logits.requires_grad_(), lengths, labels, sizes, mask=torch.zeros(3, dtype=torch.bool), blank=4)
    nothing.backward()
    assert nothing == 0 and logits.grad is not None and not logits.grad.any()


def test_batches_hold_each_row_once_in_some_view_with_its_labels() -> None:
    one, labels = store(20)
    other = FeatureStore(Path("."), one.frames + 100, one.offsets)
    data = Utterances([one, other], labels, np.arange(3, 20))
    step = step_of(2, data)
    batches = list(step.batches(0, torch.Generator().manual_seed(1)))
    assert sum(len(batch["features"]) for batch in batches) == 17
    seen: set[tuple[int, ...]] = set()
    moved = 0
    for batch in batches:
        for row in range(len(batch["features"])):
            seen.add(tuple(batch["labels"][row, : batch["label_lengths"][row]].tolist()))
            moved += bool(batch["features"][row, : batch["feature_lengths"][row]].mean() > 0)
        assert torch.equal(batch["lengths"], (batch["feature_lengths"] + 3) // 4)
    assert seen == {tuple(each) for each in labels[3:]} and 0 < moved < 17
    assert step.batch_count() == pytest.approx(len(batches), abs=2)


def test_rows_without_a_text_are_taught_by_the_teacher_alone() -> None:
    made, labels = store(8)
    partly = Utterances([made], [None if row % 2 else each for row, each in enumerate(labels)], np.arange(8))
    step = step_of(1, partly, terms=[Term("size", lambda student, reduction: student.pow(2).mean((1, 2)).sum())])
    batch = step._batch(np.arange(8), np.zeros(8, np.int64))
    assert step.counts(batch) == {"ctc": 4, "size": 8}
    silent = Utterances([made], [None] * 8, np.arange(8))
    with pytest.raises(ValueError, match="terms: wanted at least one"):
        step_of(1, silent)


def test_the_learning_rate_rises_and_falls() -> None:
    plan = Optimization(learning_rate=1.0, warm_up=0.1, final=0.2)
    assert plan.rate(0.05) == pytest.approx(0.5) and plan.rate(0.1) == pytest.approx(1.0)
    assert plan.rate(0.55) == pytest.approx(0.6) and plan.rate(1.0) == pytest.approx(0.2)
    step = step_of(4)
    optimizer = step.optimizer()
    rates = [optimizer.param_groups[0]["lr"] for epoch in range(4) for _ in step.batches(epoch, torch.Generator())]
    assert max(rates) <= 0.01 and rates[0] < rates[2] and rates[-1] < 0.002


@pytest.mark.parametrize(
    "wrong", [{"learning_rate": 0.0}, {"warm_up": 1.0}, {"final": 2.0}, {"batch_frames": 0}, {"weight_decay": -1.0}]
)
def test_optimization_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="optimization: wanted"):
        Optimization(**wrong)  # type: ignore[arg-type]


class Interrupted(SpeechStep):
    """Stops like a killed process before a batch."""

    fail_at, made = -1, 0

    def batches(self, epoch: int, generator: torch.Generator):  # type: ignore[no-untyped-def]
        for batch in super().batches(epoch, generator):
            self.made += 1
            if self.made == self.fail_at:
                raise InterruptedError
            yield batch


def test_resumed_inside_an_epoch_to_the_bit(tmp_path: Path) -> None:
    def step(fail_at: int) -> Interrupted:
        made = Interrupted(
            model(),
            utterances(30),
            lambda student: {"wer": 0.5},
            epochs=3,
            augment=Augment(),
            optimization=Optimization(batch_frames=600),
        )
        made.fail_at = fail_at
        return made

    fit(step(-1), 3, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        fit(step(step(-1).batch_count() + 3), 3, tmp_path / "torn")
    fit(step(-1), 3, tmp_path / "torn")
    one, other = (load_state(tmp_path / name / "last.safetensors") for name in ("whole", "torn"))
    for part in ("module", "optimizer", "random"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)
    assert model().classes - 1 == BLANK


def test_rows_with_a_text_are_repeated_evenly_to_the_frames_of_all() -> None:
    whole = utterances(12)
    mixed = replace(whole, labels=[None if row % 3 == 0 else label for row, label in enumerate(whole.labels)])
    known = mixed.with_texts()
    assert known.rows.tolist() == [row for row in range(12) if row % 3]
    again = mixed.with_texts(as_long=True).rows
    counts = np.bincount(again, minlength=12)
    assert set(counts[known.rows]) == {1, 2} and not counts[::3].any()
    lengths = mixed.views[0].lengths
    assert abs(int(lengths[again].sum()) - int(lengths.sum())) <= 2 * lengths.max()
    assert whole.with_texts(as_long=True).rows.tolist() == whole.rows.tolist()
