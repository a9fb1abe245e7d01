"""Who teaches: one model, several whose posteriors are averaged, or one that hears samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from apps.speech.decode.greedy import greedy
from apps.speech.fitting import ask, attention_targets
from apps.speech.lessons import Cuts, NBest, TeacherLessons, ViewLessons
from apps.speech.models import AcousticModel
from apps.speech.models.attention import AttentionCtc
from apps.speech.models.ensemble import By, Ensemble, Member
from apps.speech.models.huggingface import HuggingFaceCtc
from apps.speech.prepared import Prepared
from kdcore.run import fingerprint
from kdcore.teacher_cache import TeacherCache


@dataclass(frozen=True)
class Teacher:
    """One or several models; ``members`` names each by the fingerprint of its weights, and holds its error rate."""

    models: Sequence[AcousticModel | HuggingFaceCtc]
    members: Sequence[Member]
    # what their averaged posteriors are weighed by
    by: By = "equal"

    @property
    def fingerprint(self) -> str:
        """What the teacher is."""
        return fingerprint(*(member.name for member in self.members), {"by": self.by})

    def width(self, layer: str) -> int:
        """Return the width of a layer; ValueError where there is not one model that was trained here."""
        model = self.models[0]
        if len(self.models) > 1 or not isinstance(model, AcousticModel):
            raise ValueError(f"layer: {layer} of several or pretrained teachers, wanted one teacher trained here")
        return model.width(layer)

    def ask(
        self,
        prepared: Prepared,
        parts: str | Sequence[str],
        view: str,
        rows: Sequence[int],
        *,
        layers: Sequence[str] = (),
        attention: bool = False,
    ) -> dict[str, list[np.ndarray]]:
        """Return ``log_probs`` float32 [T', C] of rows in a view, and the output [T', D] of each layer by path.

        ``attention`` adds that of an attention teacher along the text, or what CTC heard where there is none.
        """
        each = []
        for model in self.models:
            if isinstance(model, HuggingFaceCtc):
                heard = model.batch_log_probs(prepared.samples(parts, view, rows))
                each.append({"log_probs": [log_probs.numpy() for log_probs in heard]})
            else:
                store = prepared.store(parts, view)
                said = ask(model, [store[row] for row in rows], layers=layers)
                if attention and isinstance(model, AttentionCtc):
                    texts = self._texts(prepared, parts, rows, said["log_probs"])
                    said["attention"] = attention_targets(model, [store[row] for row in rows], texts)
                each.append(said)
        if len(each) == 1:
            return each[0]
        ensemble, found = Ensemble(self.members, self.by), []
        for rows_of_members in zip(*(said["log_probs"] for said in each), strict=True):
            given = [torch.from_numpy(log_probs)[None] for log_probs in rows_of_members]
            found.append(ensemble.log_probs(given, torch.tensor([given[0].shape[1]]))[0].numpy())
        return {"log_probs": found}

    @staticmethod
    def _texts(
        prepared: Prepared, parts: str | Sequence[str], rows: Sequence[int], heard: Sequence[np.ndarray]
    ) -> list[Sequence[int]]:
        """Return the symbols of rows: of their texts, or of the best path where there is none."""
        names = [parts] if isinstance(parts, str) else parts
        texts = [each.text for part in names for each in prepared.corpora[part].utterances]
        return [
            greedy(log_probs).ids if (text := texts[row]) is None else prepared.units.encode(text)
            for row, log_probs in zip(rows, heard, strict=True)
        ]

    def alone(self, index: int) -> Teacher:
        """Return one of the models as a teacher by itself."""
        return Teacher([self.models[index]], [self.members[index]])


def view_lessons(
    teacher: Teacher,
    prepared: Prepared,
    view: str,
    cache: Path,
    *,
    layers: Sequence[str],
    attention: bool,
    classes: int,
) -> ViewLessons:
    """Return what a teacher says of the training rows in a view."""
    parts = prepared.training_parts
    store = prepared.store(parts, view)

    def told(what: str, done: int, total: int) -> None:
        prepared.announce(f"{what} in view {view}: {done} of {total}")

    return ViewLessons(
        store.lengths,
        lambda rows: teacher.ask(prepared, parts, view, rows, layers=layers, attention=attention),
        TeacherCache(cache),
        data=fingerprint(prepared.fingerprint, {"view": view}),
        teacher=teacher.fingerprint,
        classes=classes,
        # what attention says is as wide as the posteriors
        layers={layer: teacher.width(layer) for layer in layers} | ({"attention": classes} if attention else {}),
        progress=told,
    )


def teacher_lessons(
    teachers: Sequence[tuple[Teacher, str]],
    prepared: Prepared,
    cache: Path,
    *,
    posteriors: bool,
    attention: bool,
    layers: Sequence[str],
    n_best: NBest | None,
    cuts: Cuts | None,
) -> TeacherLessons:
    """Return the lessons of (teacher, view it hears), one for each view of the student's."""
    classes = prepared.units.blank + 1
    views = [
        view_lessons(who, prepared, view, cache, layers=layers, attention=attention, classes=classes)
        for who, view in teachers
    ]
    return TeacherLessons(views, posteriors, n_best, cuts)
