"""Every way of teaching on the pair, each beside a control that differs in the teaching alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.forms.networks import STUDENT, TEACHER, Network, accuracy, network
from benchmarks.forms.study import Study, fit
from kdcore import teaching
from kdcore.teaching import DistillationStep, Learning, Term, labels_term
from kdcore.trainer import FitResult

Way = Callable[[Study], dict[str, Any]]
WAYS: dict[str, Way] = {}
TEMPERATURE, SOFT = 4.0, 0.5


def way(name: str) -> Callable[[Way], Way]:
    """Return a decorator that enters a way into the study."""

    def enter(function: Way) -> Way:
        WAYS[name] = function
        return function

    return enter


def run(study: Study, name: str) -> dict[str, Any]:
    """Return what came of a way on one seed: ``student`` and ``alone`` (the control) by ``metric``, and more."""
    return WAYS[name](study)


def result(student: float, alone: float, control: str = "student alone", metric: str = "accuracy", **more: Any) -> Any:
    """Return a row of the study."""
    return {"student": student, "alone": alone, "control": control, "metric": metric, **more}


def soft(weight: float = SOFT) -> Term:
    """Return the soft targets every way uses."""
    return Term("soft_targets", "soft_targets", options={"temperature": TEMPERATURE}, weight=weight)


def trained(study: Study, step: DistillationStep, epochs: int | None = None) -> nn.Module:
    """Train a step and return its student."""
    return fit(step, study.seed, study.epochs if epochs is None else epochs).student


def on_labels(study: Study, model: nn.Module, rows: dict[str, Tensor] | None = None) -> nn.Module:
    """Train a model on labels alone."""
    step = DistillationStep(
        model,
        study.split.train if rows is None else rows,
        [labels_term()],
        validate=study.validate,
        learning=study.learning,
    )
    return trained(study, step)


def under(
    study: Study, model: nn.Module, teacher: nn.Module | None, stage: int = 0, epochs: int | None = None
) -> FitResult:
    """Train a model on labels and, if there is one, under a teacher."""
    terms = [labels_term()] + ([soft()] if teacher is not None else [])
    step = DistillationStep(
        model,
        study.split.train,
        terms,
        validate=study.validate,
        teachers=[teacher] if teacher is not None else [],
        learning=study.learning_over(epochs or study.epochs),
    )
    trained(study, step, epochs)
    return FitResult()


_ALONE: dict[tuple[str, int, float], float] = {}


def alone(study: Study) -> float:
    """Return the test accuracy of the student without a teacher."""
    key = study.data, study.seed, study.learning_rate
    if key not in _ALONE:
        _ALONE[key] = study.test(on_labels(study, study.student()))
    return _ALONE[key]


def second_teacher(study: Study) -> Network:
    """Return another teacher of the same rows."""
    return study.train_teacher(5000 + study.seed)


def _several(strategy: Any, study: Study) -> dict[str, Any]:
    masked = {"mask": "easy"} if strategy == "curriculum" else {}
    term = Term("soft_targets", "soft_targets", masked, {"temperature": TEMPERATURE}, SOFT)
    step = teaching.SeveralTeachersStep(
        study.student(),
        study.split.train,
        [labels_term(), term],
        validate=study.validate,
        teachers=[study.teacher, second_teacher(study)],
        learning=study.learning,
        strategy=strategy,
        temperature=TEMPERATURE,
        epochs=study.epochs // 2,
    )
    return result(study.test(trained(study, step)), alone(study))


for _strategy in ("average", "random", "confidence", "agreement", "curriculum"):
    WAYS[f"several_teachers ({_strategy})"] = partial(_several, _strategy)


def _peers(study: Study, count: int) -> list[nn.Module]:
    return [study.student(), *(network(STUDENT, 2000 + 10 * study.seed + n) for n in range(1, count))]


@way("mutual_learning")
def _(study: Study) -> dict[str, Any]:
    step = teaching.MutualLearningStep(
        _peers(study, 2), study.split.train, validate=study.validate, learning=study.learning
    )
    return result(study.test(trained(study, step)), alone(study))


@way("diverse_peers")
def _(study: Study) -> dict[str, Any]:
    step = teaching.DiversePeersStep(
        _peers(study, 3), study.split.train, validate=study.validate, classes=10, learning=study.learning
    )
    return result(study.test(trained(study, step)), alone(study))


@way("born_again")
def _(study: Study) -> dict[str, Any]:
    def make(stage: int) -> nn.Module:
        return study.student() if stage == 0 else network(STUDENT, 3000 + 10 * study.seed + stage)

    stages = teaching.born_again(make, partial(under, study), 2)
    tests = [study.test(stage.model) for stage in stages]
    return result(tests[-1], alone(study), generations=tests)


@way("assistant_chain")
def _(study: Study) -> dict[str, Any]:
    models = [network((16, 32, 48), study.seed), study.student()]
    stages = teaching.assistant_chain(models, partial(under, study), teacher=study.teacher)
    direct = study.student()
    under(study, direct, study.teacher)
    return result(study.test(stages[-1].model), alone(study), without_assistant=study.test(direct))


@way("residual_assistant")
def _(study: Study) -> dict[str, Any]:
    def pair(teacher: nn.Module | None) -> float:
        def learn(model: nn.Module, given: nn.Module | None, stage: int) -> FitResult:
            return under(study, model, teacher, stage)

        small = network((4, 8, 16), 4000 + study.seed)
        both, _ = teaching.residual_assistant(study.student(), small, learn, teacher=study.teacher)
        return study.test(both)

    return result(pair(study.teacher), pair(None), "the same two networks on labels")


def _head(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 16), nn.ReLU(), nn.Linear(16, 10)
    )


@way("deep_to_shallow")
def _(study: Study) -> dict[str, Any]:
    def exits(weight: float, hint: float) -> teaching.ExitNetwork:
        torch.manual_seed(study.seed)
        body = study.student()
        model = teaching.ExitNetwork([body.block1, body.block2], [_head(STUDENT[0]), _head(STUDENT[1])])
        step = teaching.DeepToShallowStep(
            model, study.split.train, validate=study.validate, soft=weight, hint=hint, learning=study.learning
        )
        trained(study, step)
        return model.eval()

    taught, control = exits(0.3, 0.03), exits(0.0, 0.0)

    def shallow(model: teaching.ExitNetwork) -> float:
        with torch.no_grad():
            answers = model.all_exits(study.split.test["inputs"])[0].argmax(1)
        return float((answers == study.split.test["labels"]).float().mean())

    early = taught.answer_early(study.split.test["inputs"], 0.9)
    more = {
        "deep": study.test(taught),
        "deep_alone": study.test(control),
        "early": float((early.logits.argmax(1) == study.split.test["labels"]).float().mean()),
        "left_early": float((early.exits == 0).float().mean()),
    }
    return result(shallow(taught), shallow(control), "the same exits on labels", "accuracy of the first exit", **more)


@way("class_wise")
def _(study: Study) -> dict[str, Any]:
    step = teaching.ClassWiseStep(study.student(), study.split.train, validate=study.validate, learning=study.learning)
    return result(study.test(trained(study, step)), alone(study))


def _shifted(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Return images moved by up to one pixel, each by its own draw."""
    moves = torch.randint(-1, 2, (len(inputs), 2), generator=generator)
    return torch.stack([each.roll(tuple(move.tolist()), (1, 2)) for each, move in zip(inputs, moves, strict=True)])


@way("data_distortion")
def _(study: Study) -> dict[str, Any]:
    def test(weight: float) -> float:
        step = teaching.DataDistortionStep(
            study.student(),
            study.split.train,
            validate=study.validate,
            distort=_shifted,
            weight=weight,
            learning=study.learning,
        )
        return study.test(trained(study, step))

    return result(test(1.0), test(0.0), "the same distortions, labels alone")


def _classes(part: dict[str, Tensor], low: int, high: int) -> dict[str, Tensor]:
    """Return the rows of classes low..high-1, their labels from 0."""
    rows = (part["labels"] >= low) & (part["labels"] < high)
    return {"inputs": part["inputs"][rows], "labels": part["labels"][rows] - low}


class _Body(nn.Module):
    """The student up to its embedding."""

    def __init__(self, inner: Network) -> None:
        super().__init__()
        self.inner = inner
        self.inner.head = nn.Identity()  # type: ignore[assignment]

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the embedding."""
        answer: Tensor = self.inner(inputs)
        return answer


def _without_forgetting(memory: bool, study: Study) -> dict[str, Any]:
    old, new = (_classes(study.split.train, low, low + 5) for low in (0, 5))

    def learned(weight: float) -> tuple[float, float]:
        torch.manual_seed(study.seed)
        body = _Body(study.student())
        first = teaching.Heads(body, {"old": nn.Linear(STUDENT[2], 5)})
        valid = _classes(study.split.valid, 0, 5)
        step = DistillationStep(
            first, old, [labels_term()], validate=lambda m: {"accuracy": accuracy(m, valid)}, learning=study.learning
        )
        trained(study, step)
        both = teaching.Heads(body, {"old": first.heads["old"], "new": nn.Linear(STUDENT[2], 5)})
        kept = None
        if memory:
            with torch.no_grad():
                kept = old["inputs"][teaching.choose_exemplars(body.eval()(old["inputs"]), old["labels"], 3)]
        later = _classes(study.split.valid, 5, 10)
        step = teaching.WithoutForgettingStep(
            both,
            new,
            validate=lambda m: {"accuracy": accuracy(m, later)},
            new="new",
            memory=kept,
            weight=weight,
            learning=study.learning,
        )
        trained(study, step)
        both.eval()
        test = _classes(study.split.test, 0, 5)
        with torch.no_grad():
            before = float((both(test["inputs"], "old").argmax(1) == test["labels"]).float().mean())
        return before, accuracy(both, _classes(study.split.test, 5, 10))

    taught, control = learned(1.0), learned(0.0)
    more = {"new_task": taught[1], "new_task_alone": control[1]}
    return result(taught[0], control[0], "fine-tuned on the new task", "accuracy on the old task", **more)


WAYS["without_forgetting"] = partial(_without_forgetting, False)
WAYS["without_forgetting (memory)"] = partial(_without_forgetting, True)


@way("quantisation_aware")
def _(study: Study) -> dict[str, Any]:
    start = on_labels(study, study.student())

    def test(teacher: nn.Module | None) -> tuple[float, int]:
        model = teaching.prepare_quantised(copy.deepcopy(start), study.split.train["inputs"][:4])
        under(study, model, teacher, epochs=6)
        small = teaching.convert_quantised(model)
        right = [
            (small(inputs).argmax(1) == labels).float()
            for inputs, labels in zip(
                study.split.test["inputs"].split(1000), study.split.test["labels"].split(1000), strict=True
            )
        ]
        return float(torch.cat(right).mean()), teaching.stored_bytes(small)

    taught, control = test(study.teacher), test(None)
    size = teaching.stored_bytes(study.student())
    more = {"bytes": taught[1], "float_bytes": size}
    return result(taught[0], control[0], "quantisation-aware on labels", "accuracy in int8", **more)


class _Places(nn.Module):
    """Maps [B, C, H, W] to places [B, H W, C]."""

    def forward(self, maps: Tensor) -> Tensor:
        """Return the places."""
        return maps.flatten(2).transpose(1, 2)


class _Mean(nn.Module):
    """Places [B, T, D] to their mean [B, D]."""

    def forward(self, places: Tensor) -> Tensor:
        """Return the mean."""
        return places.mean(1)


def _sequential(model: Network) -> nn.Sequential:
    return nn.Sequential(model.block1, model.block2, _Places(), model.mixer, _Mean(), model.embedding, model.head)


@way("pruned_cross_distillation")
def _(study: Study) -> dict[str, Any]:
    teacher = _sequential(study.teacher)
    few = {name: rows[:50] for name, rows in study.split.train.items()}

    def pruned() -> nn.Sequential:
        model = teaching.prune_channels(teacher, 0.8)
        return model.requires_grad_(True)

    small = Learning(10, 3e-3)
    step = teaching.CrossDistillationStep(pruned(), few, teacher=teacher, validate=study.validate, learning=small)
    labelled = DistillationStep(pruned(), few, [labels_term()], validate=study.validate, learning=small)
    taught, control = trained(study, step), trained(study, labelled)
    more = {"remaining": teaching.remaining_parameters(teaching.finish_pruning(taught)), "pruned": study.test(pruned())}
    return result(study.test(taught), study.test(control), "pruned, then 50 labels", "accuracy with 50 rows", **more)


@way("federated")
def _(study: Study) -> dict[str, Any]:
    train, clients, rounds = study.split.train, 3, 3
    half = len(train["labels"]) // 2
    # each client has a third of the classes, and as many rows of all classes again
    mixed = torch.randperm(half, generator=torch.Generator().manual_seed(study.seed))
    one, other = mixed.chunk(2)
    order = one[train["labels"][one].argsort(stable=True)]
    parts = [torch.cat(part) for part in zip(order.chunk(clients), other.chunk(clients), strict=True)]
    private = [{name: rows[:half][part] for name, rows in train.items()} for part in parts]
    models = [network(STUDENT, 1000 + study.seed) for _ in range(clients)]
    epochs = max(1, study.epochs // rounds)

    def learn(step: Any, name: str) -> object:
        return fit(step, study.seed, epochs)

    found = teaching.federated(
        models,
        private,
        train["inputs"][half:],
        learn,
        validate=study.validate,
        rounds=rounds,
        temperature=TEMPERATURE,
        learning=study.learning_over(epochs),
    )
    lonely = [study.test(on_labels(study, network(STUDENT, 1000 + study.seed), rows)) for rows in private]
    together = [study.test(model) for model in found.models]
    more = {"bytes_predictions": found.traffic.predictions, "bytes_weights": found.traffic.weights}
    return result(sum(together) / clients, sum(lonely) / clients, "clients by themselves", "mean of clients", **more)


@way("data_free_samples")
def _(study: Study) -> dict[str, Any]:
    shape = tuple(study.split.train["inputs"].shape[1:])
    torch.manual_seed(study.seed)
    samples = teaching.Samples(len(study.split.train["labels"]), shape, low=0.0, high=1.0)
    fit(teaching.SynthesisStep(study.teacher, samples, 10, steps_per_epoch=40), study.seed, 10)

    def test(inputs: Tensor) -> float:
        with torch.no_grad():
            said = study.teacher(inputs)
        rows = {"inputs": inputs, "teacher": said}
        step = DistillationStep(study.student(), rows, [soft(1.0)], validate=study.validate, learning=study.learning)
        return study.test(trained(study, step))

    made = samples(torch.arange(len(samples.values))).detach()
    return result(test(made), test(torch.rand(made.shape)), "taught on noise", "accuracy without any data")


RADIUS = 0.1


def _attacked(study: Study, model: nn.Module, steps: int) -> float:
    """Return the accuracy on the first 1,000 test rows under attack."""
    inputs, labels = study.split.test["inputs"][:1000], study.split.test["labels"][:1000]
    torch.manual_seed(study.seed)
    fooled = teaching.attack(model.eval(), inputs, labels, radius=RADIUS, steps=steps, random_start=steps > 1)
    return accuracy(model, {"inputs": fooled, "labels": labels})


@way("adversarially_robust")
def _(study: Study) -> dict[str, Any]:
    def robust(weight: float) -> nn.Module:
        step = teaching.AdversariallyRobustStep(
            study.student(),
            study.split.train,
            teacher=study.teacher,
            validate=study.validate,
            radius=RADIUS,
            steps=5,
            soft=weight,
            learning=study.learning,
        )
        return trained(study, step)

    taught, control = robust(0.9), robust(0.0)
    more = {"clean": study.test(taught), "clean_alone": study.test(control)}
    return result(
        _attacked(study, taught, 10),
        _attacked(study, control, 10),
        "clean labels alone",
        "accuracy under attack",
        **more,
    )


@way("defensive")
def _(study: Study) -> dict[str, Any]:
    teacher = teaching.Tempered(study.student(), 20.0)
    on_labels(study, teacher)
    step = teaching.DefensiveStep(
        network(STUDENT, 6000 + study.seed),
        study.split.train,
        validate=study.validate,
        teachers=[teacher.network.eval()],
        learning=study.learning,
    )
    taught, control = trained(study, step), on_labels(study, study.student())
    more = {"clean": study.test(taught), "clean_alone": study.test(control)}
    return result(
        _attacked(study, taught, 1), _attacked(study, control, 1), "student alone", "accuracy under one step", **more
    )


@way("amalgamation")
def _(study: Study) -> dict[str, Any]:
    def half(low: int) -> nn.Module:
        rows, valid = _classes(study.split.train, low, low + 5), _classes(study.split.valid, low, low + 5)
        model = network(TEACHER, study.seed, 5)
        step = DistillationStep(
            model, rows, [labels_term()], validate=lambda m: {"accuracy": accuracy(m, valid)}, learning=study.learning
        )
        return trained(study, step).eval()

    step = teaching.AmalgamationStep(
        study.student(),
        {"inputs": study.split.train["inputs"]},
        teachers=[half(0), half(5)],
        classes=[range(5), range(5, 10)],
        validate=study.validate,
        learning=study.learning,
    )
    return result(study.test(trained(study, step)), alone(study), "student alone, with labels")


@way("codistillation")
def _(study: Study) -> dict[str, Any]:
    from benchmarks.forms.replica import run_replicas

    tests: Sequence[float] = run_replicas(study, 2)
    return result(sum(tests) / len(tests), alone(study), metric="mean of two processes")
