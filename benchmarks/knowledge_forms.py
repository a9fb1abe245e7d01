"""Which knowledge is best, and where: every loss and every way of teaching on one small pair of networks.

``python benchmarks/knowledge_forms.py --json benchmarks/results/knowledge_forms.json`` runs the study (some three hours
on two cores; what is done is kept in ``--work``, and the same command goes on from there), and writes
docs/knowledge_forms.md beside. ``--page`` only writes the page from the JSON.

Nothing is chosen on test rows. The student alone gets the best of three learning rates by validation, and every form
has that one; a form's strength is the best of three by validation on the first two seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # started as a script
    sys.path.insert(0, str(ROOT))

from kdcore.command_line import guarded  # noqa: E402
from kdcore.run import provenance, read_json, write_json, write_text  # noqa: E402

SEEDS, CHOOSING = tuple(range(10)), (0, 1)
# a way of teaching takes several fits a seed, so it has fewer
WAY_SEEDS = SEEDS[:5]
STRENGTHS = (0.1, 0.5, 2.0)
DATA, PARTS = ("digits", "mnist"), ("losses", "ways")


@dataclass(frozen=True, order=True)
class Task:
    """One fit: of a form (or ``alone``, or a way) with a setting, on a data set and a seed."""

    data: str
    seed: int
    kind: str
    name: str
    setting: float

    @property
    def key(self) -> str:
        """A name for the results file."""
        return f"{self.data}/{self.kind}/{self.name}/{self.setting:g}/{self.seed}"


_STUDIES: dict[tuple[str, int], Any] = {}


def run_task(task: Task, folder: Path, rate: float) -> dict[str, Any]:
    """Run one fit in this process; return its validation and test accuracy."""
    import torch

    from benchmarks.forms import losses, study, ways

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if (task.data, task.seed) not in _STUDIES:
        _STUDIES.clear()  # one seed's rows and teacher outputs are enough to hold
        _STUDIES[task.data, task.seed] = study.Study(task.data, task.seed, folder)
    current = _STUDIES[task.data, task.seed]
    if rate:
        current.learning_rate = rate
    if task.kind == "way":
        return ways.run(current, task.name)
    strips = task.kind == "strips alone" or (task.kind == "loss" and losses.forms()[task.name].kind == "strips")
    if task.kind == "alone":
        step = current.alone(task.setting)
    elif task.kind == "strips alone":
        step = current.strip_step(current.strip_student(), [], rate=task.setting)
    else:
        step = losses.taught(current, losses.forms()[task.name], task.setting)
    study.fit(step, task.seed, current.strip_epochs if strips else current.epochs)
    judge = current.test_strips if strips else current.test
    teacher = current.strip_teacher if strips else current.teacher
    valid = (current.validate_strips if strips else current.validate)(step.student)["accuracy"]
    return {"valid": valid, "test": judge(step.student), "teacher": judge(teacher)}


class Results:
    """What is done so far, a line of JSON each, so that a study that was stopped goes on."""

    def __init__(self, work: Path) -> None:
        self.folder = work
        work.mkdir(parents=True, exist_ok=True)
        self.file = work / "results.jsonl"
        self.done: dict[str, dict[str, Any]] = {}
        if self.file.exists():
            for line in self.file.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # torn by a kill: that fit is made again
                self.done[row["key"]] = row

    def add(self, task: Task, values: dict[str, Any]) -> None:
        """Keep a result."""
        row = {"key": task.key, **values}
        self.done[task.key] = row
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")

    def complete(self, tasks: list[Task], rates: dict[str, float], jobs: int) -> None:
        """Run what is missing of some tasks, those of a seed together; tell what is done."""
        left = sorted(task for task in tasks if task.key not in self.done)
        with ProcessPoolExecutor(jobs) as pool:
            futures = [(task, pool.submit(run_task, task, self.folder, rates.get(task.data, 0.0))) for task in left]
            for count, (task, future) in enumerate(futures, 1):
                self.add(task, future.result())
                print(f"{count}/{len(left)} {task.key}: {self.done[task.key]}", file=sys.stderr, flush=True)

    def mean(self, data: str, kind: str, name: str, setting: float, what: str, seeds: tuple[int, ...]) -> float:
        """Return the mean of a result over seeds."""
        values = [self.done[Task(data, seed, kind, name, setting).key][what] for seed in seeds]
        return float(sum(values)) / len(values)


def study_of(data: str, results: Results, jobs: int, only: list[str], parts: list[str]) -> dict[str, Any]:
    """Run the study on one data set and return its part of the JSON."""
    from benchmarks.forms.losses import forms
    from benchmarks.forms.study import LEARNING_RATES
    from benchmarks.forms.ways import WAYS

    kinds = ("alone", "strips alone")
    alone = [Task(data, s, kind, kind, rate) for s in CHOOSING for rate in LEARNING_RATES for kind in kinds]
    results.complete(alone, {}, jobs)
    best = {
        kind: max(LEARNING_RATES, key=lambda rate: results.mean(data, kind, kind, rate, "valid", CHOOSING))
        for kind in kinds
    }
    rates = {data: best["alone"]}
    names = [name for name in forms() if "losses" in parts and (not only or name in only)]
    strips = {name for name, form in forms().items() if form.kind == "strips"}
    results.complete([Task(data, seed, kind, kind, rate) for seed in SEEDS for kind, rate in best.items()], {}, jobs)
    for group, rate in ((set(names) - strips, best["alone"]), (set(names) & strips, best["strips alone"])):
        tried = [Task(data, s, "loss", n, w) for s in CHOOSING for n in sorted(group) for w in STRENGTHS]
        results.complete(tried, {data: rate}, jobs)
        chosen = {n: _strongest(results, data, n) for n in group}
        final = [Task(data, s, "loss", n, w) for s in SEEDS for n, w in sorted(chosen.items())]
        results.complete(final, {data: rate}, jobs)
    wanted = [name for name in WAYS if "ways" in parts and (not only or name in only)]
    results.complete([Task(data, s, "way", n, 0) for s in WAY_SEEDS for n in wanted], rates, jobs)
    return {
        "learning_rates": best,
        "losses": [_loss_row(results, data, name, name in strips, best) for name in names],
        "ways": [_way_row(results, data, name) for name in wanted],
    }


def _strongest(results: Results, data: str, name: str) -> float:
    return max(STRENGTHS, key=lambda w: results.mean(data, "loss", name, w, "valid", CHOOSING))


def _loss_row(results: Results, data: str, name: str, strips: bool, best: dict[str, float]) -> dict[str, Any]:
    from benchmarks.forms.losses import forms
    from kdcore.losses import entry

    kind = "strips alone" if strips else "alone"
    strength = _strongest(results, data, name)
    students = [results.done[Task(data, seed, "loss", name, strength).key] for seed in SEEDS]
    alone = [results.done[Task(data, seed, kind, kind, best[kind]).key]["test"] for seed in SEEDS]
    return {
        "name": name,
        "family": entry(name).family,
        "task": "strips" if strips else "images",
        "note": forms()[name].note,
        "strength": strength,
        **_compared([row["test"] for row in students], alone),
        "teacher": [row["teacher"] for row in students],
    }


def _way_row(results: Results, data: str, name: str) -> dict[str, Any]:
    rows = [results.done[Task(data, seed, "way", name, 0).key] for seed in WAY_SEEDS]
    extra = {
        key: [row[key] for row in rows]
        for key in rows[0]
        if key not in ("key", "student", "alone", "metric", "control")
    }
    return {
        "name": name,
        "metric": rows[0]["metric"],
        "control": rows[0]["control"],
        **_compared([row["student"] for row in rows], [row["alone"] for row in rows]),
        **extra,
    }


def _compared(student: list[float], alone: list[float]) -> dict[str, Any]:
    """Return both over the seeds and their paired difference with a t interval."""
    from kdcore.statistics import paired_difference

    return {"student": student, "alone": alone, "difference": paired_difference(student, alone).as_dict()}


def _main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "knowledge_forms.json")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench" / "knowledge_forms")
    parser.add_argument("--data", choices=DATA, action="append", help="only this data set (may be given twice)")
    parser.add_argument("--part", choices=PARTS, action="append", help="only the losses, or only the ways")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only this loss or way")
    parser.add_argument("--jobs", type=int, default=1, help="fits at a time (default 1)")
    parser.add_argument("--page", action="store_true", help="only write docs/knowledge_forms.md from the JSON")
    args = parser.parse_args(words)
    if not args.page:
        results = Results(args.work)
        parts = {
            data: study_of(data, results, args.jobs, args.only, args.part or list(PARTS)) for data in args.data or DATA
        }
        chosen = [
            word
            for name in ("data", "part", "only")
            for each in getattr(args, name) or ()
            for word in (f"--{name}", each)
        ]
        command = ["python", "benchmarks/knowledge_forms.py", *chosen, "--json", f"benchmarks/results/{args.json.name}"]
        about: dict[str, Any] = {
            "seeds": SEEDS,
            "seeds_of_ways": WAY_SEEDS,
            "strengths": STRENGTHS,
            "chosen_on_seeds": CHOOSING,
        }
        write_json(
            args.json,
            {"benchmark": "knowledge forms", **about, "data": parts, "provenance": provenance(command=command)},
        )
    if not args.only:
        from benchmarks.forms.page import page

        write_text(ROOT / "docs" / "knowledge_forms.md", page(read_json(args.json)))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: _main(sys.argv[1:])))
