"""The checks of a whole configuration before anything runs: refuse at once what would fail after hours."""

from __future__ import annotations

import math
from dataclasses import fields

import torch

from apps.speech.config import MemberConfig, ModelConfig, SpeechConfig, TeacherConfig, alone_config
from apps.speech.knowledge import KNOWLEDGE, Need, knowledge_options, needs
from apps.speech.models import KINDS, model_options, new_model
from apps.speech.view_steps import Tempo
from apps.speech.views import View, parse_view
from kdcore.config import UserError

_MONITORS = ("wer", "cer")
# what torch takes
_SEEDS = 1 << 63


def check_config(config: SpeechConfig, *, folders: bool = True) -> None:
    """Raise UserError for the first setting that cannot work, naming it.

    ``folders`` looks into those of pretrained teachers too, which a run that has all its models may be without.
    """
    seeds = config.seeds
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0 or max(seeds) >= _SEEDS:
        raise UserError(f"seeds: got {seeds}, wanted distinct seeds of 0 or more, below 2^63, at least one")
    if config.report.metric == "wer_lm" and not config.decode.order:
        raise UserError("report.metric: got wer_lm, wanted decode.order with it: 0 makes no language model")
    _check_views(config)
    _check_teacher(config)
    for name, model in (("student", config.student), ("student.alone", alone_config(config))):
        _check_model(name, model)
        if not KINDS[model.kind][0].streaming:
            raise UserError(f"{name}.kind: got {model.kind}, wanted a model that streams: {', '.join(_streaming())}")
    _check_weight("student.labels", config.student.labels)
    if not config.knowledge:
        raise UserError(f"knowledge: wanted at least one way of teaching: {', '.join(KNOWLEDGE)}")
    for name, each in config.knowledge.items():
        _check_weight(f"knowledge.{name}.weight", each.weight)
        if each.fade < 0:
            raise UserError(f"knowledge.{name}.fade: got {each.fade}, wanted epochs, 0 or more")
        knowledge_options(name, each.options)
    wanted = needs({name: each.options for name, each in config.knowledge.items()})
    if wanted.attention and (config.teacher.kind != "attention" or config.teacher.members or config.teacher.path):
        raise UserError("knowledge.attention: wanted a teacher of kind attention, trained here and by itself")
    if wanted.teacher_layers:
        _check_layers(config, wanted)
    if folders:
        _check_folders(config.teacher)


def _check_weight(name: str, weight: float) -> None:
    if not (math.isfinite(weight) and weight >= 0):
        raise UserError(f"{name}: got {weight}, wanted a finite weight >= 0")


def _check_layers(config: SpeechConfig, wanted: Need) -> None:
    """Refuse layers that either model does not have, by making both."""
    if config.teacher.members or config.teacher.path:
        raise UserError("knowledge: hint and layers want one teacher trained here; an ensemble has no one encoder")
    pairs = (("teacher", config.teacher, wanted.teacher_layers), ("student", config.student, wanted.student_layers))
    for name, model, layers in pairs:
        with torch.device("meta"):  # which takes no memory, however large it is
            made = new_model(model.kind, 2, model.options)
        for layer in layers:
            try:
                made.width(layer)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None


def _streaming() -> list[str]:
    return [kind for kind, (model, _) in KINDS.items() if model.streaming]


def _check_views(config: SpeechConfig) -> None:
    if not config.views:
        raise UserError("views: wanted at least one pair of what student and teacher hear")
    for pair in config.views:
        student, teacher = parse_view(pair.student), parse_view(pair.teacher)
        # frames must match: both are as long, or the same change of speed is in both
        if _moved(student) != _moved(teacher):
            raise UserError(
                f"views: {pair.student} and {pair.teacher} are not of one length; give both the same speed, and the "
                "same tempo, before which both hear the same"
            )
    if _moved(parse_view(config.test_view)) and config.test_view not in {pair.teacher for pair in config.views}:
        raise UserError(
            f"test_view: got {config.test_view}, whose frames are not those of clean, in which the teacher is tested; "
            "wanted one of the teacher's views, or neither speed nor tempo"
        )


def _moved(view: View) -> list[str]:
    """Return the steps that move frames; where a tempo's are cut depends on what is heard, so on the steps before."""
    return [
        View(view.steps[: place + 1], view.channel).name if isinstance(step, Tempo) else step.name
        for place, step in enumerate(view.steps)
        if not step.keeps_frames
    ]


def _check_teacher(config: SpeechConfig) -> None:
    teacher = config.teacher
    if teacher.seed is not None and not 0 <= teacher.seed < _SEEDS:
        raise UserError(
            f"teacher.seed: got {teacher.seed}, wanted 0 or more, below 2^63, or null for one teacher a seed"
        )
    _check_used(teacher)
    _check_folds(config)
    if teacher.by == "error" and any(member.path for member in teacher.members):
        raise UserError("teacher.by: wanted equal or confidence: a pretrained member has no error rate of this run")
    for index, (name, member) in enumerate(_members(teacher).items()):
        # the teachers of folds come after the teacher
        _check_member(name, member, first=index == 0 and not teacher.folds)


def _members(teacher: TeacherConfig) -> dict[str, MemberConfig]:
    """Return the models that teach, by where they are set."""
    if not teacher.members:
        return {"teacher": teacher}
    return {f"teacher.members[{index}]": member for index, member in enumerate(teacher.members)}


def _check_used(teacher: TeacherConfig) -> None:
    """Refuse what would change nothing: a model beside members, and a way to combine fewer than two."""
    plain = TeacherConfig()
    for name in [each.name for each in fields(MemberConfig)]:
        got = getattr(teacher, name)
        if teacher.members and got != getattr(plain, name):
            raise UserError(f"teacher.{name}: got {got!r}, wanted nothing beside teacher.members; set it for a member")
    for name in ("combine", "by"):
        got = getattr(teacher, name)
        if len(teacher.members) < 2 and got != getattr(plain, name):
            raise UserError(f"teacher.{name}: got {got}, wanted it with at least two teacher.members alone")
    if teacher.combine == "switched" and teacher.by != plain.by:
        raise UserError(f"teacher.by: got {teacher.by}, wanted it with combine: average, whose weights it says")


def _check_folds(config: SpeechConfig) -> None:
    """Refuse folds of what is not one model trained here, and what takes that several speak alike."""
    teacher = config.teacher
    if not teacher.folds:
        return
    if teacher.folds < 2:
        raise UserError(f"teacher.folds: got {teacher.folds}, wanted at least 2, or 0 for none")
    if teacher.members or teacher.path:
        raise UserError("teacher.folds: wanted one teacher, trained here: no teacher.members and no teacher.path")
    if needs({name: each.options for name, each in config.knowledge.items()}).teacher_layers:
        raise UserError("teacher.folds: hint and layers want one teacher: the layers of several are not alike")


def _check_folders(teacher: TeacherConfig) -> None:
    """Refuse a pretrained teacher that cannot teach, or stands there twice, before a corpus is read for it."""
    pretrained = {name: member.path for name, member in _members(teacher).items() if member.path}
    if not pretrained:
        return
    from apps.speech.models.pretrained import check_folder, folder_fingerprint

    for name, path in pretrained.items():
        try:
            check_folder(path)
        except UserError as error:
            raise UserError(f"{name}.path: {error}") from None
    met: dict[str, str] = {}
    for name, path in pretrained.items() if len(pretrained) > 1 else ():
        # by content: a copy under another name would teach the same
        if (first := met.setdefault(folder_fingerprint(path), name)) != name:
            raise UserError(f"{name}.path: {path} holds the same model as {first}, wanted each member once")


def _check_member(name: str, member: MemberConfig, *, first: bool) -> None:
    if not member.path:
        _check_model(name, member)
    if member.guided and (first or member.path):
        raise UserError(
            f"{name}.guided: wanted a member after the first, which is the guide, or folds, and trained here"
        )
    _check_weight(f"{name}.guided", member.guided)


def _check_model(name: str, model: ModelConfig) -> None:
    if model.trainer.accelerator == "mps":
        raise UserError(f"{name}.trainer.accelerator: got mps, for which torch has no CTC; wanted auto, cuda or cpu")
    try:
        model_options(model.kind, model.options)
    except UserError as error:
        raise UserError(f"{name}.{error}") from None
    if model.trainer.monitor not in _MONITORS or model.trainer.mode != "min":
        raise UserError(f"{name}.trainer: got monitor {model.trainer.monitor}, wanted wer or cer, and mode min")
