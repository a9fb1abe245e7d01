"""Every registered loss as a form of knowledge on the pair: what it is given, and what is learned beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.forms import nbest
from benchmarks.forms.networks import HEADS, STUDENT, TEACHER
from benchmarks.forms.study import TAPS, Study
from kdcore import losses
from kdcore.losses import entries, entry
from kdcore.teaching import DistillationStep, Term, labels_term
from kdcore.trainer import Batch, TeachingStep

Extra = Callable[[Study], dict[str, Tensor]]


@dataclass(frozen=True)
class Form:
    """One loss on the pair: its terms beside the labels, and which rows of the teacher's outputs it needs."""

    terms: Callable[[Study], Sequence[Term]]
    # values of the teacher, made once, that go with every row
    needs: Sequence[str] = ()
    # layers of the student that are tapped
    taps: Sequence[str] = ()
    kind: str = "images"
    extra: Extra | None = None
    note: str = ""
    step: type[DistillationStep] = field(default=DistillationStep)


class Projected(nn.Module):
    """A loss on features of one width: the student's are mapped to the teacher's by a layer that is thrown away."""

    def __init__(self, loss: Callable[..., Tensor], pairs: Mapping[str, tuple[int, int]], axis: int) -> None:
        super().__init__()
        self.loss, self.axis = loss, axis
        self.maps = nn.ModuleDict({name: nn.Linear(a, b) for name, (a, b) in pairs.items()})

    def forward(self, *, reduction: str, **given: Tensor) -> Tensor:
        """Return the loss of the mapped features."""
        for name, linear in self.maps.items():
            given[name] = linear(given[name].movedim(self.axis, -1)).movedim(-1, self.axis)
        return self.loss(**given, reduction=reduction)


class Contrast(nn.Module):
    """CRD with negatives drawn from all rows; the bank follows the step."""

    def __init__(self, rows: int, negatives: int = 64) -> None:
        super().__init__()
        self.loss = losses.ContrastiveRepresentation(STUDENT[2], TEACHER[2], rows, dim=32)
        self.rows, self.negatives = rows, negatives

    def forward(self, student: Tensor, teacher: Tensor, index: Tensor, *, reduction: str) -> Tensor:
        """Return the loss against the row's own entry and random ones."""
        contrast = torch.randint(self.rows, (len(index), 1 + self.negatives))
        contrast[:, 0] = index
        if not bool(self.loss.log_constants.isfinite().all()):
            self.loss.estimate_constants(student.detach(), teacher, contrast)
        value: Tensor = self.loss(student, teacher, contrast, reduction=reduction)
        return value

    def update(self, student: Tensor, teacher: Tensor, index: Tensor) -> None:
        """Move the bank."""
        self.loss.update(student, teacher, index)


class JacobianStep(DistillationStep):
    """Adds the gradients of the teacher's best class by the inputs, of both networks."""

    def values(self, batch: Batch) -> dict[str, Tensor]:
        """Return the values of a batch with ``student.jacobian``."""
        inputs = batch["inputs"].requires_grad_()
        with torch.enable_grad():
            found = super().values({**batch, "inputs": inputs})
            jacobian = losses.input_jacobian(
                found["student"], inputs, batch["teacher"].argmax(1), create_graph=torch.is_grad_enabled()
            )
        return {**found, "student.jacobian": jacobian}


def teacher_jacobian(study: Study) -> dict[str, Tensor]:
    """Return the gradients of the teacher's best logit by its inputs."""
    inputs = study.split.train["inputs"].clone().requires_grad_()
    answers = study.teacher(inputs)
    return {"teacher.jacobian": losses.input_jacobian(answers, inputs, answers.argmax(1)).detach()}


def _pooled(maps: Tensor) -> Tensor:
    return maps.mean((2, 3)) if maps.dim() == 4 else maps.mean(1)


def _term(name: str, loss: Any, student: str = "student", **options: Any) -> Term:
    """Return a term between a layer of the student and the same of the teacher."""
    inputs = {"student": student, "teacher": student.replace("student", "teacher")}
    return Term(name, loss, inputs=inputs, options=options)


def _answers(name: str, loss: Any = None, **options: Any) -> Form:
    """Return a form on logits."""
    return Form(lambda study: [_term(name, loss or entry(name).function, **options)], needs=["teacher"])


def _layer(name: str, layer: str, loss: Callable[[], Any] | None = None, **options: Any) -> Form:
    """Return a form on one layer; ``loss`` makes it if it has parameters."""
    make = loss or (lambda: entry(name).function)
    return Form(
        lambda study: [_term(name, make(), f"student.{layer}", **options)], needs=[f"teacher.{layer}"], taps=[layer]
    )


def _projected(name: str, layer: str, sizes: tuple[int, int], axis: int, **options: Any) -> Form:
    loss = partial(entry(name).function, **options)
    return _layer(name, layer, lambda: Projected(loss, {"student": sizes}, axis))


def _ranking_forms() -> dict[str, Form]:
    """Return the losses of rankings: the classes are the items, the row is the query."""

    def order(teacher: Tensor) -> Tensor:
        return teacher.argsort(1, descending=True)

    def bpr(student: Tensor, teacher: Tensor, *, reduction: str) -> Tensor:
        ranked = student.gather(1, order(teacher))
        return losses.bpr(ranked[:, 0], ranked[:, 1:], reduction=reduction)  # type: ignore[arg-type]

    def pointwise(student: Tensor, teacher: Tensor, *, reduction: str) -> Tensor:
        return losses.pointwise_bce(student, torch.softmax(teacher, 1), reduction=reduction)  # type: ignore[arg-type]

    def top(student: Tensor, teacher: Tensor, *, reduction: str) -> Tensor:
        ranked = student.gather(1, order(teacher)[:, :3])
        return losses.ranking_distillation(ranked, weights=losses.position_weights(3), reduction=reduction)  # type: ignore[arg-type]

    def relaxed(student: Tensor, teacher: Tensor, *, reduction: str) -> Tensor:
        ranked = student.gather(1, order(teacher))
        return losses.relaxed_ranking(ranked[:, :4], ranked[:, 4:], reduction=reduction)  # type: ignore[arg-type]

    def privileged(student: Tensor, teacher: Tensor, labels: Tensor, *, reduction: str) -> Tensor:
        truth = F.one_hot(labels, student.shape[1]).to(student.dtype)
        return losses.privileged_features(student, teacher, truth, reduction=reduction)  # type: ignore[arg-type]

    experts = partial(losses.DistillationExperts, STUDENT[2], TEACHER[2], 8)
    return {
        "bpr": _answers("bpr", bpr),
        "pointwise_bce": _answers("pointwise_bce", pointwise),
        "ranking_distillation": _answers("ranking_distillation", top),
        "collaborative_distillation": _answers("collaborative_distillation"),
        "relaxed_ranking": _answers("relaxed_ranking", relaxed),
        "distillation_experts": _layer("distillation_experts", "embedding", experts, temperature=0.5),
        "privileged_features": _answers("privileged_features", privileged),
        "pairwise_ranking": _answers("pairwise_ranking"),
        "list_net": _answers("list_net", temperature=4.0),
        "plackett_luce": _answers("plackett_luce"),
    }


def _response_forms() -> dict[str, Form]:
    def sparse(student: Tensor, teacher: Tensor, *, reduction: str) -> Tensor:
        log_probs, items = torch.log_softmax(teacher / 4, 1).topk(3, 1)
        return losses.sparse_soft_targets(student, items, log_probs, temperature=4.0, reduction=reduction)  # type: ignore[arg-type]

    def blended(student: Tensor, teacher: Tensor, labels: Tensor, *, reduction: str) -> Tensor:
        truth = F.one_hot(labels, student.shape[1]).to(student.dtype)
        flat = (each.flatten() for each in (student, teacher, truth))
        return losses.blended_cross_entropy(*flat, reduction=reduction)  # type: ignore[arg-type]

    own = {"student": "student"}
    return {
        "soft_targets": _answers("soft_targets", temperature=4.0),
        "sparse_soft_targets": _answers("sparse_soft_targets", sparse),
        "logit_mse": _answers("logit_mse"),
        "regression": _answers("regression", delta=1.0),
        "binary_soft_targets": _answers("binary_soft_targets", temperature=2.0),
        "decoupled": _answers("decoupled"),
        "normalised": _answers("normalised"),
        "blended_cross_entropy": _answers("blended_cross_entropy", blended),
        "label_smoothing": Form(lambda s: [Term("label_smoothing", "label_smoothing", inputs=own)], note="no teacher"),
        "confidence_penalty": Form(
            lambda s: [Term("confidence_penalty", "confidence_penalty", inputs=own)], note="no teacher"
        ),
    }


def channel_importance(study: Study) -> Tensor:
    """Return the weights of the teacher's block2 channels: by how much its loss grows without each."""
    rows = study.split.train
    maps = study.said["teacher.block2"]

    def loss(values: Tensor) -> Tensor:
        places = study.teacher.mixer(values.flatten(2).transpose(1, 2))
        return F.cross_entropy(study.teacher.head(study.teacher.embedding(places.mean(1))), rows["labels"])

    with torch.no_grad():
        without = []
        for channel in range(maps.shape[1]):
            silent = maps.clone()
            silent[:, channel] = 0
            without.append(loss(silent))
        return losses.channel_weights(torch.stack(without), loss(maps))


def _feature_forms() -> dict[str, Form]:
    second, width = (STUDENT[1], TEACHER[1]), (STUDENT[2], TEACHER[2])

    def weighted(study: Study) -> Sequence[Term]:
        loss = partial(losses.weighted_channels, weights=channel_importance(study))
        return [_term("weighted_channels", Projected(loss, {"student": second}, 1), "student.block2")]

    return {
        "hint": _projected("hint", "embedding", width, -1),
        "regressed_hint": _layer("regressed_hint", "block2", lambda: losses.Hint(*second)),
        "attention_transfer": _layer("attention_transfer", "block2"),
        "probabilistic_transfer": _layer("probabilistic_transfer", "embedding"),
        "neuron_selectivity": _layer("neuron_selectivity", "block2"),
        "factor_transfer": _layer("factor_transfer", "block2", lambda: losses.FactorTransfer(*second)),
        "variational_information": _layer(
            "variational_information", "block2", lambda: losses.VariationalInformation(*second)
        ),
        "weighted_channels": Form(weighted, needs=["teacher.block2"], taps=["block2"]),
        "activation_boundary": _projected("activation_boundary", "block2", second, 1),
    }


class MappedPlaces(nn.Module):
    """A learned mapping of the student's places to two layers of the teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = losses.LayerMapping(1, 2, STUDENT[1], TEACHER[1])

    def forward(self, student: Tensor, teacher: Tensor, below: Tensor, *, reduction: str) -> Tensor:
        """Return the loss of the mapped layers."""
        layers = torch.stack([below.flatten(2).transpose(1, 2), teacher], 1)
        value: Tensor = self.loss(student[:, None], layers, reduction=reduction)
        return value


def _transformer_forms() -> dict[str, Form]:
    second, width = (STUDENT[1], TEACHER[1]), (STUDENT[2], TEACHER[2])

    def hidden(student: Tensor, teacher: Tensor, *, reduction: str) -> Tensor:
        return losses.hidden_states(student[:, None], teacher[:, None], reduction=reduction)  # type: ignore[arg-type]

    def attended(student: Tensor, teacher: Tensor, first: Tensor, taught: Tensor, *, reduction: str) -> Tensor:
        own, theirs = torch.stack([_pooled(first), student], 1), torch.stack([_pooled(taught), teacher], 1)
        return losses.attended_layers(own, theirs, reduction=reduction)  # type: ignore[arg-type]

    def two_layers(study: Study) -> Sequence[Term]:
        loss = Projected(attended, {"student": width, "first": second}, -1)
        inputs = {"student": "student.embedding", "teacher": "teacher.embedding"}
        return [Term("attended_layers", loss, {**inputs, "first": "student.places", "taught": "teacher.places"})]

    mapped = {"student": "student.places", "teacher": "teacher.places", "below": "teacher.block2"}
    return {
        "attention_matrices": _layer("attention_matrices", "attention"),
        "value_relations": _layer("value_relations", "values", heads=HEADS),
        "hidden_states": _layer("hidden_states", "places", lambda: Projected(hidden, {"student": second}, -1)),
        "attended_layers": Form(
            two_layers, needs=["teacher.embedding", "teacher.places"], taps=["embedding", "places"]
        ),
        "layer_mapping": Form(
            lambda study: [Term("layer_mapping", MappedPlaces(), mapped)],
            needs=["teacher.places", "teacher.block2"],
            taps=["places"],
        ),
    }


def _two_layers(name: str, first: str, second: str, loss: Callable[[], Any]) -> Form:
    inputs = {
        f"{who}_{place}": f"{who}.{layer}"
        for who in ("student", "teacher")
        for place, layer in (("first", first), ("second", second))
    }
    needs = [f"teacher.{first}", f"teacher.{second}"]
    return Form(lambda study: [Term(name, loss(), inputs)], needs=needs, taps=[first, second])


def _relation_forms() -> dict[str, Form]:
    channels = {"student_first": (STUDENT[0], TEACHER[0]), "student_second": (STUDENT[1], TEACHER[1])}
    widths = {"student_first": (STUDENT[1], TEACHER[1]), "student_second": (STUDENT[2], TEACHER[2])}

    def graph(*, reduction: str, **given: Tensor) -> Tensor:
        return losses.instance_graph(**given, reduction=reduction)  # type: ignore[arg-type]

    class Graph(Projected):
        """Instance graphs of the pooled places and the embedding, both at the teacher's width."""

        def forward(self, *, reduction: str, **given: Tensor) -> Tensor:
            """Return the loss of the pooled layers."""
            pooled = {name: _pooled(value) if value.dim() > 2 else value for name, value in given.items()}
            return super().forward(reduction=reduction, **pooled)

    align = losses.AdversarialAlignment
    embedding = [
        *("distance_relations", "angle_relations", "correlation_congruence", "similarity_preserving"),
        *("darkrank_hard", "darkrank_soft", "graph_relations"),
    ]

    def adversarial(study: Study) -> Sequence[Term]:
        module = align(10)
        return [Term("adversarial_alignment", module), Term("discriminator", module.discriminator_loss)]

    contrast = {"student": "student.embedding", "teacher": "teacher.embedding"}

    def projected() -> nn.Module:
        return Projected(losses.contrastive_in_batch, {"student": (STUDENT[2], TEACHER[2])}, -1)

    return {
        **{name: _layer(name, "embedding") for name in embedding},
        "flow_of_solution": _two_layers(
            "flow_of_solution", "block1", "block2", lambda: Projected(losses.flow_of_solution, channels, 1)
        ),
        "singular_vectors": _two_layers(
            "singular_vectors", "block1", "block2", lambda: Projected(losses.singular_vectors, channels, 1)
        ),
        "jacobian_matching": Form(
            lambda s: [_term("jacobian_matching", losses.jacobian_matching, "student.jacobian")],
            needs=["teacher"],
            extra=teacher_jacobian,
            step=JacobianStep,
        ),
        "instance_graph": _two_layers("instance_graph", "places", "embedding", lambda: Graph(graph, widths, -1)),
        "pixel_pairs": _layer("pixel_pairs", "block1"),
        "contrastive_in_batch": _layer("contrastive_in_batch", "embedding", projected),
        "contrastive_representation": Form(
            lambda s: [Term("contrastive_representation", Contrast(len(s.split.train["labels"])), contrast)],
            needs=["teacher.embedding"],
            taps=["embedding"],
        ),
        "adversarial_alignment": Form(adversarial, needs=["teacher"]),
    }


def _sequence_forms() -> dict[str, Form]:
    def said(study: Study) -> dict[str, Tensor]:
        teacher = study.strip_teacher  # trained at the first call, so not under no_grad
        with torch.no_grad():
            logits = teacher(study.strips["train"]["inputs"])
        return {"teacher": logits, "lengths": torch.full((len(logits),), logits.shape[1])}

    def listed(study: Study) -> dict[str, Tensor]:
        found = said(study)
        return {"lengths": found["lengths"], **nbest.of_rows(found["teacher"], 4)}

    def segmented(study: Study) -> dict[str, Tensor]:
        found = said(study)
        return {"lengths": found["lengths"], **nbest.of_halves(found["teacher"], 3)}

    def path(study: Study) -> dict[str, Tensor]:
        found = said(study)
        best = found["teacher"].argmax(2)
        return {"path": best, "path_lengths": found["lengths"], "path_scores": torch.zeros(len(best))}

    def along(student: Tensor, path: Tensor, path_lengths: Tensor, path_scores: Tensor, *, reduction: str) -> Tensor:
        one = (each[:, None] for each in (student, path, path_lengths, path_scores))
        return losses.sequence_level(*one, reduction=reduction)  # type: ignore[arg-type]

    def frames(name: str, **options: Any) -> Form:
        loss = entry(name).function
        inputs = {"student": "student", "teacher": "teacher", "lengths": "lengths"}
        return Form(lambda s: [Term(name, loss, inputs, options)], kind="strips", extra=said)

    return {
        "frame_ctc": frames("frame_ctc", temperature=2.0),
        "guided_spikes": frames("guided_spikes"),
        "word_level": frames("word_level", temperature=2.0),
        "sequence_ctc": Form(lambda s: [Term("sequence_ctc", losses.sequence_ctc)], kind="strips", extra=listed),
        "segment_ctc": Form(lambda s: [Term("segment_ctc", losses.segment_ctc)], kind="strips", extra=segmented),
        "sequence_level": Form(lambda s: [Term("sequence_level", along)], kind="strips", extra=path),
    }


def forms() -> dict[str, Form]:
    """Return the form of every registered loss, in the order of the families."""
    found = {
        **_response_forms(),
        **_feature_forms(),
        **_transformer_forms(),
        **_relation_forms(),
        **_ranking_forms(),
        **_sequence_forms(),
    }
    missing = {row.name for row in entries()} - set(found)
    if missing:
        raise ValueError(f"forms: no form for the losses {', '.join(sorted(missing))}")
    return found


def taught(study: Study, form: Form, strength: float) -> TeachingStep:
    """Return the step of a student that learns labels and one form of knowledge.

    ``strength`` is the size of the form's terms beside the labels' cross-entropy before the first update: weights are
    set so, which puts losses of any scale on an equal footing.
    """
    torch.manual_seed(study.seed)  # what the terms learn begins the same too
    extra = form.extra(study) if form.extra else {}
    if form.kind == "strips":
        terms = form.terms(study)
        step = study.strip_step(study.strip_student(), terms, extra)
        weighed = _weighed(step, terms, strength)
        return study.strip_step(study.strip_student(), weighed, extra)
    rows = {**study.split.train, **{name: study.said[name] for name in form.needs}, **extra}
    terms = form.terms(study)

    def make(given: Sequence[Term]) -> DistillationStep:
        return form.step(
            study.student(),
            rows,
            [labels_term(), *given],
            validate=study.validate,
            student_taps={name: TAPS[name] for name in form.taps},
            learning=study.learning,
        )

    return make(_weighed(make(terms), terms, strength))


def _weighed(step: DistillationStep, terms: Sequence[Term], strength: float) -> list[Term]:
    """Return the terms with weights that make each ``strength`` times the first term of the step, on its first rows."""
    batch = {name: rows[:64] for name, rows in step.data.items()}
    batch["index"] = torch.arange(len(batch["inputs"]))
    step.eval()  # neither statistics nor banks move
    values = step(batch)
    first = next(iter(values))
    labels = float(values[first].detach())
    sizes = {term.name: max(abs(float(values[term.name].detach())), 1e-3 * labels) for term in terms}
    return [Term(t.name, t.loss, t.inputs, t.options, strength * labels / sizes[t.name]) for t in terms]
