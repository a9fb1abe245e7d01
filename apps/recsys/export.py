"""What serving needs, without torch: safetensors vectors, JSON maps and metadata, an ONNX scorer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from apps.recsys.models.base import DotRecommender
from apps.recsys.recommend import open_run
from kdcore.config import UserError


def export(run: Path, role: str, out: Path) -> Path:
    """Write a finished run's model to ``out`` for serving; the folder appears whole or not at all."""
    dataset, model = open_run(run, role)
    if not isinstance(model, DotRecommender):
        raise UserError(f"{run / role}: {model.kind} has no vectors to serve from; wanted mf, sasrec or two_tower")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write(temporary, dataset, model, run, role)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out
