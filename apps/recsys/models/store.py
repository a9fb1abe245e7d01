"""Models on disk: ``model.safetensors`` and ``model.json``, nothing else and nothing that runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from apps.recsys.models.base import Recommender
from apps.recsys.models.ensemble import Ensemble
from apps.recsys.models.factors import LightGCN, LightGCNOptions, MatrixFactorization, MatrixFactorizationOptions
from apps.recsys.models.linear import Ease, EaseOptions, IalsOptions
from apps.recsys.models.options import build_options
from apps.recsys.models.sasrec import Sasrec, SasrecOptions
from apps.recsys.models.two_tower import TwoTower, TwoTowerOptions
from kdcore.config import UserError, nearest
from kdcore.run import atomic_path, read_json, write_json

# kind -> hyperparameters; lightgcn and ials are fitted by their own procedures and stored as vectors
OPTIONS: dict[str, type] = {
    "mf": MatrixFactorizationOptions,
    "sasrec": SasrecOptions,
    "lightgcn": LightGCNOptions,
    "ease": EaseOptions,
    "ials": IalsOptions,
    "two_tower": TwoTowerOptions,
}
_STORED: dict[str, type[Recommender]] = {"mf": MatrixFactorization, "sasrec": Sasrec, "ease": Ease}


def model_options(kind: str, options: dict[str, Any]) -> Any:
    """Return the typed hyperparameters of a kind; unknown kinds and options are UserErrors."""
    if kind not in OPTIONS:
        raise UserError(f"model kind: got {kind!r}, {nearest(kind, OPTIONS)}")
    return build_options(kind, OPTIONS[kind], options)


def save_model(model: Recommender, folder: str | Path, **extra: Any) -> None:
    """Write a model; ``model.json`` last, so that its presence says the model is whole."""
    if isinstance(model, LightGCN):
        model = model.finalize()
    folder = Path(folder)
    (folder / "model.json").unlink(missing_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary)
    write_json(folder / "model.json", {**describe(model), "parameters": model.parameter_count(), **extra})


def describe(model: Recommender) -> dict[str, Any]:
    """Return what ``model.json`` says of a model beside its weights: kind, size and options."""
    description = {
        "kind": model.kind,
        "label": model.label(),
        "n_users": model.n_users,
        "n_items": model.n_items,
        "sequential": model.sequential,
        "options": asdict(model.options),
    }
    if isinstance(model, Ensemble):
        description["members"] = [describe(member) for member in model.members]  # type: ignore[arg-type]
    if isinstance(model, TwoTower):
        description["reads"] = model.reads()
    return description


def load_model(folder: str | Path) -> Recommender:
    """Read a model; a folder that holds none, or weights that do not fit, is a UserError."""
    folder = Path(folder)
    if not (folder / "model.json").exists():
        raise UserError(f"{folder}: no model here (model.json is missing)")
    try:
        description = read_json(folder / "model.json")
        model = _empty(description)
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: not a model of this version: {' '.join(str(error).split())}") from None
    return model.eval()


def _empty(description: dict[str, Any]) -> Recommender:
    size = description["n_users"], description["n_items"]
    if description["kind"] == Ensemble.kind:
        members = [_empty(member) for member in description["members"]]
        model: Recommender = Ensemble(members, description["options"]["weights"])
    elif description["kind"] == TwoTower.kind:
        model = TwoTower.from_json(*size, model_options(TwoTower.kind, description["options"]), description["reads"])
    else:
        stored: Any = _STORED[description["kind"]]
        model = stored(*size, model_options(description["kind"], description["options"]))
    model.name = description["label"]
    return model


def model_bytes(folder: str | Path) -> int:
    """Return the size of a stored model's weights in bytes."""
    return (Path(folder) / "model.safetensors").stat().st_size
