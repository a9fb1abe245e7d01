"""The configuration of a recommender run: what a recipe file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from apps.recsys.distill import Optimization
from apps.recsys.models.store import model_options
from kdcore.config import UserError, build, resolved
from kdcore.recipes import Recipes
from kdcore.trainer_config import TrainerConfig


@dataclass(frozen=True)
class DataConfig:
    """Which interactions are read, and how."""

    # a name (ml-100k), a file or a folder
    path: str = ""
    # canonical name -> name in the file, for CSV, Parquet and JSON lines
    columns: dict[str, str] = field(default_factory=dict)
    # ratings below this are dropped
    min_rating: float | None = None
    # users and items with fewer interactions are dropped, repeatedly; 0 keeps all
    k_core: int = 0
    # keep, first or last of a user's repeated interactions with an item
    duplicates: Literal["keep", "first", "last"] = "keep"
    skip_bad: bool = False


@dataclass(frozen=True)
class SplitConfig:
    """How interactions are divided into training, validation and test."""

    # leave_last_out, ratio, global_time or files
    kind: str = "leave_last_out"
    test: float = 0.2
    valid: float = 0.08
    # None: a ratio split is drawn anew for every seed of the run
    seed: int | None = None
    # the files of kind `files`
    train_file: str | None = None
    valid_file: str | None = None
    test_file: str | None = None


@dataclass(frozen=True)
class ModelConfig:
    """One model: its kind, its size, and how it is trained."""

    kind: str = "mf"
    options: dict[str, Any] = field(default_factory=dict)
    optimization: Optimization = field(default_factory=Optimization)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


@dataclass(frozen=True)
class TeacherConfig(ModelConfig):
    """A teacher; of kind `ensemble` it averages its members' standardised scores."""

    kind: str = "ease"
    members: list[ModelConfig] = field(default_factory=list)
    # one weight a member; none: equal
    weights: list[float] = field(default_factory=list)
    # train one teacher with this seed for all students (its split must not vary); None: one teacher a seed
    seed: int | None = None


@dataclass(frozen=True)
class KnowledgeConfig:
    """One way of teaching and how much it counts beside the student's own loss (weight 1)."""

    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StudentConfig(ModelConfig):
    """The student, and what it has of its own when it learns without a teacher."""

    # svd: the taught student starts from the truncated SVD of the teacher's scores (mf) or item vectors (sasrec)
    initialize: str = "random"
    # what differs when the student learns alone: tuned by itself, with the same budget
    alone: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RecsysConfig:
    """A whole run."""

    recipe: str = "custom"
    title: str = ""
    reference: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    # knowledge name -> weight and options
    knowledge: dict[str, KnowledgeConfig] = field(default_factory=dict)
    # kind -> options of the baselines at the student's size: ials, svd, bpr
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: list[str] = field(
        default_factory=lambda: [
            *("ndcg@10", "recall@10", "hr@10", "mrr@10", "map@10", "precision@10"),
            *("coverage@10", "novelty@10", "gini@10"),
        ]
    )
    seeds: list[int] = field(default_factory=lambda: [0])


def alone_config(config: RecsysConfig) -> ModelConfig:
    """Return how the student is trained without a teacher: as with one, but for what ``student.alone`` sets."""
    student = config.student
    plain = resolved(ModelConfig(student.kind, student.options, student.optimization, student.trainer))
    for section, values in student.alone.items():
        if section not in ("optimization", "options", "trainer") or not isinstance(values, dict):
            raise UserError(f"student.alone: got {section!r}, wanted optimization, options or trainer with settings")
        plain[section] = {**plain[section], **values}
    return build(ModelConfig, plain, "student.alone")


def student_dimension(config: RecsysConfig) -> int:
    """Return the width of the student's vectors, which its baselines share."""
    return int(model_options(config.student.kind, config.student.options).dimension)


def baseline_config(config: RecsysConfig, kind: str, values: Mapping[str, Any] | None = None) -> ModelConfig:
    """Return how a baseline (ials, bpr) of the student's size is fitted; ``values`` replace its own settings."""
    options, dimension = {**config.baselines[kind], **(values or {})}, student_dimension(config)
    if kind == "ials":
        return ModelConfig("ials", {"dimension": dimension, **options}, trainer=config.student.trainer)
    optimization = build(Optimization, {"loss": "bpr", **options}, f"baselines.{kind}")
    return ModelConfig("mf", {"dimension": dimension}, optimization, config.student.trainer)


_RECIPES = Recipes("apps.recsys")
recipe_names, read_recipe = _RECIPES.names, _RECIPES.read


def load_config(
    *, recipe: str | None = None, file: str | Path | None = None, overrides: Sequence[tuple[str, str]] = ()
) -> RecsysConfig:
    """Return the configuration of a recipe or a file (one of them) with overrides applied and types checked."""
    return _RECIPES.load(RecsysConfig, recipe=recipe, file=file, overrides=overrides)
