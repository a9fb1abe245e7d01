"""Training state on disk without pickle: nested state dictionaries as one safetensors file.

Tensors are stored by the path that leads to them, everything else as JSON in the file's metadata, so a checkpoint
is one file, and one atomic rename decides between the old state and the new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kdcore.run import atomic_path

_TENSOR = "__tensor__"


def save_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a nested state (mappings, lists, scalars, strings, tensors) atomically as one safetensors file."""
    tensors: dict[str, Tensor] = {}
    tree = _strip(state, "", tensors)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"state": json.dumps(tree)})


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a state written by ``save_state``; raises ValueError if the file is not one."""
    with safe_open(Path(path), framework="pt") as file:
        metadata = file.metadata() or {}
        if "state" not in metadata:
            raise ValueError(f"{path}: not a training state (no 'state' in its metadata)")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return _fill(json.loads(metadata["state"]), tensors)


def _strip(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Replace every tensor by a reference, collecting it in ``tensors`` under its path."""
    if isinstance(value, Tensor):
        # safetensors refuses shared memory, and a live parameter must not change under the writer
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: path}
    if isinstance(value, Mapping):
        # keys may be integers (optimiser states), which JSON would turn into text: keep their type beside them
        return {"__items__": [[key, _strip(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_strip(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: got {type(value).__name__}, wanted tensors, numbers, text, lists or mappings")


def _fill(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: _fill(item, tensors) for key, item in value["__items__"]}
    if isinstance(value, list):
        return [_fill(item, tensors) for item in value]
    return value
