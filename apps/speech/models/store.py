"""Models on disk: ``model.safetensors``, ``model.json`` and the units beside them, nothing that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from apps.speech.models import KINDS, AcousticModel
from apps.speech.units import Units
from kdcore.config import UserError, build, resolved
from kdcore.run import atomic_path, read_json, write_json


def save_model(model: AcousticModel, units: Units, folder: str | Path, **extra: Any) -> None:
    """Write a model and its units; ``model.json`` last, so that its presence says the model is whole."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / "model.json").unlink(missing_ok=True)
    units.save(target)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic_path(target / "model.safetensors") as temporary:
        save_file(tensors, temporary)
    about = {"kind": model.kind, "label": model.label(), "options": resolved(model.options), "classes": model.classes}
    about |= {"parameters": model.parameter_count(), "streaming": model.streaming}
    write_json(target / "model.json", {**about, **extra})


def load_model(folder: str | Path) -> tuple[AcousticModel, Units]:
    """Read a model, in evaluation mode, and its units; a folder that holds none is a UserError."""
    source = Path(folder)
    if not (source / "model.json").exists():
        raise UserError(f"{source}: no model here (model.json is missing)")
    try:
        about = read_json(source / "model.json")
        cls, options = KINDS[about["kind"]]
        model = cls(about["classes"], build(options, about["options"], "model.json"))
        model.load_state_dict(load_file(source / "model.safetensors"))
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise UserError(f"{source}: not a model of this version: {' '.join(str(error).split())}") from None
    units = Units.load(source)
    if units.blank + 1 != model.classes:
        raise UserError(f"{source}: the model has {model.classes} classes, its units {units.blank + 1}")
    return model.eval(), units


def model_bytes(folder: str | Path) -> int:
    """Return the size of the stored weights."""
    return (Path(folder) / "model.safetensors").stat().st_size
