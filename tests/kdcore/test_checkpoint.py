"""States on disk: everything comes back, nothing but a whole file is ever read, nothing runs."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from kdcore import checkpoint
from kdcore.checkpoint import Checkpoints, load_state, save_state
from kdcore.config import UserError

tensors = st.sampled_from(
    [
        torch.zeros(()),
        torch.arange(6, dtype=torch.int64).view(2, 3).T,  # not contiguous
        torch.tensor([1.5, float("nan"), float("-inf")], dtype=torch.float64),
        torch.tensor([True, False]),
        torch.empty(0, 4),
        torch.get_rng_state()[:10],
        torch.ones(3, dtype=torch.bfloat16),
    ]
)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | tensors
keys = st.sampled_from(["a", "a/b", "b", "", "0", "__items__", "__tensor__"]) | st.text() | st.integers()
states = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=st.dictionaries(keys, states, max_size=4))
def test_what_is_saved_comes_back_with_types_order_and_values(tmp_path: Path, state: dict[Any, Any]) -> None:
    save_state(tmp_path / "s", state)
    assert same(state, load_state(tmp_path / "s"))


def test_paths_that_read_alike_stay_apart(tmp_path: Path) -> None:
    state = {"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}, "c": {1: torch.tensor(3), "1": torch.tensor(4)}}
    save_state(tmp_path / "s", state)
    assert same(state, load_state(tmp_path / "s"))


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    base = torch.arange(5.0)
    save_state(tmp_path / "s", {"whole": base, "same": base, "part": base[2:]})
    assert load_state(tmp_path / "s")["part"].tolist() == [2.0, 3.0, 4.0]


def test_an_optimiser_comes_back(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    first, second = torch.optim.Adam([weight], betas=(0.8, 0.9)), torch.optim.Adam([weight])
    weight.sum().backward()
    first.step()
    save_state(tmp_path / "s", first.state_dict())
    second.load_state_dict(load_state(tmp_path / "s"))
    assert torch.equal(second.state[weight]["exp_avg"], first.state[weight]["exp_avg"])
    assert tuple(second.param_groups[0]["betas"]) == (0.8, 0.9)


@pytest.mark.parametrize("wrong", [{"a": {1.5: 2}}, {"a": {("b",): 2}}, {"a": [object()]}, {"a": {1, 2}}, {"a": b"x"}])
def test_what_cannot_come_back_is_refused_and_the_old_file_stays(tmp_path: Path, wrong: dict[str, Any]) -> None:
    save_state(tmp_path / "s", {"old": 1})
    with pytest.raises(TypeError, match="/a"):
        save_state(tmp_path / "s", wrong)
    assert load_state(tmp_path / "s") == {"old": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["s"]


def test_every_truncation_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "s"
    save_state(file, {"a": torch.ones(4), "b": "text"})
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=str(file)):
            load_state(file)
    file.write_bytes(whole + b"more")
    with pytest.raises(ValueError, match=str(file)):
        load_state(file)


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    for metadata in (None, {"other": "x"}, {"state": "{"}, {"state": json.dumps({"__tensor__": "gone"})}):
        save_file({"a": torch.ones(1)}, tmp_path / "s", metadata=metadata)
        with pytest.raises(ValueError, match="not a training state"):
            load_state(tmp_path / "s")
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "none")


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    """safetensors alone would leave a file that only its owner may read."""
    (tmp_path / "plain").touch()
    save_state(tmp_path / "s", {"a": torch.ones(1)})
    modes = [stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("plain", "s")]
    assert modes[0] == modes[1]


# -- the two files of a run --------------------------------------------------------------------------------------------


def weights(number: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2,), number)}


def test_state_and_best_weights_never_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two files, the state has the new weights within; the older file is put right on resume."""
    run = Checkpoints(tmp_path, "k")
    run.save({"n": 1}, weights(1), 0, best_is_new=True)
    original = checkpoint.save_state

    def killed(path: Path, state: dict[str, Any]) -> None:
        if path.name == "best.safetensors":
            raise KeyboardInterrupt
        original(path, state)

    monkeypatch.setattr(checkpoint, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        run.save({"n": 2}, weights(2), 5, best_is_new=True)
    monkeypatch.undo()
    assert load_state(run.best)["epoch"] == 0
    state = run.load()
    assert state is not None and same(state["best"], {"epoch": 5, "model": weights(2)})
    assert run.settle(state) is False
    assert load_state(run.best)["epoch"] == 5
    run.save({"n": 3}, weights(2), 5, best_is_new=False)
    assert load_state(run.last)["best"] == {"epoch": 5, "model": None}, "written again at every checkpoint"
    state = run.load()
    assert state is not None and same(state["best"]["model"], weights(2))


def test_before_the_first_validation_there_are_no_best_weights(tmp_path: Path) -> None:
    run = Checkpoints(tmp_path, "k")
    assert run.load() is None
    assert run.settle(None) is False
    run.save({"n": 1}, {}, -1, best_is_new=False)
    state = run.load()
    assert state is not None and state["best"]["model"] == {} and not run.best.exists()


def test_another_key_is_not_loaded_and_settling_clears_it(tmp_path: Path) -> None:
    Checkpoints(tmp_path, "a").save({"n": 1}, weights(1), 0, best_is_new=True)
    other = Checkpoints(tmp_path, "b")
    state = other.load()
    assert state is None
    assert other.settle(state) is True
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("about", [{"key": "x", "epoch": 0}, {"key": "k", "epoch": 7}])
def test_best_weights_of_another_run_or_epoch_are_refused(tmp_path: Path, about: dict[str, Any]) -> None:
    run = Checkpoints(tmp_path, "k")
    run.save({"n": 1}, weights(1), 0, best_is_new=False)
    save_state(run.best, {**about, "model": weights(3)})
    with pytest.raises(UserError, match=r"best\.safetensors: holds epoch .*, wanted epoch 0; delete"):
        run.load()


def test_a_state_of_an_older_version_is_refused(tmp_path: Path) -> None:
    run = Checkpoints(tmp_path, "k")
    save_state(run.last, {"key": "k", "n": 1})
    with pytest.raises(UserError, match="another version; delete it"):
        run.load()
