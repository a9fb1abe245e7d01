"""Search for hyperparameters on validation: the student, the student alone and every baseline, with one budget.

A gain over a baseline that was tuned less is no gain. So everything that is compared gets the same number of trials of
the same sampler (Optuna's TPE) on the same validation split, and the test part is never looked at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from apps.recsys import fitting
from apps.recsys.config import ModelConfig, RecsysConfig, alone_config, baseline_config
from apps.recsys.evaluate import Evaluator
from apps.recsys.models.store import model_options
from apps.recsys.pipeline import Pipeline
from kdcore.config import UserError, apply_overrides, build, resolved
from kdcore.run import read_log, write_text

if TYPE_CHECKING:
    import optuna

# dotted setting -> (low, high, kind); kind is log, linear, or integer
Space = Mapping[str, tuple[float, float, str]]

_GRADIENT: Space = {
    "optimization.learning_rate": (1e-3, 3e-2, "log"),
    "optimization.weight_decay": (1e-7, 1e-3, "log"),
}
_SEQUENTIAL: Space = {
    "optimization.learning_rate": (5e-4, 1e-2, "log"),
    "options.dropout": (0.0, 0.5, "linear"),
}
_IALS: Space = {
    "regularization": (1e-2, 1e2, "log"),
    "alpha": (0.3, 30.0, "log"),
    "iterations": (5, 40, "integer"),
}
_BASELINES: Mapping[str, Space] = {
    "ials": _IALS,
    "bpr": {path.removeprefix("optimization."): bounds for path, bounds in _GRADIENT.items()},
}
_KNOWLEDGE: Mapping[str, Space] = {
    "relaxed_ranking": {
        "weight": (3e-3, 3.0, "log"),
        "options.temperature": (5.0, 100.0, "log"),
        "options.interesting": (20, 80, "integer"),
    },
    "item_relaxed_ranking": {"weight": (1e-3, 1.0, "log")},
    "soft_targets": {"weight": (0.03, 30.0, "log"), "options.sharpness": (0.2, 3.0, "log")},
    "sparse_soft_targets": {"weight": (0.1, 10.0, "log"), "options.temperature": (0.7, 6.0, "log")},
    "ranking_distillation": {"weight": (1e-2, 3.0, "log"), "options.position_scale": (0.5, 20.0, "log")},
    "collaborative_distillation": {"weight": (1e-3, 1.0, "log"), "options.rank_scale": (10.0, 200.0, "log")},
    "distillation_experts": {"weight": (1e-4, 1e-1, "log")},
    "item_distillation_experts": {"weight": (1e-4, 1e-1, "log")},
}


class Tuner:
    """Runs the searches of a configuration; every finished trial is on disk, so a killed search goes on."""

    def __init__(self, config: RecsysConfig, out: Path, trials: int, announce: Callable[[str], None]) -> None:
        if trials < 1:
            raise UserError(f"--trials: got {trials}, wanted at least 1")
        self.pipeline = Pipeline(config, out, announce)
        self.config, self.out, self.trials, self.announce = config, out, trials, announce
        self.seed = config.seeds[0]

    def tune(self) -> dict[str, Any]:
        """Search for every part and return the tuned settings of the run; also written to ``tuned.yaml``."""
        import yaml

        self.pipeline.prepare()
        settings = resolved(self.config)
        alone = self._search("student_alone", self._own_space(), self._alone, resolved(alone_config(self.config)))
        settings["student"]["alone"] = _merged(settings["student"]["alone"], alone)
        for kind, space in _BASELINES.items():
            if kind in self.config.baselines:
                score, current = partial(self._baseline, kind), self._baseline_settings(kind)
                settings["baselines"][kind].update(self._search(kind, space, score, current))
        space = dict(self._own_space())
        for name in self.config.knowledge:
            space |= {f"knowledge.{name}.{path}": bounds for path, bounds in _KNOWLEDGE[name].items()}
        current = {**resolved(self.config.student), "knowledge": resolved(self.config)["knowledge"]}
        for path, value in self._search("student", space, self._student, current).items():
            prefix = "" if path.startswith("knowledge.") else "student."
            settings = apply_overrides(settings, [(prefix + path, json.dumps(value))])
        build(RecsysConfig, settings, "tuned settings")
        write_text(self.out / "tuned.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        return settings

    def _own_space(self) -> Space:
        return _SEQUENTIAL if self.config.student.kind == "sasrec" else _GRADIENT

    def _search(
        self, part: str, space: Space, score: Callable[[dict[str, Any]], float], current: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the best values of one part's space; earlier trials are read from ``trials.jsonl``.

        The first trial is the ``current`` settings, so that on validation no search ends below its recipe. Every other
        has a sampler of its own seed, so a search that was killed proposes what it would have proposed.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction=self._direction)
        file = self.out / "trials.jsonl"
        trials = read_log(file)
        distributions = {path: _distribution(bounds) for path, bounds in space.items()}
        earlier = [done for done in trials if done["part"] == part and set(done["values"]) == set(space)]
        for done in earlier[: self.trials]:  # no part may profit from trials the others do not get
            study.add_trial(
                optuna.trial.create_trial(params=done["values"], distributions=distributions, value=done["score"])
            )
        while len(study.trials) < self.trials:
            study.sampler = optuna.samplers.TPESampler(seed=self.seed * 1_000_003 + len(study.trials))
            if not study.trials:
                study.enqueue_trial(_within(space, current))
            trial = study.ask(distributions)
            value = self._tried(score, dict(trial.params))
            study.tell(trial, value)
            trials.append({"part": part, "values": trial.params, "score": value})
            # the whole file, atomically: a line torn by a kill would hide all that came after it
            write_text(file, "".join(json.dumps(done) + "\n" for done in trials))
            self.announce(
                f"{part}: trial {len(study.trials)} of {self.trials}: {value:.4f}, best {study.best_value:.4f}"
            )
        return dict(study.best_params)

    def _baseline_settings(self, kind: str) -> dict[str, Any]:
        """Return what a baseline has now, its defaults filled in, under the names of its search space."""
        config = resolved(baseline_config(self.config, kind))
        return asdict(model_options(kind, config["options"])) if kind == "ials" else config["optimization"]

    @property
    def _direction(self) -> Literal["maximize", "minimize"]:
        return "maximize" if self.config.student.trainer.mode == "max" else "minimize"

    def _tried(self, score: Callable[[dict[str, Any]], float], values: dict[str, Any]) -> float:
        """Return the score of one trial; one that diverged is the worst there is, and the search goes on."""
        try:
            return score(values)
        except FloatingPointError:
            return -math.inf if self._direction == "maximize" else math.inf

    def _score(self, config: ModelConfig, **taught: Any) -> float:
        """Return the best validation metric of one fit."""
        split = self.pipeline.split(self.seed)
        evaluator = Evaluator(split, "valid", (config.trainer.monitor,))
        fitted = fitting.fit_model(config, split, evaluator, seed=self.seed, dataset=self.pipeline.prepare(), **taught)
        return evaluator(fitted.model).values[config.trainer.monitor]

    def _alone(self, values: dict[str, Any]) -> float:
        config = resolved(alone_config(self.config))
        return self._score(build(ModelConfig, _merged(config, values)))

    def _baseline(self, kind: str, values: dict[str, Any]) -> float:
        return self._score(baseline_config(self.config, kind, values))

    def _student(self, values: dict[str, Any]) -> float:
        own = {path: value for path, value in values.items() if not path.startswith("knowledge.")}
        settings = _merged(resolved(self.config), {f"student.{path}": value for path, value in own.items()})
        taught = {path: value for path, value in values.items() if path.startswith("knowledge.")}
        config = build(RecsysConfig, _merged(settings, taught))
        student, knowledge = self.pipeline.taught(self.seed, config)
        return self._score(config.student, student=student, knowledge=knowledge)


def _within(space: Space, current: Mapping[str, Any]) -> dict[str, Any]:
    """Return the current value of every path of a space that has one inside its bounds; the rest is drawn."""
    values = {}
    for path, (low, high, _) in space.items():
        value: Any = current
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(value, int | float) and low <= value <= high:
            values[path] = value
    return values


def _distribution(bounds: tuple[float, float, str]) -> optuna.distributions.BaseDistribution:
    import optuna

    low, high, kind = bounds
    if kind == "integer":
        return optuna.distributions.IntDistribution(int(low), int(high))
    return optuna.distributions.FloatDistribution(low, high, log=kind == "log")


def _merged(settings: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return apply_overrides(settings, [(path, json.dumps(value)) for path, value in values.items()])
