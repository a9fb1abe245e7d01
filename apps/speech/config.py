"""The configuration of a speech run: what a recipe file holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from apps.speech.augment import Augment
from apps.speech.data.corpora import short_name
from apps.speech.decode.lm import MAX_ORDER, MIN_ORDER
from apps.speech.distill import Optimization
from apps.speech.text import TextRules
from kdcore.config import UserError, build, resolved
from kdcore.recipes import Recipes
from kdcore.teaching import Schedule
from kdcore.trainer_config import TrainerConfig

# of SentencePiece
MOST_PIECES = 1 << 16


@dataclass(frozen=True)
class DataConfig:
    """Which recordings are read, and how."""

    # a name (an4), a manifest, a folder or shards, or a list of several; the parts are train, valid and test if there
    # are such. NAME@speaker=A,B takes some of a corpus, NAME@speaker!=A the others, NAME@split=train one of its splits
    path: str | list[str] = ""
    # corpora of the parts, instead of those of ``path``
    train: str | list[str] | None = None
    valid: str | list[str] | None = None
    test: str | list[str] | None = None
    # speakers of the training part that validate where there is no valid part, and that test where there is no test
    valid_speakers: int = 8
    test_speakers: int = 8
    split_seed: int = 0
    # recordings without a text, which the teacher alone teaches on
    unlabelled: str | list[str] | None = None
    text: TextRules = field(default_factory=TextRules)
    skip_bad: bool = False

    def __post_init__(self) -> None:
        for name, least in (("valid_speakers", 1), ("test_speakers", 1), ("split_seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}: got {getattr(self, name)}, wanted {least} or more")

    @property
    def corpora(self) -> list[str | list[str]]:
        """What is given as a corpus or corpora, in order: of all parts, then of single ones."""
        given = [self.path or None, self.train, self.valid, self.test, self.unlabelled]
        return [each for each in given if each is not None]

    @property
    def name(self) -> str:
        """The name of what is trained on, for a folder: ``an4``, ``an4+fsdd``."""
        first = next(iter(self.corpora), "data")
        names = [first] if isinstance(first, str) else first
        return "+".join(dict.fromkeys(short_name(Path(name)) for name in names)) or "data"


@dataclass(frozen=True)
class UnitsConfig:
    """What the models write: characters, SentencePiece pieces trained on the training texts, or whole words."""

    # words: each word of the training texts is one symbol, as the events of a detector are
    kind: Literal["characters", "sentencepiece", "words"] = "characters"
    # of pieces
    size: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MOST_PIECES:
            raise ValueError(f"units.size: got {self.size}, wanted 1 to {MOST_PIECES} pieces")


@dataclass(frozen=True)
class ViewPair:
    """What the student hears, and what the teacher hears of the same utterance."""

    student: str = "clean"
    teacher: str = "clean"


def _trainer() -> TrainerConfig:
    return TrainerConfig(max_epochs=60, patience=0, monitor="cer", mode="min", gradient_clip=5.0)


@dataclass(frozen=True)
class ModelConfig:
    """One model: its kind, its size, and how it is trained."""

    kind: str = "conv_rnn"
    options: dict[str, Any] = field(default_factory=dict)
    optimization: Optimization = field(default_factory=Optimization)
    augment: Augment | None = field(default_factory=Augment)
    trainer: TrainerConfig = field(default_factory=_trainer)
    # int8: validated, chosen and stored with the weights rounded as an int8 runtime rounds them
    quantize: Literal["none", "int8"] = "none"
    # the share of the epochs after which training feels the rounding too
    quantize_from: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.quantize_from <= 1:
            raise ValueError(f"quantize_from: got {self.quantize_from}, wanted a share of the epochs, 0 to 1")


@dataclass(frozen=True)
class MemberConfig(ModelConfig):
    """A teacher, or one of several; ``guided`` trains it, or those of its folds, to spike where the first one does."""

    kind: str = "bilstm"
    # a folder of a Hugging Face CTC model; nothing is trained then
    path: str = ""
    guided: float = 0.0


@dataclass(frozen=True)
class TeacherConfig(MemberConfig):
    """The teacher; with ``members`` it is their ensemble."""

    members: list[MemberConfig] = field(default_factory=list)
    # average: posteriors are averaged frame by frame; switched: each utterance hears one of them, drawn anew a view
    combine: Literal["average", "switched"] = "average"
    # what an average is weighed by: the members' error rates on validation, or how sure each is of an utterance
    by: Literal["equal", "error", "confidence"] = "equal"
    # so many more, each trained without a share of the speakers, teach those: a teacher that has learnt a recording's
    # text by heart says of it little else; 0: the teacher itself teaches all (cross-fitting, Dao et al., 2021).
    # ``guided`` has them spike in the same frames, which they learn from the teacher on their own recordings only
    folds: int = 0
    # train one teacher with this seed for all students; None: one teacher a seed
    seed: int | None = 0

    @property
    def pretrained(self) -> bool:
        """Whether any of it comes from a folder."""
        return any(member.path for member in self.members or [self])


@dataclass(frozen=True)
class KnowledgeConfig:
    """One way of teaching, and how much it counts beside the labels."""

    weight: float = 1.0
    # epochs in which the weight falls to 0, where the teacher only gives the student a start; 0: it stays
    fade: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def schedule(self) -> Schedule:
        """The weight over the epochs."""
        return Schedule(self.weight, 0.0, "linear", epochs=self.fade) if self.fade else Schedule(self.weight)


@dataclass(frozen=True)
class StudentConfig(ModelConfig):
    """The student, and what it has of its own when it learns without a teacher."""

    options: dict[str, Any] = field(default_factory=lambda: {"size": "small"})
    # how much the labels count beside the teacher; the student alone has them at 1
    labels: float = 1.0
    # what differs when the student learns alone: tuned by itself, with the same budget
    alone: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DecodeConfig:
    """How transcripts are made for the evaluation: greedily, and by words of a lexicon under a language model."""

    beam: int = 32
    # order of the language model of the training texts; 0: greedy only
    order: int = 3
    # the weights tried on validation, for each model by itself
    lm_weights: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75, 1.0, 1.5])
    word_scores: list[float] = field(default_factory=lambda: [0.0, 1.0, 2.0, 4.0])

    def __post_init__(self) -> None:
        if self.beam < 1:
            raise ValueError(f"decode.beam: got {self.beam}, wanted 1 or more")
        if self.order and not MIN_ORDER <= self.order <= MAX_ORDER:
            raise ValueError(f"decode.order: got {self.order}, wanted {MIN_ORDER} to {MAX_ORDER}, or 0 for greedy only")
        for name, values in (("lm_weights", self.lm_weights), ("word_scores", self.word_scores)):
            if (self.order and not values) or not all(map(math.isfinite, values)):
                raise ValueError(f"decode.{name}: got {values}, wanted finite numbers, at least one (or order 0)")


@dataclass(frozen=True)
class ReportConfig:
    """What the report compares, on which part (None: on test), and which way is better."""

    metric: Literal["wer", "cer", "ser", "wer_lm", "real_time_factor"] = "wer"
    split: Literal["valid", "test"] | None = None
    higher_is_better: bool = False


@dataclass(frozen=True)
class SpeechConfig:
    """A whole run."""

    recipe: str = "custom"
    title: str = ""
    reference: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    units: UnitsConfig = field(default_factory=UnitsConfig)
    views: list[ViewPair] = field(default_factory=lambda: [ViewPair()])
    # what validation and test are heard through
    test_view: str = "clean"
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    # way of teaching -> weight and options
    knowledge: dict[str, KnowledgeConfig] = field(default_factory=dict)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    seeds: list[int] = field(default_factory=lambda: [0])
    report: ReportConfig = field(default_factory=ReportConfig)

    @property
    def heard_views(self) -> list[str]:
        """All views of the run: of student and teacher in training, and of the tests."""
        pairs = [view for pair in self.views for view in (pair.student, pair.teacher)]
        return list(dict.fromkeys([*pairs, self.test_view]))

    def taught_views(self, part: str) -> list[str]:
        """Return the views in which the teacher hears a part."""
        if part in ("valid", "test"):
            return [self.tested_view("teacher")]
        return list(dict.fromkeys(pair.teacher for pair in self.views))

    def tested_view(self, role: str) -> str:
        """Return what a model is validated and tested in: a teacher in clean speech where it never hears the noise.

        That is of the channel that it hears.
        """
        if role != "teacher" or self.test_view in {pair.teacher for pair in self.views}:
            return self.test_view
        first = self.views[0].teacher.partition("+")[0].strip()
        return first if first.startswith("channel:") else "clean"

    def part_views(self, part: str) -> list[str]:
        """Return the views in which a part is heard by anyone."""
        if part in ("valid", "test"):
            return list(dict.fromkeys([self.test_view, self.tested_view("teacher")]))
        return list(dict.fromkeys(view for pair in self.views for view in (pair.student, pair.teacher)))


def alone_config(config: SpeechConfig) -> ModelConfig:
    """Return how the student is trained without a teacher: as with one, but for what ``student.alone`` sets."""
    student = config.student
    plain = resolved(ModelConfig(**{each.name: getattr(student, each.name) for each in fields(ModelConfig)}))
    for section, values in student.alone.items():
        if section not in ("optimization", "augment", "trainer") or not isinstance(values, dict):
            raise UserError(f"student.alone: got {section!r}, wanted optimization, augment or trainer with settings")
        plain[section] = {**(plain[section] or {}), **values}
    return build(ModelConfig, plain, "student.alone")


_RECIPES = Recipes("apps.speech")
recipe_names, read_recipe = _RECIPES.names, _RECIPES.read


def load_config(
    *, recipe: str | None = None, file: str | Path | None = None, overrides: Sequence[tuple[str, str]] = ()
) -> SpeechConfig:
    """Return the configuration of a recipe or a file (one of them) with overrides applied and types checked."""
    return _RECIPES.load(SpeechConfig, recipe=recipe, file=file, overrides=overrides)
