"""A speech run from recordings to report: prepare, teach, distill, evaluate; every stage resumable.

Stages are skipped when their output is there and belongs to this very configuration, so the same command after
Ctrl-C or ``kill -9`` goes on where it stopped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apps.speech import fitting, knowledge
from apps.speech.checks import check_config
from apps.speech.config import MemberConfig, ModelConfig, SpeechConfig, alone_config
from apps.speech.data.folds import speaker_folds
from apps.speech.data.utterance import Utterance
from apps.speech.distill import Lessons, Utterances
from apps.speech.knowledge import Pair
from apps.speech.models import AcousticModel
from apps.speech.models.ensemble import Member
from apps.speech.models.huggingface import HuggingFaceCtc
from apps.speech.models.pretrained import folder_fingerprint
from apps.speech.models.store import load_model, save_model
from apps.speech.prepared import Prepared, prepare
from apps.speech.teachers import CrossFitted, Teacher, teacher_lessons
from kdcore import processes
from kdcore.config import UserError, build, read_yaml, resolved
from kdcore.folders import refuse_unwritable
from kdcore.run import (
    RunDirectory,
    belongs,
    deploy_model,
    fingerprint,
    gather_logs,
    make_once,
    provenance,
    read_json,
    write_json,
)
from kdcore.teaching import Term
from kdcore.trainer import make_fabric

Announce = Callable[[str], None]
# beside the teacher's folder, those of the teachers of its folds
FOLDS = "teacher_folds"
ROLES = ("teacher", "student_alone", "student")


@dataclass(frozen=True)
class Cell:
    """One fitted model of one seed: where it is and what it is."""

    role: str
    folder: Path
    seed: int

    def stored(self) -> list[Path]:
        """Return the folders of what was fitted for it: of an ensemble those of its members."""
        folders = [self.folder] if (self.folder / "model.json").exists() else sorted(self.folder.glob("member-*"))
        return [folder for folder in folders if (folder / "model.json").exists()]


@dataclass(frozen=True)
class Without:
    """Training rows int64 [n] that a model is not trained on, and what they are called."""

    name: str
    rows: np.ndarray


class Pipeline:
    """Runs the stages of a configuration in a run directory."""

    def __init__(self, config: SpeechConfig, out: str | os.PathLike[str], announce: Announce = lambda text: None):
        # a run that has its data may have its models too, and then needs no folder that a teacher came from
        check_config(config, folders=not (Path(out) / "data" / "data.json").exists())
        if Path(out).exists() and not Path(out).is_dir():
            raise UserError(f"--out: {out} is a file, wanted a folder for the run")
        self.config, self.announce = config, announce if processes.is_first_process() else lambda text: None
        self.run = RunDirectory(Path(out))
        self._reopened = False

    @classmethod
    def reopen(cls, out: str | os.PathLike[str], announce: Announce = lambda text: None) -> Pipeline:
        """Return the pipeline of an existing run; UserError if there is none."""
        file = Path(out) / "config.yaml"
        if not file.exists():
            raise UserError(f"{out}: no run here (config.yaml is missing)")
        pipeline = cls(build(SpeechConfig, read_yaml(file), str(file)), out, announce)
        # its own settings are not another run's, also where an earlier version wrote fewer of them
        pipeline._reopened = True
        return pipeline

    # -- prepare ---------------------------------------------------------------------------------------------------

    @cached_property
    def prepared(self) -> Prepared:
        """The data of the run, read and checked at the first call; configuration and provenance are written then."""
        with processes.first_process_first():
            if self._known():
                return self._read(anew=False)
            refuse_unwritable(self.run.path)
            data = self.run.path / "data"
            with processes.one_command_makes(data, self.announce):
                # another command may have made the run meanwhile, with other settings too; what one left behind that
                # was refused, or killed, is of settings that nobody wrote down
                return self._read(anew=not self._known())

    def _known(self) -> bool:
        """Return whether the run is there already; UserError if it has other settings."""
        return self._reopened or self.run.refuse_other(resolved(self.config), SpeechConfig)

    def _read(self, *, anew: bool) -> Prepared:
        found = prepare(self.config, self.run.path, self.announce, anew=anew)
        if self.config.teacher.folds:
            # too many are refused before the settings are written, and before anything is fitted
            self._announce_folds(found, speaker_folds(_trained(found), self.config.teacher.folds))
        if anew:
            self.run.write_config(resolved(self.config))
        if not (self.run.path / "provenance.json").exists():
            about = provenance(
                seeds=self.config.seeds,
                data={
                    "name": self.config.data.name,
                    "fingerprint": found.fingerprint,
                    "corpora": list(found.sources),
                    "parts": {row["part"]: row for row in found.statistics()},
                },
                simulated=found.simulated,
            )
            write_json(self.run.path / "provenance.json", about)
        return found

    # -- teach -----------------------------------------------------------------------------------------------------

    def teach(self, seed: int) -> Teacher:
        """Fit the teacher of a seed, or all members of it, or load them."""
        config = self.config.teacher
        own = seed if config.seed is None else config.seed
        folder = self._folder("teacher", own)
        if not config.members:
            return self._member(config, own, folder, [])
        members: list[Teacher] = []
        for index, member in enumerate(config.members):
            members.append(self._member(member, own, folder / f"member-{index}", members))
        return Teacher([each.models[0] for each in members], [each.members[0] for each in members], config.by)

    def lecturer(self, seed: int) -> Teacher:
        """Return who speaks of the training utterances: the teacher of a seed, or those of its folds for it.

        They are fitted, or loaded.
        """
        teacher, config = self.teach(seed), self.config.teacher
        if not config.folds:
            return teacher
        own = seed if config.seed is None else config.seed
        folds = speaker_folds(_trained(self.prepared), config.folds)
        others: list[Teacher] = []
        for fold in range(config.folds):
            folder = self._folder("teacher", own).with_name(FOLDS) / f"fold-{fold}"
            without = Without(f"without fold {fold + 1} of {config.folds}", np.flatnonzero(folds == fold))
            others.append(self._member(config, own, folder, [teacher, *others], without))
        return CrossFitted(teacher.models, teacher.members, others=others, folds=folds)

    def _announce_folds(self, prepared: Prepared, folds: np.ndarray) -> None:
        held = []
        for fold in range(self.config.teacher.folds):
            mine = [each for each, own in zip(_trained(prepared), folds, strict=True) if own == fold]
            speakers = len({each.speaker for each in mine if each.speaker}) or "no named"
            held.append(f"{sum(each.duration for each in mine) / 60:.1f} min of {speakers} speakers")
        self.announce(f"teacher's folds: {'; '.join(held)}")

    def _member(
        self, config: MemberConfig, seed: int, folder: Path, before: Sequence[Teacher], without: Without | None = None
    ) -> Teacher:
        if config.path:
            listener = HuggingFaceCtc.from_folder(config.path, self.prepared.units)
            return Teacher([listener], [Member(folder_fingerprint(config.path), self.prepared.units.symbols)])
        views = list(dict.fromkeys(pair.teacher for pair in self.config.views))
        guide = before[0] if config.guided and before else None
        drawn = member_seed(seed, len(before))
        # the teacher is the same whether others are fitted beside it or not
        model = {name: value for name, value in resolved(config).items() if name != "folds"}
        settings = (
            {"model": model, "guide": guide.fingerprint} if guide else {"model": {**model, "guided": 0.0}, "guide": ""}
        )
        settings |= {"without": fingerprint(without.rows.tobytes())} if without else {}
        key = self._key("teacher", drawn, settings)
        lessons, terms = None, _no_terms
        if guide is not None:
            lessons = self._lessons([(guide, view) for view in views], seed, {"guided": {}})

            def terms(model: AcousticModel) -> Sequence[Term]:
                pair = Pair(model.classes - 1, model, guide)
                return knowledge.terms("guided", {}, config.guided, pair)

        self._fit(
            "teacher", seed, key, config, folder, views, drawn=drawn, without=without, terms=terms, lessons=lessons
        )
        return _as_teacher(folder)

    def _lessons(
        self, teachers: Sequence[tuple[Teacher, str]], seed: int | None, given: dict[str, dict[str, Any]]
    ) -> Lessons:
        wanted, device = knowledge.needs(given), self._device
        with processes.first_process_first():
            lessons = teacher_lessons(
                teachers,
                self.prepared,
                self._root(seed) / "teacher_cache",
                posteriors=wanted.posteriors,
                attention=wanted.attention,
                layers=wanted.teacher_layers,
                n_best=wanted.n_best,
                segmented=wanted.segmented,
                device=lambda: device,
            )
            lessons.make()
        return lessons

    @cached_property
    def _device(self) -> torch.device:
        """Where the student is trained, and its teachers are asked."""
        return make_fabric(fitting.with_ctc(self.config.student.trainer)).device

    # -- distill ---------------------------------------------------------------------------------------------------

    def distill(self, seed: int) -> None:
        """Fit the student alone and the taught student of a seed."""
        self.fit_alone(seed)
        self.fit_student(seed)

    def fit_alone(self, seed: int) -> None:
        """Fit the student alone of a seed; it needs no teacher."""
        views = [pair.student for pair in self.config.views]
        config = alone_config(self.config)
        key = self._key("student_alone", seed, resolved(config))
        self._fit("student_alone", seed, key, config, self._folder("student_alone", seed), views, labelled=True)

    def fit_student(self, seed: int) -> None:
        """Fit the taught student of a seed, and its teacher where that is not there."""
        config, teacher = self.config.student, self.lecturer(seed)
        given = {name: dict(each.options) for name, each in self.config.knowledge.items()}
        settings = {
            "student": resolved(config),
            "knowledge": {name: resolved(each) for name, each in self.config.knowledge.items()},
            "teacher": teacher.fingerprint,
            "combine": self.config.teacher.combine,
        }
        key = self._key("student", seed, settings)
        folder = self._folder("student", seed)
        if processes.agree(belongs(folder, key)):
            return
        pairs = [(pair.student, pair.teacher) for pair in self.config.views]
        who = [teacher]
        if self.config.teacher.combine == "switched" and len(teacher.models) > 1:
            # a view for each teacher: every epoch an utterance is taught by one of them, drawn with its view
            who = [teacher.alone(index) for index in range(len(teacher.models))]
        heard = [(student, view, each) for student, view in pairs for each in who]

        def terms(model: AcousticModel) -> Sequence[Term]:
            pair = Pair(model.classes - 1, model, teacher)
            given = self.config.knowledge.items()
            return [term for name, each in given for term in knowledge.terms(name, each.options, each.schedule, pair)]

        shared = seed if self.config.teacher.seed is None else None
        lessons = self._lessons([(each, view) for _, view, each in heard], shared, given)
        layers = knowledge.needs(given).student_layers
        views = [student for student, _, _ in heard]
        self._fit("student", seed, key, config, folder, views, terms=terms, lessons=lessons, layers=layers)

    def _fit(
        self,
        role: str,
        seed: int,
        key: str,
        config: ModelConfig,
        folder: Path,
        views: Sequence[str],
        **more: Any,
    ) -> None:
        """Fit and store the model of a cell, as ``_make``, if it is not there."""
        make_once(folder, key, lambda: self._make(role, seed, key, config, folder, views, **more), self.announce)

    def _make(
        self,
        role: str,
        seed: int,
        key: str,
        config: ModelConfig,
        folder: Path,
        views: Sequence[str],
        *,
        drawn: int | None = None,
        labelled: bool = False,
        without: Without | None = None,
        **taught: Any,
    ) -> None:
        """Fit and store the model of a cell.

        ``labelled`` leaves out the rows without a text and repeats others, so that there are as many updates as with.
        ``drawn`` is what the fit is seeded with where that is not the seed of the cell; ``without`` are rows that are
        not trained on.
        """
        prepared = self.prepared
        with processes.first_process_first():
            data = self._data(role, views, labelled, without)
            valid = prepared.store("valid", self.config.tested_view(role))
            # of the training part, which comes first in what is trained on: one store for both
            counted = len(prepared.corpora["train"])
            statistics = prepared.store(prepared.training_parts, views[0]).statistics(counted)
        which = f", {without.name}" if without else ""
        self.announce(f"seed {seed}: fitting {role.replace('_', ' ')} ({config.kind}{which})")
        fitted = fitting.fit_model(
            config,
            data,
            statistics,
            fitting.validator(valid, prepared.texts("valid"), prepared.units),
            prepared.units,
            seed=seed if drawn is None else drawn,
            folder=folder.with_name(f"{folder.name}.checkpoints"),
            key=key,
            context={"role": role, "seed": seed},
            which=which,
            labels=self.config.student.labels if role == "student" else 1.0,
            **taught,
        )
        if processes.is_first_process():
            save_model(
                fitted.model,
                prepared.units,
                folder,
                key=key,
                train_seconds=round(fitted.seconds, 3),
                train_cpu_seconds=round(fitted.cpu_seconds, 3),
                epochs=fitted.epochs,
                updates=fitted.updates,
                validation=fitted.validation,
            )
        processes.barrier()

    def _data(self, role: str, views: Sequence[str], labelled: bool, without: Without | None) -> Utterances:
        """Return what the model of a cell is trained on, as ``_make`` says; UserError if that is nothing."""
        data = self.prepared.training(views)
        if labelled or role == "teacher":
            data = data.with_texts(as_long=labelled)
        if without is not None:
            data = replace(data, rows=np.setdiff1d(data.rows, without.rows))
            if not len(data.rows):
                raise UserError(f"teacher.folds: nothing is left to train on {without.name}; wanted other folds")
        if not len(data.rows):
            heard = ", ".join(dict.fromkeys(views))
            raise UserError(f"views: no utterance is left to train the {role.replace('_', ' ')} on, heard as {heard}")
        return data

    def _key(self, role: str, seed: int, settings: dict[str, Any]) -> str:
        # a teacher does not depend on what students hear, nor a student alone on what the teacher does
        views: Any = {
            "teacher": list(dict.fromkeys(pair.teacher for pair in self.config.views)),
            "student_alone": [pair.student for pair in self.config.views],
        }.get(role, resolved(self.config)["views"])
        about = {"views": views, "test_view": self.config.tested_view(role)}
        self.prepared.refuse_changed()
        return fingerprint(role, str(seed), self.prepared.fingerprint, {**settings, **about})

    def _root(self, seed: int | None) -> Path:
        return self.run.path / "seeds" / ("shared" if seed is None else str(seed))

    def _folder(self, role: str, seed: int) -> Path:
        shared = role == "teacher" and self.config.teacher.seed is not None
        return self._root(None if shared else seed) / role

    def cells(self, seed: int) -> list[Cell]:
        """Return the models of a seed in the order of the report's table."""
        return [Cell(role, self._folder(role, seed), seed) for role in ROLES]

    # -- after the evaluation --------------------------------------------------------------------------------------

    def gather_log(self) -> None:
        """Write the epochs of all models, in the order of the table, as the run's log."""
        gather_logs(sorted(self.run.path.glob("seeds/**/*.checkpoints/log.jsonl")), self.run.path / "log.jsonl")

    def deploy(self) -> int:
        """Copy the models of the seed whose student validates best to the top of the run; return that seed."""
        metric = self.config.student.trainer.monitor
        rows = [row for row in self.run.read_metrics() if row["role"] == "student" and row["split"] == "valid"]
        best = min(rows, key=lambda row: row["metrics"][metric])["seed"]
        # no command that evaluates them writes into what is copied
        with processes.first_process_first(), processes.one_command_makes(self.run.metrics, self.announce):
            if processes.is_first_process():
                for role in ROLES:
                    if self._folder(role, best).exists():  # a pretrained teacher stays where it is
                        deploy_model(self._folder(role, best), self.run.path / role)
        return int(best)


def member_seed(seed: int, place: int) -> int:
    """Return the seed that the member at a place of an ensemble is fitted with, so that equal settings differ.

    The first has the ensemble's own, as a teacher by itself; the others have 28 bits of a hash, since a sum would give
    one seed's second member the seed of the next one's first.
    """
    return int(fingerprint("member", {"seed": seed, "place": place})[:7], 16) if place else seed


def _trained(prepared: Prepared) -> list[Utterance]:
    """Return the utterances that are trained on, in the order of their rows."""
    return [each for part in prepared.training_parts for each in prepared.corpora[part].utterances]


def _no_terms(model: AcousticModel) -> Sequence[Term]:
    return ()


def _as_teacher(folder: Path) -> Teacher:
    model, units = load_model(folder)
    name = fingerprint((folder / "model.safetensors").read_bytes())
    return Teacher([model], [Member(name, units.symbols, error=read_json(folder / "model.json")["validation"]["wer"])])
