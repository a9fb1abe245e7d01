"""What serving needs, without torch: safetensors vectors, JSON id maps and metadata, an ONNX scorer.

``apps.recsys.runtime`` reads the folder with NumPy, safetensors and onnxruntime alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.progress import track
from safetensors.numpy import save_file
from torch import Tensor
from torch.export import Dim

from apps.recsys.data.dataset import Dataset
from apps.recsys.data.histories import Histories
from apps.recsys.fold_in import fit_fold_in
from apps.recsys.lessons import model_fingerprint
from apps.recsys.models.base import DotRecommender, Recommender
from apps.recsys.models.linear import Ease
from apps.recsys.models.sasrec import Sasrec
from apps.recsys.recommend import all_histories, open_run
from apps.recsys.runtime import FORMAT, pad_histories
from apps.recsys.scorers import EaseScorer, SasrecEncoder, SasrecScorer, VectorScorer
from apps.recsys.segments import write_segments
from kdcore import __version__
from kdcore.config import UserError, read_yaml
from kdcore.folders import check_target, replacing
from kdcore.onnx_export import check_parity, export_onnx
from kdcore.progress import stderr_console
from kdcore.run import fingerprint, read_json, write_json

_BLOCK_USERS = 1024
# users on whom PyTorch and onnxruntime are compared
_PARITY_USERS = 256
_TOLERANCE = 1e-5


def export(run: Path, role: str, out: Path) -> Path:
    """Write a finished run's model to ``out`` for serving; the folder appears whole or not at all.

    Files: ``model.json``, ``users.json`` and ``items.json`` (ids in index order), ``seen.safetensors`` (indptr, items:
    what each user had, oldest first), ``scorer.onnx``; ``vectors.safetensors`` (user_vectors, item_vectors, item_bias)
    if the model has vectors, with ``fold_in`` for new users or, of a model that reads histories, ``encoder.onnx``;
    ``titles.json`` and ``items.parquet`` if the data have titles and item features, ``segments.safetensors`` (what is
    popular among users of a kind) if they have user features. The same run gives the same bytes. An earlier export in
    ``out`` is replaced, anything else there is refused.

    Raises:
        UserError: an unfinished run, a model without one scorer (an ensemble), or ``out`` holds something else.
        kdcore.onnx_export.ParityError: onnxruntime does not answer as PyTorch does.
    """
    check_target(out, is_export)
    dataset, model = open_run(run, role)
    if not isinstance(model, DotRecommender | Ease):
        raise UserError(
            f"{run / role}: {model.label()} ({model.kind}) is several models, which export cannot write as one; "
            "wanted --model student or student_alone, or a teacher of kind ease, ials, lightgcn, mf or sasrec"
        )
    with replacing(out, is_export) as folder:
        histories = all_histories(dataset)
        _write_ids(folder / "users.json", dataset.user_ids)
        _write_ids(folder / "items.json", dataset.item_ids)
        save_file({"indptr": histories.indptr, "items": histories.items}, folder / "seen.safetensors")
        _write_items(folder, dataset)
        segments = write_segments(folder, dataset, histories)
        about = _describe(run, role, dataset, model)
        if isinstance(model, DotRecommender):
            about["fold_in"] = _write_vectors(folder, model, histories)
        about["parity"] = _write_scorer(folder, model, histories)
        about |= {"segments": segments, "files": _checksums(folder)}
        write_json(folder / "model.json", about)
        for file in folder.iterdir():  # safetensors makes files that only their owner may read
            file.chmod((folder / "model.json").stat().st_mode)
    return out


def is_export(folder: Path) -> bool:
    """Return whether a folder is one that ``export`` wrote."""
    try:
        about = read_json(folder / "model.json")
    except (OSError, ValueError):
        return False
    return isinstance(about, dict) and str(about.get("format", "")).partition("/")[0] == FORMAT.partition("/")[0]


def _write_ids(path: Path, ids: pa.Array, block: int = 1 << 16) -> None:
    """Write ids as one JSON array in index order, an id a line, a block at a time."""
    with open(path, "w", encoding="utf-8") as handle:
        for start in range(0, len(ids), block):
            texts = (json.dumps(each, ensure_ascii=False) for each in ids[start : start + block].to_pylist())
            handle.write(("[" if start == 0 else ",\n") + ",\n".join(texts))
        handle.write("]\n" if len(ids) else "[]\n")


def _write_items(folder: Path, dataset: Dataset) -> None:
    features = dataset.item_features
    if features is None:
        return
    if "title" in features.column_names:
        _write_ids(folder / "titles.json", features["title"].combine_chunks())
    table = features.add_column(0, "item_id", dataset.item_ids)
    pq.write_table(table, folder / "items.parquet", compression="zstd")


def _blocks(n_users: int, what: str) -> Iterator[np.ndarray]:
    """Yield all users a block at a time, with a bar on a terminal."""
    console = stderr_console()
    starts = range(0, n_users, _BLOCK_USERS)
    quiet = not console.is_terminal or len(starts) < 8
    for start in track(starts, what, console=console, transient=True, disable=quiet):
        yield np.arange(start, min(start + _BLOCK_USERS, n_users))


@torch.no_grad()
def _write_vectors(folder: Path, model: DotRecommender, histories: Histories) -> dict[str, Any] | None:
    """Write what an index needs; the user vectors of a model that reads histories are those of all of ``seen``.

    Any other model has one vector a user, so a map for new users is fitted and its figures returned.
    """
    item, bias = model.item_vectors(), model.item_bias()
    user = np.empty((model.n_users, item.shape[1]), dtype=np.float32)
    for block in _blocks(model.n_users, "user vectors"):
        user[block] = model.user_vectors(torch.from_numpy(block), histories).numpy()
    tensors = {"user_vectors": user, "item_vectors": np.ascontiguousarray(item.numpy())}
    if bias is not None:
        tensors["item_bias"] = bias.numpy()
    about = None
    if not model.sequential:
        tensors["fold_in"], about = fit_fold_in(
            user, tensors["item_vectors"], tensors.get("item_bias"), histories.indptr, histories.items
        )
    save_file(tensors, folder / "vectors.safetensors")
    return about


def _write_scorer(folder: Path, model: DotRecommender | Ease, histories: Histories) -> dict[str, Any]:
    """Write ``scorer.onnx`` and return how far onnxruntime is from PyTorch."""
    # from the users with the shortest to those with the longest histories
    order = np.argsort(histories.counts(), kind="stable")
    users = order[np.linspace(0, len(order) - 1, min(_PARITY_USERS, len(order))).astype(np.int64)]
    batch: Any = Dim("batch")
    scorer: torch.nn.Module
    if isinstance(model, Sasrec):
        scorer, length = SasrecScorer(model), model.options.length
        time: Any = Dim("time", min=1, max=length)
        inputs: dict[str, Any] = {"history": {0: batch, 1: time}, "lengths": {0: batch}}
    elif isinstance(model, Ease):
        scorer, length = EaseScorer(model), None
        inputs = {"history": {0: batch, 1: Dim("time")}}
    else:
        scorer, length = VectorScorer(model), None
        inputs = {"user_vector": {0: batch}}
    make = _batch_maker(model, histories, length)
    outputs = ["user_vector", "scores"] if isinstance(model, Sasrec) else ["scores"]
    example = {name: _example(value) for name, value in make(users[-2:]).items()}
    path = folder / "scorer.onnx"
    export_onnx(scorer, list(example.values()), path, inputs=inputs, outputs=outputs, top_k="scores")
    batches = (make(users[start : start + 64]) for start in range(0, len(users), 64))
    difference = check_parity(scorer, path, batches, outputs=outputs, tolerance=_TOLERANCE)
    if isinstance(model, Sasrec):
        encoder, path = SasrecEncoder(model), folder / "encoder.onnx"
        export_onnx(encoder, list(example.values()), path, inputs=inputs, outputs=["user_vector"])
        batches = (make(users[start : start + 64]) for start in range(0, len(users), 64))
        check_parity(encoder, path, batches, outputs=["user_vector"], tolerance=_TOLERANCE)
    return {"max_abs_difference": difference, "relative_tolerance": _TOLERANCE, "users": len(users)}


def _batch_maker(
    model: Recommender, histories: Histories, length: int | None
) -> Callable[[np.ndarray], dict[str, Tensor]]:
    """Return what turns users into inputs of the scorer."""

    def make(users: np.ndarray) -> dict[str, Tensor]:
        if not isinstance(model, Sasrec | Ease):
            if not isinstance(model, DotRecommender):
                raise TypeError(f"model: got {type(model).__name__}, wanted a DotRecommender")
            with torch.no_grad():
                return {"user_vector": model.user_vectors(torch.from_numpy(users), histories)}
        history, lengths = pad_histories([histories.of(int(user)) for user in users], model.n_items, length)
        batch = {"history": torch.from_numpy(history), "lengths": torch.from_numpy(lengths)}
        return batch if isinstance(model, Sasrec) else {"history": batch["history"]}

    return make


def _example(value: Tensor) -> Tensor:
    """Return the value with at least 2 rows and columns: the exporter takes a size of 1 for a constant."""
    if value.shape[0] < 2:
        value = torch.cat([value, value])
    return torch.cat([value, value], dim=1) if value.ndim > 1 and value.shape[1] < 2 else value


def _describe(run: Path, role: str, dataset: Dataset, model: Recommender) -> dict[str, Any]:
    about = read_json(run / role / "model.json")
    metrics = read_json(run / "metrics.json") if (run / "metrics.json").exists() else []
    provenance = read_json(run / "provenance.json") if (run / "provenance.json").exists() else {}
    config = read_yaml(run / "config.yaml") if (run / "config.yaml").exists() else {}
    sequential = isinstance(model, Sasrec)
    return {
        "format": FORMAT,
        # of the weights and everything that says what an index or a user means
        "model_version": fingerprint(model.kind, role, model_fingerprint(model), dataset.fingerprint),
        "kind": model.kind,
        "label": model.label(),
        "role": role,
        "users": model.n_users,
        "items": model.n_items,
        "dimension": model.item_vectors().shape[1] if isinstance(model, DotRecommender) else None,
        "parameters": model.parameter_count(),
        # what the scorer takes: a user's vector, or indices of items, padded on the right with the number of items
        "input": "history" if isinstance(model, Sasrec | Ease) else "user_vector",
        "history_length": model.options.length if sequential else None,
        "data": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "interactions": len(dataset),
            "simulated": bool(provenance.get("simulated")),
        },
        "seed": _seed_of(run, role, about),
        "metrics": [row for row in metrics if row["role"] == role],
        "training": {
            "kdsuite": __version__,
            "recipe": config.get("recipe"),
            "title": config.get("title"),
            "reference": config.get("reference"),
            "epochs": about.get("epochs"),
            "train_seconds": about.get("train_seconds"),
            "options": about.get("options"),
            "provenance": {name: value for name, value in provenance.items() if name != "machine"},
            "config": config,
        },
    }


def _seed_of(run: Path, role: str, about: dict[str, Any]) -> int | None:
    """Return the seed whose model was deployed; None for a teacher that all seeds share."""
    for folder in sorted((run / "seeds").glob("*")):
        file = folder / role / "model.json"
        if folder.name.isdigit() and file.exists() and read_json(file) == about:
            return int(folder.name)
    return None


def _checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of every file, so that a copy can be checked."""
    sums = {}
    for file in sorted(folder.iterdir()):
        with open(file, "rb") as handle:
            sums[file.name] = {
                "bytes": file.stat().st_size,
                "sha256": hashlib.file_digest(handle, "sha256").hexdigest(),
            }
    return sums
