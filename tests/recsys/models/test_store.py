"""Models on disk: what is read scores bit for bit as what was written, and damage is a user's error."""

from __future__ import annotations

import json

import pytest
import torch

from apps.recsys.models.ensemble import Ensemble
from apps.recsys.models.factors import LightGCN, LightGCNOptions
from apps.recsys.models.linear import Ease, EaseOptions, IalsOptions, fit_ials
from apps.recsys.models.store import load_model, model_bytes, model_options, save_model
from kdcore.config import UserError
from tests.recsys.made import factors, histories, sasrec

TRAIN = histories(7, 9, longest=6, shortest=1)


def make(kind):
    if kind == "mf":
        return factors(7, 9)
    if kind == "mf without bias":
        return factors(7, 9, bias=False)
    if kind == "sasrec":
        return sasrec(7, 9)
    if kind == "ease":
        return Ease.fit(TRAIN, EaseOptions(2.0))
    if kind == "ials":
        return fit_ials(TRAIN, IalsOptions(dimension=3, iterations=2), 0, threads=1)
    if kind == "lightgcn":
        return LightGCN(TRAIN, LightGCNOptions(dimension=3))
    return Ensemble([make("ease"), make("sasrec"), make("ials")], [1.0, 2.0, 0.5])


@pytest.mark.parametrize("kind", ["mf", "mf without bias", "sasrec", "ease", "ials", "lightgcn", "ensemble"])
def test_a_model_comes_back_as_it_was(kind, tmp_path):
    model = make(kind)
    save_model(model, tmp_path / "model", key="k", epochs=3)
    read = load_model(tmp_path / "model")
    before = model.finalize() if kind == "lightgcn" else model
    users = torch.arange(7)
    with torch.no_grad():
        assert torch.equal(read.scores(users, TRAIN), before.scores(users, TRAIN))
    assert not read.training
    assert (read.label(), read.n_users, read.n_items) == (before.label(), 7, 9)
    assert read.sequential == before.sequential
    about = json.loads((tmp_path / "model" / "model.json").read_text())
    assert (about["key"], about["epochs"], about["parameters"]) == ("k", 3, before.parameter_count())
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["model.json", "model.safetensors"]
    assert model_bytes(tmp_path / "model") >= 4 * read.parameter_count()


def test_a_kill_while_writing_leaves_no_model_that_could_be_mistaken_for_whole(tmp_path, monkeypatch):
    save_model(make("mf"), tmp_path, key="old")

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("apps.recsys.models.store.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        save_model(make("ials"), tmp_path, key="new")
    with pytest.raises(UserError, match="no model here"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "damage", ["torn weights", "no weights", "torn json", "other shape", "other kind", "not a mapping"]
)
def test_damage_is_one_line_that_names_the_folder(damage, tmp_path):
    save_model(make("mf"), tmp_path)
    weights, about = tmp_path / "model.safetensors", tmp_path / "model.json"
    if damage == "torn weights":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "torn json":
        about.write_text(about.read_text()[:20])
    elif damage == "not a mapping":
        about.write_text("[]")
    else:
        described = json.loads(about.read_text())
        described |= {"n_items": 8} if damage == "other shape" else {"kind": "crystal_ball"}
        about.write_text(json.dumps(described))
    with pytest.raises(UserError) as error:
        load_model(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_kinds_and_options_are_named():
    with pytest.raises(UserError, match=r"'easy'.*ease"):
        model_options("easy", {})
    with pytest.raises(UserError, match=r"dimensions.*dimension"):
        model_options("mf", {"dimensions": 3})
    with pytest.raises(UserError, match=r"ease\.l2: got 'many', wanted float"):
        model_options("ease", {"l2": "many"})
    with pytest.raises(UserError, match="dimension: got 0, wanted at least 1"):
        model_options("ials", {"dimension": 0})
    assert model_options("ease", {"l2": 3}).l2 == 3.0
