"""Fits of the study: one seed's split, its teacher and what it puts out, and a student under any terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from benchmarks.forms.data import Split, split, strips
from benchmarks.forms.networks import STUDENT, TEACHER, Network, accuracy, network, strip_accuracy
from kdcore.run import atomic_path
from kdcore.teaching import DistillationStep, Learning, Schedule, Taps, Term, labels_term
from kdcore.teaching.step import frozen
from kdcore.trainer import TeachingStep, Trainer
from kdcore.trainer_config import TrainerConfig

TAPS = {
    "block1": "block1",
    "block2": "block2",
    "attention": "mixer.weights",
    "values": "mixer.value",
    "places": "mixer",
    "embedding": "embedding",
}
# epochs, and rows a batch
EPOCHS, BATCH = {"digits": 40, "mnist": 15}, {"digits": 64, "mnist": 64}
# CTC writes blanks for some hundred updates before it writes anything, so strips take more of them
STRIP_EPOCHS = {"digits": 40, "mnist": 80}
# the student alone is tried with each on validation; what is taught takes the best of them
LEARNING_RATES = (1e-2, 2e-2, 4e-2)
TEACHER_RATE = 3e-3
STRIPS, DIGITS_A_STRIP = {"train": 400, "valid": 300, "test": 1000}, 3


def fit(step: TeachingStep, seed: int, epochs: int, *, monitor: str = "accuracy") -> TeachingStep:
    """Train a step with the one trainer, on one thread, to its best validation epoch."""
    config = TrainerConfig(
        max_epochs=epochs, patience=0, monitor=monitor, threads=1, tensorboard=False, accelerator="cpu"
    )
    Trainer(config, seed=seed, quiet=True).fit(step)
    return step


@dataclass
class Study:
    """One data set and one seed."""

    data: str
    seed: int
    # where teachers are kept
    folder: Path
    learning_rate: float = LEARNING_RATES[1]

    @property
    def epochs(self) -> int:
        """Epochs of every student, taught or not, and of the teacher."""
        return EPOCHS[self.data]

    @property
    def strip_epochs(self) -> int:
        """Epochs of every network that reads strips."""
        return STRIP_EPOCHS[self.data]

    @property
    def learning(self) -> Learning:
        """How every student learns."""
        return self.learning_over(self.epochs)

    def learning_over(self, epochs: int, rate: float | None = None) -> Learning:
        """Return how a network learns in so many epochs: to its end, by a cosine from the learning rate to 0."""
        start = self.learning_rate if rate is None else rate
        return Learning(BATCH[self.data], Schedule(start, 0.0, "cosine", epochs=epochs))

    @cached_property
    def split(self) -> Split:
        """The rows of this seed."""
        return split(self.data, self.seed)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Return a network's accuracy on the validation rows."""
        return {"accuracy": accuracy(model, self.split.valid)}

    def test(self, model: nn.Module) -> float:
        """Return a network's accuracy on the test rows."""
        return accuracy(model, self.split.test)

    def student(self) -> Network:
        """Return a fresh student, the same for every form."""
        return network(STUDENT, 1000 + self.seed)

    def train_teacher(
        self, seed: int | None = None, part: dict[str, Tensor] | None = None, classes: int = 10
    ) -> Network:
        """Train a network of the teacher's size on labels; by default on all training rows."""
        teacher = network(TEACHER, self.seed if seed is None else seed, classes)
        rows = self.split.train if part is None else part
        learning = self.learning_over(self.epochs, TEACHER_RATE)
        step = DistillationStep(teacher, rows, [labels_term()], validate=self.validate, learning=learning)
        fit(step, self.seed, self.epochs)
        return teacher

    @cached_property
    def teacher(self) -> Network:
        """The teacher of this seed, trained on the same rows as its students; kept in ``folder``."""
        return self._kept("teacher", self.train_teacher, lambda: network(TEACHER, self.seed))

    def _kept(self, name: str, train: Callable[[], Network], make: Callable[[], Network]) -> Network:
        file = self.folder / f"{name}-{self.data}-{self.seed}.safetensors"
        if file.exists():
            model = make()
            model.load_state_dict(load_file(file))
        else:
            model = train()
            with atomic_path(file) as temporary:
                temporary.write_bytes(save(dict(model.state_dict())))
        frozen(model.eval())
        return model

    @cached_property
    def said(self) -> dict[str, Tensor]:
        """What the teacher puts out on the training rows: ``teacher`` and ``teacher.TAP``; made once, it is fixed."""
        return outputs(self.teacher, self.split.train["inputs"])

    def alone(self, learning_rate: float) -> DistillationStep:
        """Return the step of a student without a teacher."""
        learning = self.learning_over(self.epochs, learning_rate)
        return DistillationStep(
            self.student(), self.split.train, [labels_term()], validate=self.validate, learning=learning
        )

    # strips of digits, for the losses of sequences

    @cached_property
    def strips(self) -> dict[str, dict[str, Tensor]]:
        """Strips made of the digits of each part."""
        return {
            part: strips(getattr(self.split, part), count, DIGITS_A_STRIP, self.seed) for part, count in STRIPS.items()
        }

    def validate_strips(self, model: nn.Module) -> dict[str, float]:
        """Return the share of validation strips read without an error."""
        return {"accuracy": strip_accuracy(model, self.strips["valid"])}

    def test_strips(self, model: nn.Module) -> float:
        """Return the share of test strips read without an error."""
        return strip_accuracy(model, self.strips["test"])

    def strip_step(
        self,
        model: nn.Module,
        terms: Sequence[Term],
        extra: Mapping[str, Tensor] | None = None,
        rate: float | None = None,
    ) -> DistillationStep:
        """Return a step that reads strips: CTC on the labels, and terms on what ``extra`` holds a strip."""
        learning = self.learning_over(self.strip_epochs, rate)
        rows = {**self.strips["train"], **(extra or {})}
        return DistillationStep(
            model,
            rows,
            [Term("ctc", ctc, {"labels": "labels"}), *terms],
            validate=self.validate_strips,
            learning=learning,
        )

    @cached_property
    def strip_teacher(self) -> Network:
        """The teacher that reads strips."""

        def make() -> Network:
            return network(TEACHER, self.seed, 11, columns=True)

        def train() -> Network:
            teacher = make()
            fit(self.strip_step(teacher, [], rate=TEACHER_RATE), self.seed, self.strip_epochs)
            return teacher

        return self._kept("strip-teacher", train, make)

    def strip_student(self) -> Network:
        """Return a fresh student that reads strips."""
        return network(STUDENT, 1000 + self.seed, 11, columns=True)


def ctc(student: Tensor, labels: Tensor, *, reduction: str = "mean") -> Tensor:
    """Return the CTC loss of strips: logits [B, T, C] with blank 0, labels [B, U] without padding."""
    log_probs = torch.log_softmax(student, 2).transpose(0, 1)
    rows = torch.full((len(student),), student.shape[1])
    sizes = torch.full((len(student),), labels.shape[1])
    value: Tensor = nn.functional.ctc_loss(log_probs, labels, rows, sizes, reduction="sum", zero_infinity=True)
    return value / len(student) if reduction == "mean" else value


def outputs(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Return a frozen network's answers and tapped layers for all inputs."""
    with torch.no_grad(), Taps(model, TAPS) as taps:
        answer = model(inputs)
        return {"teacher": answer, **{f"teacher.{name}": value for name, value in taps.take().items()}}
