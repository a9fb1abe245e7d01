"""The training loop against loops written out here, its early stopping, its errors, and what a second start does."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdcore.checkpoint import load_state, save_state
from kdcore.config import UserError
from kdcore.run import read_log
from kdcore.trainer import Batch, TeachingStep, Trainer, iterate_rows
from kdcore.trainer_config import TrainerConfig
from tests.kdcore.kill_server import ToyStep


class LinearStep(TeachingStep):
    """Least squares on fixed rows, some of which do not count for the second term: everything can be worked out."""

    def __init__(self, *, rows: int = 14, batch_size: int = 4, scores: list[float] | None = None) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(0)
        self.student: nn.Module = nn.Linear(3, 2).double()
        with torch.no_grad():
            for parameter in self.student.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=source))
        self.x = torch.randn(rows, 3, generator=source, dtype=torch.float64)
        self.y = torch.randn(rows, 2, generator=source, dtype=torch.float64)
        self.counted = torch.rand(rows, generator=source) < 0.6
        self.weights = {"squared": 1.0, "counted": 0.3}
        self.batch_size, self.rate = batch_size, 0.05
        # what validation says, epoch by epoch; None: the loss on all rows
        self.scores, self.validations, self.begun = scores, 0, 0

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9)

    def begin_epoch(self, epoch: int, generator: torch.Generator) -> None:
        self.begun += 1

    def batch_count(self) -> int:
        return math.ceil(len(self.x) / self.batch_size)

    def batches(self, epoch: int, generator: torch.Generator) -> Iterable[Batch]:
        for rows in iterate_rows(torch.randperm(len(self.x), generator=generator), self.batch_size):
            yield {"x": self.x[rows], "y": self.y[rows], "counted": self.counted[rows]}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"squared": len(batch["x"]), "counted": int(batch["counted"].sum())}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        error = (self.student(batch["x"]) - batch["y"]).square().sum(dim=1)
        return {"squared": error.sum(), "counted": error.sqrt()[batch["counted"]].sum()}

    def validate(self) -> dict[str, float]:
        self.validations += 1
        if self.scores is not None:
            return {"score": self.scores[self.validations - 1]}
        return {"score": -float((self.student(self.x) - self.y).square().mean())}


def make(seed: int = 1, folder: Path | None = None, key: str = "", **config: Any) -> Trainer:
    base = {"monitor": "score", "max_epochs": 3, "accelerator": "cpu", "tensorboard": False, "checkpoint_seconds": 0}
    return Trainer(TrainerConfig(**{**base, **config}), seed=seed, folder=folder, key=key)


def by_hand(step: LinearStep, trainer: Trainer, group: int, clip: float) -> dict[str, Tensor]:
    """Train as the documentation says, in the plainest form; return the last epoch's weights."""
    optimizer, weights = step.optimizer(), list(step.parameters())
    for epoch in range(trainer.config.max_epochs):
        rows = torch.randperm(len(step.x), generator=trainer._generator(epoch, 0)).split(step.batch_size * group)
        for some in rows:
            error = (step.student(step.x[some]) - step.y[some]).square().sum(dim=1)
            counted = step.counted[some]
            loss = error.mean() + 0.3 * (error.sqrt()[counted].mean() if counted.any() else 0.0)
            optimizer.zero_grad()
            loss.backward()
            norm = math.sqrt(sum(float(weight.grad.square().sum()) for weight in weights if weight.grad is not None))
            for weight in weights:
                assert weight.grad is not None
                weight.grad *= min(1.0, clip / norm) if clip else 1.0
            optimizer.step()
    return {name: value.clone() for name, value in step.student.state_dict().items()}


@pytest.mark.parametrize(("accumulate", "clip"), [(1, 0.0), (1, 0.1), (2, 0.0), (3, 0.1), (99, 0.0)])
def test_equals_a_plain_loop_with_batches_as_large_as_what_is_accumulated(accumulate: int, clip: float) -> None:
    """The mean is over the items of the whole group, although groups, batches and valid items are of unequal number."""
    taught, plain = LinearStep(), LinearStep()
    trainer = make(accumulate=accumulate, gradient_clip=clip)
    trainer.config = TrainerConfig(**{**vars(trainer.config), "monitor": "score"})
    taught.scores = [1.0, 2.0, 3.0]  # the last epoch is the best
    result = trainer.fit(taught)
    for name, value in by_hand(plain, trainer, accumulate, clip).items():
        torch.testing.assert_close(taught.student.state_dict()[name], value, rtol=0, atol=1e-12 if not clip else 1e-7)
    assert result.steps == 3 * math.ceil(4 / accumulate)
    assert result.epochs == 3


def test_logged_terms_are_means_over_the_epoch(tmp_path: Path) -> None:
    step = LinearStep()
    step.rate = 0.0
    make(folder=tmp_path, max_epochs=1).fit(step)
    error = (step.student(step.x) - step.y).square().sum(dim=1).detach()
    batches = torch.randperm(14, generator=make()._generator(0, 0)).split(4)
    wanted = sum(float(error[rows].mean()) for rows in batches) / 4
    assert read_log(tmp_path / "log.jsonl")[0]["terms"]["squared"] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("mode", "patience", "scores", "best", "epochs"),
    [
        ("max", 2, [1.0, 3.0, 2.0, 3.0, 9.0], 1, 4),
        ("min", 2, [3.0, 1.0, 2.0, 1.0, 0.0], 1, 4),
        ("max", 0, [5.0, 1.0, 1.0, 1.0, 1.0], 0, 5),
        ("max", 1, [1.0, 2.0, 3.0, 4.0, 5.0], 4, 5),
    ],
)
def test_early_stopping_keeps_the_best_weights(
    mode: str, patience: int, scores: list[float], best: int, epochs: int
) -> None:
    step = LinearStep(scores=scores)
    result = make(mode=mode, patience=patience, max_epochs=5).fit(step)
    assert (result.best_epoch, result.epochs) == (best, epochs)
    assert result.best_metrics == {"score": scores[best]}
    reference = LinearStep(scores=[float(number) for number in range(best + 1)])
    make(max_epochs=best + 1).fit(reference)
    for name, value in reference.student.state_dict().items():
        assert torch.equal(step.student.state_dict()[name], value), "not the weights of the best epoch"


def test_validates_every_so_often_and_at_the_end() -> None:
    step = LinearStep(scores=[1.0, 2.0, 3.0])
    result = make(validate_every=2, max_epochs=5, patience=1).fit(step)
    assert (step.validations, result.best_epoch) == (3, 4)


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    a, b = make(seed=1), make(seed=1)
    torch.rand(3)
    orders = [torch.randperm(50, generator=a._generator(epoch, 0)).tolist() for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert orders[1] == torch.randperm(50, generator=b._generator(1, 0)).tolist()
    assert orders[0] != torch.randperm(50, generator=make(seed=2)._generator(0, 0)).tolist()
    assert orders[0] != torch.randperm(50, generator=a._generator(0, 1)).tolist()


def test_bf16_trains_with_float32_weights() -> None:
    steps = [LinearStep(), LinearStep()]
    for step, precision in zip(steps, ("32-true", "bf16-mixed"), strict=True):
        step.student.float()
        step.x, step.y = step.x.float(), step.y.float()
        make(precision=precision).fit(step)
    for exact, rough in zip(*(step.parameters() for step in steps), strict=True):
        assert rough.dtype == torch.float32
        assert not torch.equal(exact, rough), "nothing was computed in bf16"
        torch.testing.assert_close(exact, rough, rtol=0, atol=0.02)


def test_loss_that_is_no_number_names_term_epoch_and_step(tmp_path: Path) -> None:
    step = LinearStep()
    step.x[5] = math.nan
    with pytest.raises(FloatingPointError, match=r"loss term 'squared' became nan in epoch 0, step [0-3]$"):
        make(folder=tmp_path).fit(step)
    if (tmp_path / "last.safetensors").exists():
        kept = load_state(tmp_path / "last.safetensors")["module"]
        assert all(bool(torch.isfinite(value).all()) for value in kept.values()), "broken weights were saved"


def test_gradient_that_is_no_number_is_an_error_when_clipping() -> None:
    step = LinearStep()
    step.counted[:] = True
    with torch.no_grad():  # sqrt has no slope where the error is exactly zero
        step.y.copy_(step.student(step.x))
    with pytest.raises(FloatingPointError, match="gradient's norm became nan in epoch 0, step 0"):
        make(gradient_clip=1.0).fit(step)


def test_monitor_must_be_a_finite_validation_metric() -> None:
    with pytest.raises(UserError, match=r"trainer.monitor: got 'ndcg@10', wanted one of score"):
        make(monitor="ndcg@10").fit(LinearStep())
    with pytest.raises(FloatingPointError, match="validation score became nan"):
        make().fit(LinearStep(scores=[math.nan]))


def test_a_metric_beside_the_monitor_may_be_nan(tmp_path: Path) -> None:
    step = LinearStep()
    step.validate = lambda: {"score": 1.0, "other": math.nan}  # type: ignore[method-assign]
    make(folder=tmp_path, max_epochs=1).fit(step)
    assert read_log(tmp_path / "log.jsonl")[0]["validation"] == {"score": 1.0, "other": None}
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()


def test_a_run_that_is_done_loads_its_best_weights_and_trains_no_more(tmp_path: Path) -> None:
    options = {"monitor": "error", "mode": "min"}
    first = ToyStep()
    done = make(folder=tmp_path, key="a", **options).fit(first)
    log, files = (tmp_path / "log.jsonl").read_bytes(), sorted(tmp_path.iterdir())
    again = ToyStep(seed=5)
    again.batches = again.validate = again.begin_epoch = None  # type: ignore[method-assign,assignment]
    assert make(folder=tmp_path, key="a", **options).fit(again) == done
    buffers = [name for name, _ in first.student.named_buffers()]
    assert buffers, "batch normalisation has buffers, and they belong to the best weights"
    for name, value in first.student.state_dict().items():
        assert torch.equal(again.student.state_dict()[name], value)
    assert (tmp_path / "log.jsonl").read_bytes() == log
    assert sorted(tmp_path.iterdir()) == files


def test_a_checkpoint_of_another_key_is_thrown_away_with_a_notice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(folder=tmp_path, key="a").fit(LinearStep())
    capsys.readouterr()
    fresh = LinearStep(scores=[1.0])
    with pytest.raises(IndexError):  # killed, so to speak, in its second validation
        make(folder=tmp_path, key="b").fit(fresh)
    said = capsys.readouterr().err
    assert "last.safetensors: of other data or settings, thrown away; training starts again" in said
    assert fresh.begun == 2
    assert [event["epoch"] for event in read_log(tmp_path / "log.jsonl")] == [0]
    assert load_state(tmp_path / "best.safetensors")["key"] == "b"
    go_on = LinearStep(scores=[2.0, 3.0])
    make(folder=tmp_path, key="b").fit(go_on)
    assert go_on.begun == 1 and go_on.validations == 2, "epoch 1 was begun before the kill, epoch 2 was not"
    assert "thrown away" not in capsys.readouterr().err


def test_best_weights_of_another_run_do_not_outlive_its_checkpoint(tmp_path: Path) -> None:
    make(folder=tmp_path, key="a").fit(LinearStep())
    with pytest.raises(IndexError):
        make(folder=tmp_path, key="b").fit(LinearStep(scores=[]))
    assert not (tmp_path / "best.safetensors").exists()


def test_damaged_checkpoints_are_one_line_naming_the_file(tmp_path: Path) -> None:
    rising = [1.0, 2.0, 3.0]
    make(folder=tmp_path).fit(LinearStep(scores=rising))
    last, best = tmp_path / "last.safetensors", tmp_path / "best.safetensors"
    whole = last.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\xff" * 100):
        last.write_bytes(damaged)
        with pytest.raises(UserError, match=r"last\.safetensors.*delete .*last\.safetensors to start again"):
            make(folder=tmp_path).fit(LinearStep())
    last.write_bytes(whole)
    state = load_state(last)
    assert state["best"]["model"] is not None  # the last epoch is the best here, so its weights stand in the state
    save_state(last, {**state, "best": {**state["best"], "model": None}})
    make(folder=tmp_path).fit(LinearStep())
    best.unlink()
    with pytest.raises(UserError, match=r"best\.safetensors: holds nothing, wanted epoch 2"):
        make(folder=tmp_path).fit(LinearStep())


def test_checkpoint_of_another_model_under_the_same_key(tmp_path: Path) -> None:
    make(folder=tmp_path, max_epochs=1).fit(LinearStep())
    other = LinearStep()
    other.student = nn.Linear(4, 2).double()
    with pytest.raises(UserError, match="another model or version"):
        make(folder=tmp_path, max_epochs=1).fit(other)


def test_threads_are_set_for_training_only() -> None:
    before = torch.get_num_threads()
    step, seen = LinearStep(), []
    validate = step.validate
    step.validate = lambda: (seen.append(torch.get_num_threads()), validate())[1]  # type: ignore[method-assign,func-returns-value]
    make(threads=before + 1, max_epochs=1).fit(step)
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_epochs": 0},
        {"validate_every": 0},
        {"accumulate": 0},
        {"patience": -1},
        {"gradient_clip": math.nan},
        {"checkpoint_seconds": -1.0},
        {"threads": -2},
        {"mode": "best"},
        {"precision": "16-mixed"},
        {"accelerator": "abacus"},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"trainer.{next(iter(wrong))}: got "):
        TrainerConfig(**wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device here")
def test_accelerator_that_is_not_there_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match=r"trainer.accelerator cuda"):
        make(accelerator="cuda")


def test_shards_cover_the_batch_and_no_row_twice() -> None:
    batch = {"row": torch.arange(11), "wide": torch.arange(22).view(11, 2)}
    parts = [LinearStep().shard(batch, rank, 3) for rank in range(3)]
    assert sorted(torch.cat([part["row"] for part in parts]).tolist()) == list(range(11))
    assert all(torch.equal(part["wide"][:, 0], 2 * part["row"]) for part in parts)
