"""Who teaches: one model, several whose posteriors are averaged, or one that hears samples.

Frames are of 40 ms, as the students'. Hugging Face models have them of 20 ms, and lists of hypotheses are made of
these: in pairs of them double letters are lost. Beside a model trained here, which has none, lists are made of 40 ms,
and said to be; ``teacher.combine: switched`` makes them of each by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apps.speech.data.folds import NO_FOLD
from apps.speech.data.utterance import utterance_at
from apps.speech.decode.greedy import greedy
from apps.speech.fitting import ask, attention_targets
from apps.speech.lessons import NBest, Segmented, TeacherLessons, ViewLessons
from apps.speech.models import AcousticModel
from apps.speech.models.attention import AttentionCtc
from apps.speech.models.base import FRAME_MS
from apps.speech.models.ensemble import By, Ensemble, Member
from apps.speech.models.huggingface import HF_FRAME_MS, HuggingFaceCtc, paired
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

    @property
    def frame_ms(self) -> int:
        """Milliseconds of the shortest frames that all its models have."""
        return HF_FRAME_MS if self._pretrained == len(self.models) else FRAME_MS

    @property
    def mixed(self) -> bool:
        """Whether some of its models are Hugging Face's and some are not."""
        return 0 < self._pretrained < len(self.models)

    @property
    def _pretrained(self) -> int:
        return sum(isinstance(model, HuggingFaceCtc) for model in self.models)

    def to(self, device: torch.device) -> None:
        """Move its models: they are asked where they are."""
        for model in self.models:
            model.to(device)

    def width(self, layer: str) -> int:
        """Return the width of a layer; ValueError where there is not one model that was trained here."""
        return self._own(f"layer: {layer}").width(layer)

    def heads(self) -> int:
        """Return how many heads its attention has; ValueError as ``width``."""
        return self._own("heads").heads()

    def reach(self) -> int | None:
        """Return how far back its frames attend; ValueError as ``width``."""
        return self._own("reach").reach()

    def _own(self, what: str) -> AcousticModel:
        """Return its one model, trained here, of which something is asked for."""
        model = self.models[0]
        if len(self.models) > 1 or not isinstance(model, AcousticModel):
            raise ValueError(f"{what} of several or pretrained teachers, wanted one teacher trained here")
        return model

    def ask(
        self,
        prepared: Prepared,
        parts: str | Sequence[str],
        view: str,
        rows: Sequence[int],
        *,
        layers: Sequence[str] = (),
        attention: bool = False,
        frame_ms: int = FRAME_MS,
    ) -> dict[str, list[np.ndarray]]:
        """Return ``log_probs`` float32 [T', C] of rows in a view, and the output [T', D] of each layer by path.

        ``attention`` adds that of an attention teacher along the text, or what CTC heard where there is none.
        ``frame_ms`` 20 gives twice as many frames; ValueError where the teacher has none so short.
        """
        if frame_ms not in (FRAME_MS, self.frame_ms):
            raise ValueError(f"frame_ms: got {frame_ms}, this teacher has frames of {self.frame_ms} ms")
        each = []
        for model in self.models:
            if isinstance(model, HuggingFaceCtc):
                heard = model.batch_log_probs(prepared.samples(parts, view, rows), frame_ms)
                each.append({"log_probs": [log_probs.cpu().numpy() for log_probs in heard]})
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
        corpora = [prepared.corpora[part] for part in ([parts] if isinstance(parts, str) else parts)]
        return [
            greedy(log_probs).ids
            if (text := utterance_at(corpora, row)[1].text) is None
            else prepared.units.encode(text)
            for row, log_probs in zip(rows, heard, strict=True)
        ]

    def alone(self, index: int) -> Teacher:
        """Return one of the models as a teacher by itself."""
        return Teacher([self.models[index]], [self.members[index]])


@dataclass(frozen=True)
class CrossFitted(Teacher):
    """A teacher that has others speak for it, each of the utterances it was trained without.

    So what is said of a training utterance is what a teacher makes of a voice it does not know, not what it remembers
    (cross-fitting; Dao et al., ICLR 2021).
    """

    others: Sequence[Teacher] = ()
    # which of the others speaks of each training row, int64 [N]; NO_FOLD: the teacher itself, for it has no text
    folds: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def fingerprint(self) -> str:
        """What it and the others are, and who speaks of what."""
        return fingerprint(super().fingerprint, *(each.fingerprint for each in self.others), self.folds.tobytes())

    def to(self, device: torch.device) -> None:
        """Move its models and the others'."""
        super().to(device)
        for each in self.others:
            each.to(device)

    def ask(
        self, prepared: Prepared, parts: str | Sequence[str], view: str, rows: Sequence[int], **options: Any
    ) -> dict[str, list[np.ndarray]]:
        """Return what is said of training rows, as ``Teacher.ask``; ValueError for other parts."""
        if list([parts] if isinstance(parts, str) else parts) != prepared.training_parts:
            raise ValueError(f"parts: got {parts}, wanted {prepared.training_parts}, which the folds are of")
        found: dict[str, list[np.ndarray]] = {}
        for fold in np.unique(self.folds[list(rows)]).tolist():
            places = [place for place, row in enumerate(rows) if self.folds[row] == fold]
            ask = super().ask if fold == NO_FOLD else self.others[fold].ask
            said = ask(prepared, parts, view, [rows[place] for place in places], **options)
            for name, values in said.items():
                of_all = found.setdefault(name, [np.empty(0)] * len(rows))
                for place, value in zip(places, values, strict=True):
                    of_all[place] = value
        return found


def view_lessons(
    teacher: Teacher,
    prepared: Prepared,
    view: str,
    cache: Path,
    *,
    layers: Sequence[str],
    attention: bool,
    classes: int,
    device: Callable[[], torch.device],
    frame_ms: int = FRAME_MS,
) -> ViewLessons:
    """Return what a teacher says of the training rows in a view, asked for in frames of ``frame_ms``.

    ``device`` is called where it is asked; it is on no accelerator while others are trained there.
    """
    parts = prepared.training_parts
    store = prepared.store(parts, view)

    def told(what: str, done: int, total: int) -> None:
        prepared.announce(f"{what} in view {view}: {done} of {total}")

    def ask(rows: Sequence[int]) -> dict[str, list[np.ndarray]]:
        teacher.to(device())
        try:
            return teacher.ask(prepared, parts, view, rows, layers=layers, attention=attention, frame_ms=frame_ms)
        finally:
            teacher.to(torch.device("cpu"))

    return ViewLessons(
        store.lengths,
        ask,
        TeacherCache(cache),
        data=fingerprint(prepared.fingerprint, {"view": view}),
        teacher=teacher.fingerprint,
        classes=classes,
        # what attention says is as wide as the posteriors
        layers={layer: teacher.width(layer) for layer in layers} | ({"attention": classes} if attention else {}),
        progress=told,
        halved=_halved if frame_ms < FRAME_MS else None,
    )


def _halved(log_probs: np.ndarray) -> np.ndarray:
    """Return the frames [T', C] of 40 ms of those [2 T', C] of 20 ms."""
    return paired(torch.from_numpy(log_probs)).numpy()


def teacher_lessons(
    teachers: Sequence[tuple[Teacher, str]],
    prepared: Prepared,
    cache: Path,
    *,
    posteriors: bool,
    attention: bool,
    layers: Sequence[str],
    n_best: NBest | None,
    segmented: Segmented | None,
    device: Callable[[], torch.device] = lambda: torch.device("cpu"),
) -> TeacherLessons:
    """Return the lessons of (teacher, view it hears), one for each view of the student's.

    Lists of hypotheses are made of the shortest frames a teacher has. Teachers are asked on ``device()``.
    """
    listed = n_best is not None or segmented is not None
    if listed and any(who.mixed for who, _ in teachers):
        prepared.announce(
            "teacher: lists of hypotheses are made of frames of 40 ms, in which double letters of its Hugging Face "
            "members may be lost; teacher.combine: switched lists each by itself"
        )
    classes = prepared.units.blank + 1
    views = [
        view_lessons(
            who,
            prepared,
            view,
            cache,
            layers=layers,
            attention=attention,
            classes=classes,
            device=device,
            frame_ms=who.frame_ms if listed else FRAME_MS,
        )
        for who, view in teachers
    ]
    return TeacherLessons(views, posteriors, n_best, segmented)
