"""A recommender run from data to report: prepare, teach, distill, evaluate, export; every stage resumable.

Stages are skipped when their output is there and belongs to this very configuration, so the same command after
Ctrl-C or ``kill -9`` goes on where it stopped. Under torchrun all processes train together, and the first one alone
solves closed forms, measures and writes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apps.recsys import fitting
from apps.recsys.checks import check_config
from apps.recsys.compare import compare
from apps.recsys.config import ModelConfig, RecsysConfig, alone_config, baseline_config, student_dimension
from apps.recsys.data.dataset import Dataset, load_dataset
from apps.recsys.data.splits import Split, from_files, global_time, leave_last_out, ratio
from apps.recsys.data.store import find_data, write_canonical
from apps.recsys.evaluate import Evaluation, Evaluator, slices
from apps.recsys.initialize import initialize_from
from apps.recsys.knowledge import KNOWLEDGE, Knowledge
from apps.recsys.lessons import TeacherLessons, model_fingerprint
from apps.recsys.metrics import parse_metric
from apps.recsys.models.base import DotRecommender, Recommender
from apps.recsys.models.linear import fit_svd
from apps.recsys.models.options import build_options
from apps.recsys.models.store import load_model, model_bytes, save_model
from apps.recsys.topk import top_k
from kdcore import processes
from kdcore.config import UserError, build, read_yaml, resolved
from kdcore.run import (
    RunDirectory,
    belongs,
    deploy_model,
    fingerprint,
    gather_logs,
    make_once,
    metric_row,
    provenance,
    read_json,
    write_json,
)
from kdcore.teacher_cache import TeacherCache

Announce = Callable[[str], None]
_ROLES = ("teacher", "student_alone", "student")


@dataclass(frozen=True)
class Cell:
    """One fitted model of one seed: where it is and what it is."""

    role: str
    folder: Path
    seed: int


class Pipeline:
    """Runs the stages of a configuration in a run directory."""

    def __init__(self, config: RecsysConfig, out: str | os.PathLike[str], announce: Announce = lambda text: None):
        check_config(config)
        if Path(out).exists() and not Path(out).is_dir():
            raise UserError(f"--out: {out} is a file, wanted a folder for the run")
        self.config, self.announce = config, announce if processes.is_first_process() else lambda text: None
        self.run = RunDirectory(Path(out))  # made when there is something to write
        self._splits: dict[int, Split] = {}
        self._dataset: Dataset | None = None

    @classmethod
    def reopen(cls, out: str | os.PathLike[str], announce: Announce = lambda text: None) -> Pipeline:
        """Return the pipeline of an existing run; UserError if there is none."""
        file = Path(out) / "config.yaml"
        if not file.exists():
            raise UserError(f"{out}: no run here (config.yaml is missing)")
        return cls(build(RecsysConfig, read_yaml(file), str(file)), out, announce)

    # -- prepare ---------------------------------------------------------------------------------------------------

    def prepare(self) -> Dataset:
        """Read and check the data, keep a canonical copy in the run, and write configuration and provenance.

        Nothing is written before data and splits are known to be sound, so that a mistake leaves no run behind that
        would refuse the corrected command.
        """
        if self._dataset is None:
            with processes.first_process_first():
                self._dataset = self._prepared()
        return self._dataset

    def _prepared(self) -> Dataset:
        folder = self.run.path / "data"
        if not (folder / "dataset.json").exists():
            with processes.one_command_makes(folder, self.announce):
                # another one may have made it, with other settings too
                if not (folder / "dataset.json").exists():
                    self._write(folder)
        if self._dataset is None:
            self.run.refuse_other(resolved(self.config), RecsysConfig)
            self._dataset = load_dataset(folder)
        if not (self.run.path / "provenance.json").exists():
            about = provenance(
                seeds=self.config.seeds,
                data={"name": self._dataset.name, "fingerprint": self._dataset.fingerprint},
                simulated=self._simulated(),
            )
            write_json(self.run.path / "provenance.json", about)
        return self._dataset

    def _write(self, folder: Path) -> None:
        self._dataset = self._read()
        for seed in self.config.seeds:
            self.split(seed)
        if self.config.student.kind == "two_tower":  # what it cannot read is refused before a teacher is fitted
            fitting.new_model(self.config.student, self.split(self.config.seeds[0]), 0, self._dataset)
        self.run.write_config(resolved(self.config))
        write_canonical(self._dataset, folder)

    def _read(self) -> Dataset:
        data, split = self.config.data, self.config.split
        if split.kind == "files":
            return self._from_files()[0]
        path = find_data(data.path)
        self.announce(f"reading {data.path}")
        return load_dataset(
            path,
            columns=data.columns or None,
            min_rating=data.min_rating,
            k_core=data.k_core,
            duplicates=data.duplicates,
            skip_bad=data.skip_bad,
            name=Path(data.path).name,
        )

    def _from_files(self) -> tuple[Dataset, Split]:
        split, data = self.config.split, self.config.data
        files = (split.train_file, split.valid_file, split.test_file)
        if None in files:
            raise UserError("split.kind files: wanted --train FILE --valid FILE --test FILE, all three")
        return from_files(*map(str, files), columns=data.columns or None, skip_bad=data.skip_bad)

    def _simulated(self) -> bool:
        if self.config.split.kind == "files":
            return False
        file = find_data(self.config.data.path) / "dataset.json"
        return bool(file.exists() and read_json(file).get("simulated"))

    def split(self, seed: int) -> Split:
        """Return the split of a seed; only a ratio split depends on it."""
        dataset, config = self.prepare(), self.config.split
        if config.kind != "ratio":
            seed = 0
        elif config.seed is not None:
            seed = config.seed
        if seed not in self._splits:
            if config.kind == "leave_last_out":
                self._splits[seed] = leave_last_out(dataset)
            elif config.kind == "ratio":
                self._splits[seed] = ratio(dataset, config.test, config.valid, seed)
            elif config.kind == "global_time":
                self._splits[seed] = global_time(dataset, config.test, config.valid)
            else:
                self._splits[seed] = self._from_files()[1]
        return self._splits[seed]

    # -- teach and distill -----------------------------------------------------------------------------------------

    def teach(self, seed: int) -> Recommender:
        """Fit the teacher of a seed, or load it."""
        config = self.config.teacher
        own = seed if config.seed is None else config.seed
        key = self._key("teacher", own, resolved(config))
        return self._fit("teacher", own, key, config, self._folder("teacher", own))

    def distill(self, seed: int) -> None:
        """Fit the baselines, the student alone and the taught student of a seed."""
        for kind in self.config.baselines:
            self._baseline(kind, seed)
        self._student_alone(seed)
        self._student(seed)

    def _baseline(self, kind: str, seed: int) -> None:
        folder = self._folder(f"baselines/{kind}", seed)
        if kind == "svd":
            teacher, dimension = self.teach(seed), student_dimension(self.config)
            key = self._key("svd", seed, {"dimension": dimension, "teacher": model_fingerprint(teacher)})
            split = self.split(seed)
            self._keep(folder, key, lambda: _timed(lambda: fit_svd(teacher, split.train, dimension, seed)), alone=True)
            return
        config = baseline_config(self.config, kind)
        self._fit("baseline", seed, self._key(kind, seed, resolved(config)), config, folder)

    def _student_alone(self, seed: int) -> None:
        config = alone_config(self.config)
        key = self._key("student_alone", seed, resolved(config))
        self._fit("student_alone", seed, key, config, self._folder("student_alone", seed))

    def _student(self, seed: int) -> None:
        config, folder = self.config.student, self._folder("student", seed)
        teacher = self.teach(seed)
        settings = {
            "student": resolved(config),
            "knowledge": {name: resolved(each) for name, each in self.config.knowledge.items()},
            "teacher": model_fingerprint(teacher),
        }
        key = self._key("student", seed, settings)
        if processes.agree(belongs(folder, key)):
            return
        student, knowledge = self.taught(seed, self.config)
        self._fit("student", seed, key, config, folder, student=student, knowledge=knowledge)

    def taught(self, seed: int, config: RecsysConfig) -> tuple[DotRecommender, dict[str, tuple[float, Knowledge]]]:
        """Return a fresh student of ``config`` and the weighted knowledge the teacher of ``seed`` passes on to it."""
        teacher, split = self.teach(seed), self.split(seed)
        student = fitting.new_model(config.student, split, seed, self.prepare())
        if config.student.initialize == "svd":
            initialize_from(student, teacher, split.train, seed)
        lessons = self.lessons(teacher, split, student, seed)
        knowledge = {
            name: (each.weight, _knowledge(name, each.options, lessons)) for name, each in config.knowledge.items()
        }
        return student, knowledge

    def lessons(self, teacher: Recommender, split: Split, student: DotRecommender, seed: int) -> TeacherLessons:
        """Return what the teacher of a seed can be asked, cached in the run."""
        sequential = student.sequential
        return TeacherLessons(
            teacher,
            split.train,
            TeacherCache(self._root(seed if self.config.teacher.seed is None else None) / "teacher_cache"),
            student_dimension=int(getattr(student.options, "dimension", 0)),
            by_position=sequential,
            context=int(getattr(student.options, "length", 50)),
            progress=lambda what, done, total: self.announce(f"{what}: {done}/{total}"),
        )

    def _fit(self, role: str, seed: int, key: str, config: ModelConfig, folder: Path, **taught: Any) -> Recommender:
        """Return the stored model of a cell, fitting and storing it if it is not there."""
        split = self.split(seed)
        checkpoints = self._root(seed if role != "teacher" or self.config.teacher.seed is None else None)
        checkpoints = checkpoints / "checkpoints" / folder.name

        def fit() -> fitting.Fitted:
            self.announce(f"seed {seed}: fitting {role.replace('_', ' ')} ({config.kind})")
            name = f"{config.kind}-{config.options['dimension']}" if "dimension" in config.options else config.kind
            evaluator = Evaluator(split, "valid", (config.trainer.monitor,))
            return fitting.fit_model(
                config,
                split,
                evaluator,
                seed=seed,
                folder=checkpoints,
                key=key,
                context={"role": role, "model": name, "seed": seed},
                dataset=self.prepare(),
                **taught,
            )

        return self._keep(folder, key, fit, alone=config.kind in fitting.SOLVED)

    def _keep(self, folder: Path, key: str, fit: Callable[[], fitting.Fitted], *, alone: bool) -> Recommender:
        """Return the model stored under ``key``, or fit and store it; ``alone`` if one process is enough to fit it."""
        make_once(folder, key, lambda: self._make(folder, key, fit, alone), self.announce)
        return load_model(folder)

    def _make(self, folder: Path, key: str, fit: Callable[[], fitting.Fitted], alone: bool) -> None:
        fitted = fit() if processes.is_first_process() or not alone else None
        if fitted is not None and processes.is_first_process():
            save_model(
                fitted.model,
                folder,
                key=key,
                train_seconds=round(fitted.seconds, 3),
                train_cpu_seconds=round(fitted.cpu_seconds, 3),
                epochs=fitted.epochs,
            )
        processes.barrier()

    def _key(self, role: str, seed: int, settings: dict[str, Any]) -> str:
        return fingerprint(role, str(seed), self.split(seed).fingerprint, settings)

    def _root(self, seed: int | None) -> Path:
        return self.run.path / "seeds" / ("shared" if seed is None else str(seed))

    def _folder(self, role: str, seed: int) -> Path:
        shared = role == "teacher" and self.config.teacher.seed is not None
        return self._root(None if shared else seed) / role

    def cells(self, seed: int) -> list[Cell]:
        """Return every model of a seed in the order of the report's table."""
        cells = [Cell("teacher", self._folder("teacher", seed), seed)]
        cells += [Cell("baseline", self._folder(f"baselines/{kind}", seed), seed) for kind in self.config.baselines]
        cells += [Cell(role, self._folder(role, seed), seed) for role in ("student_alone", "student")]
        return cells

    # -- evaluate, deploy ------------------------------------------------------------------------------------------

    def evaluate(self) -> list[dict[str, Any]]:
        """Measure every model of every seed on validation and test; write metrics, slices and per-user values."""
        with processes.first_process_first(), processes.one_command_makes(self.run.metrics, self.announce):
            return self._evaluated() if processes.is_first_process() else self.run.read_metrics()

    def _evaluated(self) -> list[dict[str, Any]]:
        rows, sliced = [], []
        tested: dict[tuple[str, str], list[Evaluation]] = {}
        for seed in self.config.seeds:
            split = self.split(seed)
            for part in ("valid", "test"):
                # the monitor decides which seed is deployed, whether it was asked for or not
                monitor = [self.config.student.trainer.monitor] if part == "valid" else []
                evaluator = Evaluator(split, part, [*self.config.metrics, *monitor])
                for cell in self.cells(seed):
                    model = load_model(cell.folder)
                    self.announce(f"seed {seed}: evaluating {model.label()} on {part}")
                    evaluation = evaluator(model)
                    evaluation.save(self._root(seed) / "evaluation" / f"{part}-{_cell_name(cell)}.npz")
                    latency = latency_ms(model, split, part) if part == "test" else None
                    rows.append(self._row(cell, model, part, evaluation, latency))
                    if part == "test":
                        tested.setdefault((cell.role, _model_name(cell, model)), []).append(evaluation)
                        sliced += [] if cell.role == "baseline" else self._slices(cell, model, evaluation, split)
        self.run.write_metrics(rows)
        write_json(self.run.path / "slices.json", {"metric": self._metric, "slices": _one_label(sliced)})
        write_json(self.run.path / "comparisons.json", compare(tested, self._metric))
        self._gather_log()
        return rows

    @property
    def _metric(self) -> str:
        """The metric of slices and comparisons: the first that has a value per user."""
        return next(metric.name for metric in map(parse_metric, self.config.metrics) if metric.per_user)

    def evaluations(self, seed: int, part: str) -> list[tuple[str, str, Evaluation]]:
        """Return (role, model name, stored evaluation) of every model of a seed."""
        stored = []
        for cell in self.cells(seed):
            name = _model_name(cell, load_model(cell.folder))
            file = self._root(seed) / "evaluation" / f"{part}-{_cell_name(cell)}.npz"
            stored.append((cell.role, name, Evaluation.load(file)))
        return stored

    def _row(
        self, cell: Cell, model: Recommender, part: str, evaluation: Evaluation, latency: dict[str, float] | None
    ) -> dict[str, Any]:
        about = read_json(cell.folder / "model.json")
        return metric_row(
            domain="recsys",
            recipe=self.config.recipe,
            model=_model_name(cell, model),
            role=cell.role,
            seed=cell.seed,
            split=part,
            params=model.parameter_count(),
            bytes=model_bytes(cell.folder),
            metrics=evaluation.values,
            latency_ms=latency,
            train_seconds=about["train_seconds"],
            train_cpu_seconds=about["train_cpu_seconds"],
        )

    def _slices(self, cell: Cell, model: Recommender, evaluation: Evaluation, split: Split) -> list[dict[str, Any]]:
        about = {"role": cell.role, "model": _model_name(cell, model), "seed": cell.seed}
        return [{**row, **about} for row in slices(evaluation, split, self._metric)]

    def _gather_log(self) -> None:
        """Write the epochs of all models, in the order of the table, as the run's log."""
        gather_logs(sorted(self.run.path.glob("seeds/*/checkpoints/**/log.jsonl")), self.run.path / "log.jsonl")

    def deploy(self) -> int:
        """Copy the models of the seed whose student validates best to the top of the run; return that seed."""
        metric = parse_metric(self.config.student.trainer.monitor).name
        rows = [row for row in self.run.read_metrics() if row["role"] == "student" and row["split"] == "valid"]
        sign = 1.0 if self.config.student.trainer.mode == "max" else -1.0
        best = max(rows, key=lambda row: sign * row["metrics"][metric])["seed"]
        with processes.first_process_first():
            if processes.is_first_process():
                for role in _ROLES:
                    deploy_model(self._folder(role, best), self.run.path / role)
        return int(best)

    def run_all(self) -> list[dict[str, Any]]:
        """Run every stage and write the report."""
        self.prepare()
        for seed in self.config.seeds:
            self.teach(seed)
            self.distill(seed)
        rows = self.evaluate()
        self.deploy()
        return rows


def latency_ms(model: Recommender, split: Split, part: str, users: int = 100) -> dict[str, float]:
    """Return the time to rank all items for one user, median and 99th percentile in milliseconds."""
    seen = split.history(part)
    histories = seen if model.sequential else split.train
    chosen = np.linspace(0, split.n_users - 1, users).astype(np.int64)
    top_k(model, chosen[:5], 10, histories, seen)
    times = []
    for user in chosen:
        start = time.perf_counter()
        top_k(model, np.array([user]), 10, histories, seen)
        times.append((time.perf_counter() - start) * 1e3)
    return {"p50": round(float(np.percentile(times, 50)), 3), "p99": round(float(np.percentile(times, 99)), 3)}


def _knowledge(name: str, options: dict[str, Any], lessons: TeacherLessons) -> Knowledge:
    cls = KNOWLEDGE[name]
    return cls(build_options(f"knowledge.{name}", cls.options_type, options), lessons)


def _timed(fit: Callable[[], Recommender]) -> fitting.Fitted:
    started = time.perf_counter(), time.process_time()
    model = fit()
    return fitting.Fitted(model, time.perf_counter() - started[0], time.process_time() - started[1])


def _one_label(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give the n-th slice of an axis one label for all seeds: with a random split its bounds differ a little."""
    bounds: dict[tuple[str, int], tuple[int, int]] = {}
    for row in rows:
        low, high = map(int, row["slice"].split("-"))
        known = bounds.get((row["axis"], row["position"]), (low, high))
        bounds[row["axis"], row["position"]] = min(low, known[0]), max(high, known[1])
    names = {"activity": "user activity (interactions)", "popularity": "item popularity (interactions)"}
    labelled = []
    for row in rows:
        low, high = bounds[row["axis"], row["position"]]
        labelled.append({**row, "axis": names[row["axis"]], "slice": f"{low}-{high}"})
    return labelled


def _cell_name(cell: Cell) -> str:
    return f"baseline-{cell.folder.name}" if cell.role == "baseline" else cell.role


def _model_name(cell: Cell, model: Recommender) -> str:
    """Return the model's label; a BPR baseline is named after its loss, its structure being the student's."""
    return model.label().replace("mf-", "bpr-") if cell.folder.name == "bpr" else model.label()
