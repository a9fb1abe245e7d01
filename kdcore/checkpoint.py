"""Training state on disk without pickle: nested state dictionaries as one safetensors file.

Tensors are stored under their path, everything else as JSON in the file's metadata, so a checkpoint is one file, and
one atomic rename decides between the old state and the new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kdcore.config import UserError
from kdcore.run import atomic_path, remove_orphans

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_TENSOR = "__tensor__"
_ITEMS = "__items__"


def save_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a nested state (mappings, lists, scalars, strings, tensors) atomically as one safetensors file.

    Raises:
        TypeError: a value or a key of another type; the message says where.
        OSError: the file cannot be written (disk full); an older file of that name is untouched.
    """
    tensors: dict[str, Tensor] = {}
    tree = _strip(state, "", tensors)
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"state": json.dumps(tree)})
        except SafetensorError as error:  # how the library reports a full disk
            raise OSError(f"{path}: cannot be written ({error})") from None


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a state written by ``save_state``.

    Raises:
        ValueError: the file is not a state, or is damaged.
        OSError: there is no such file, or it cannot be read.
    """
    try:
        with safe_open(Path(path), framework="pt") as file:
            tree = (file.metadata() or {}).get("state")
            if tree is None:
                raise ValueError(f"{path}: not a training state (no 'state' in its metadata)")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return _fill(json.loads(tree), tensors)
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a training state, or damaged ({error})") from None


def _strip(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Replace every tensor by a reference, collecting it in ``tensors`` under its path."""
    if isinstance(value, Tensor):
        # the number keeps names apart that would read alike: {"a/b": x} and {"a": {"b": x}}, 1 and "1"
        name = f"{len(tensors)}{path}"
        # safetensors refuses shared memory, and a live parameter must not change under the writer
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str | int):
                raise TypeError(f"{path}: got a key of type {type(key).__name__}, wanted text or whole numbers")
        # keys may be integers (optimiser states), which JSON would turn into text: pairs keep their type
        return {_ITEMS: [[key, _strip(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_strip(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: got {type(value).__name__}, wanted tensors, numbers, text, lists or mappings")


def _fill(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: _fill(item, tensors) for key, item in value[_ITEMS]}
    if isinstance(value, list):
        return [_fill(item, tensors) for item in value]
    return value


class Checkpoints:
    """The last state of a run and its best weights, ``last.safetensors`` and ``best.safetensors`` in ``folder``.

    A state and the best weights it refers to must not part. New best weights therefore stand in the state as well;
    later states leave them out, for by then they have their own file. A kill between the two files costs nothing.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """Take the run's ``key`` (data, settings, seed): states of another key are not loaded."""
        self.last, self.best, self.key = folder / "last.safetensors", folder / "best.safetensors", key

    def save(self, state: Mapping[str, Any], best: Mapping[str, Tensor], epoch: int, *, best_is_new: bool) -> None:
        """Write a state, and the ``best`` weights, of ``epoch``, if they are new since the last save."""
        inside = {"epoch": epoch, "model": best if best_is_new else None}
        save_state(self.last, {**state, "key": self.key, "best": inside})
        if best_is_new:
            self._save_best(inside)

    def load(self) -> dict[str, Any] | None:
        """Return this run's last state, its best weights in ``["best"]["model"]``, or None if there is none.

        Raises:
            UserError: a file is damaged, or the best weights are not those the state refers to.
        """
        state = self._read(self.last)
        if state is None or state.get("key") != self.key:
            return None
        if not isinstance(state.get("best"), dict):
            raise UserError(f"{self.last}: a checkpoint of another version; delete it to start again")
        state["fresh"] = state["best"]["model"] is not None
        if not state["fresh"]:
            state["best"]["model"] = {} if state["best"]["epoch"] < 0 else self._best_of(state["best"]["epoch"])
        return state

    def settle(self, state: Mapping[str, Any] | None) -> bool:
        """Leave the folder holding what ``load`` returned and nothing else; return whether another run's files went."""
        for file in (self.last, self.best):
            remove_orphans(file)
        if state is not None:
            if state["fresh"]:  # the start that wrote it may have been killed before the second file
                self._save_best(state["best"])
            return False
        others = self.last.exists()
        for file in (self.last, self.best):
            file.unlink(missing_ok=True)
        return others

    def _save_best(self, best: Mapping[str, Any]) -> None:
        save_state(self.best, {**best, "key": self.key})

    def _best_of(self, epoch: int) -> dict[str, Tensor]:
        best = self._read(self.best)
        if best is None or (best.get("key"), best.get("epoch")) != (self.key, epoch):
            found = "nothing" if best is None else f"epoch {best.get('epoch')} of key {best.get('key')!r}"
            raise UserError(f"{self.best}: holds {found}, wanted epoch {epoch}; delete {self.last} to start again")
        return best["model"]

    def _read(self, file: Path) -> dict[str, Any] | None:
        try:
            return load_state(file) if file.exists() else None
        except ValueError as error:
            raise UserError(f"{error}; delete {self.last} to start again") from None


def random_states(fabric: Fabric) -> dict[str, Tensor]:
    """Return torch's random states of all processes, one row each; all must call it."""
    state = {"cpu": torch.get_rng_state()}
    if fabric.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(fabric.device)
    if fabric.world_size == 1:
        return {name: value[None] for name, value in state.items()}
    rows = {}
    for name, value in state.items():
        mine = value.to(fabric.device)
        parts = [torch.empty_like(mine) for _ in range(fabric.world_size)]
        torch.distributed.all_gather(parts, mine)
        rows[name] = torch.stack(parts).cpu()
    return rows


def set_random_state(fabric: Fabric, state: Mapping[str, Tensor]) -> None:
    """Restore this process's random state; with another number of processes there is none to restore."""
    if len(state["cpu"]) != fabric.world_size:
        return
    # copies: torch 2.13 reads a view from the beginning of what it is a view of, and crashes
    torch.set_rng_state(state["cpu"][fabric.global_rank].clone())
    if "cuda" in state and fabric.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"][fabric.global_rank].clone(), fabric.device)
