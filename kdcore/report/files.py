"""Reads what a run directory holds; a piece that is missing is empty, a damaged one is the user's error."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kdcore.config import UserError
from kdcore.run import ROLES, read_json, read_log

_ROW_KEYS = ("model", "role", "seed", "split", "metrics")


@dataclass(frozen=True)
class RunFiles:
    """Everything the report shows of a run; ``slices`` is the content of ``slices.json`` or None."""

    path: Path
    rows: list[dict[str, Any]]
    comparisons: list[dict[str, Any]] | None
    config: dict[str, Any]
    config_text: str
    provenance: dict[str, Any]
    log: list[dict[str, Any]]
    slices: dict[str, Any] | None
    # texts worth reading, such as the worst errors: {"title", "blocks": [{"title", "text"}]}
    examples: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """The run's name: its folder's."""
        return self.path.resolve().name

    @property
    def options(self) -> dict[str, Any]:
        """The section ``report`` of the configuration: ``metric``, ``split``, ``higher_is_better``."""
        section = self.config.get("report")
        return section if isinstance(section, dict) else {}

    @property
    def simulated(self) -> bool:
        """Whether provenance or configuration say that the data is simulated."""
        return _says_simulated(self.provenance) or _says_simulated(self.config)


def read_run(path: str | os.PathLike[str]) -> RunFiles:
    """Read a run directory.

    Raises: UserError if the folder is missing or holds neither results nor a log, or if a file is damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such run directory")
    rows = _read_json(folder / "metrics.json", list)
    log = [event for event in read_log(folder / "log.jsonl") if isinstance(event, dict)]
    if rows is None and not log:
        raise UserError(f"{folder}: no metrics.json and no log.jsonl, so there is nothing to report")
    check_rows(rows or [], folder / "metrics.json")
    comparisons = _read_json(folder / "comparisons.json", list)
    _check_comparisons(comparisons or [], folder / "comparisons.json")
    slices = _read_json(folder / "slices.json", dict)
    _check_slices(slices, folder / "slices.json")
    examples = _read_json(folder / "examples.json", dict)
    _check_examples(examples, folder / "examples.json")
    config_text, config = _read_config(folder / "config.yaml")
    provenance = _read_json(folder / "provenance.json", dict) or {}
    return RunFiles(folder, rows or [], comparisons, config, config_text, provenance, log, slices, examples)


def check_rows(rows: Sequence[Mapping[str, Any]], source: str | os.PathLike[str] = "metrics") -> None:
    """Raise a UserError that names the row if ``rows`` do not keep the contract of ``metrics.json``."""
    seen: set[tuple[Any, ...]] = set()
    for number, row in enumerate(rows, start=1):
        _require(row, _ROW_KEYS, source, f"row {number}")
        if row["role"] not in ROLES:
            raise UserError(f"{source}: row {number}: role {row['role']!r} is not one of {', '.join(ROLES)}")
        if not isinstance(row["metrics"], Mapping):
            raise UserError(f"{source}: row {number}: metrics must map names to numbers")
        _check_optional(row, f"{source}: row {number}")
        key = tuple(str(row.get(name)) for name in ("domain", "recipe", "role", "model", "seed", "split"))
        if key in seen:
            raise UserError(
                f"{source}: row {number}: {row['role']} {row['model']}, seed {row['seed']}, {row['split']} stands twice"
            )
        seen.add(key)


def finite(value: Any) -> float | None:
    """Return ``value`` as a float if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _check_optional(row: Mapping[str, Any], where: str) -> None:
    """Raise a UserError unless intervals are {metric: {unit: [low, high]}} and notes {name: text}; both may be missing.

    ``low`` and ``high`` may be null: the model has no interval there.
    """
    for by_unit in _mapped(row, "intervals", where).values():
        pairs = by_unit.values() if isinstance(by_unit, Mapping) else [None]
        if not all(isinstance(each, Sequence) and not isinstance(each, str) and len(each) == 2 for each in pairs):
            raise UserError(f"{where}: intervals must map metrics to units to [low, high]")
    if not all(isinstance(each, str) for each in _mapped(row, "notes", where).values()):
        raise UserError(f"{where}: notes must map names to texts")


def _mapped(row: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    value = row.get(name) or {}
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {name}: got {type(value).__name__}, wanted an object")
    return value


def _check_comparisons(comparisons: Sequence[Mapping[str, Any]], source: Path) -> None:
    for number, entry in enumerate(comparisons, start=1):
        _require(entry, ("metric", "a", "b", "difference"), source, f"entry {number}")
        for side in ("a", "b"):
            _require(entry[side], ("role", "model"), source, f"entry {number}, {side}")
        if finite(entry["difference"]) is None:
            raise UserError(f"{source}: entry {number}: the difference is not a finite number")


def _check_slices(slices: Mapping[str, Any] | None, source: Path) -> None:
    if slices is None:
        return
    _require(slices, ("metric", "slices"), source, "top level")
    if not isinstance(slices["slices"], list):
        raise UserError(f"{source}: slices must be a list")
    for number, entry in enumerate(slices["slices"], start=1):
        _require(entry, ("axis", "slice", "role", "model", "value"), source, f"slice {number}")


def _check_examples(examples: Mapping[str, Any] | None, source: Path) -> None:
    if examples is None:
        return
    _require(examples, ("title", "blocks"), source, "top level")
    if not isinstance(examples["blocks"], list):
        raise UserError(f"{source}: blocks must be a list")
    for number, block in enumerate(examples["blocks"], start=1):
        _require(block, ("title", "text"), source, f"block {number}")


def _require(entry: Any, keys: Sequence[str], source: str | os.PathLike[str], where: str) -> None:
    if not isinstance(entry, Mapping):
        raise UserError(f"{source}: {where}: got {type(entry).__name__}, wanted an object")
    missing = [key for key in keys if key not in entry]
    if missing:
        raise UserError(f"{source}: {where}: {missing[0]!r} is missing")


def _read_json(file: Path, kind: type) -> Any:
    return read_json(file, kind) if file.exists() else None


def _read_config(file: Path) -> tuple[str, dict[str, Any]]:
    if not file.exists():
        return "", {}
    try:
        text = file.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    return text, config if isinstance(config, dict) else {}


def _says_simulated(value: Any, depth: int = 3) -> bool:
    if not isinstance(value, Mapping) or depth == 0:
        return False
    return bool(value.get("simulated")) or any(_says_simulated(inner, depth - 1) for inner in value.values())
