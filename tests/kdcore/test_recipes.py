"""Recipes by name: read, described, and made into configurations."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kdcore.config import UserError
from kdcore.recipes import Recipes


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1


@dataclass(frozen=True)
class Outer:
    title: str = ""
    reference: str = ""
    inner: Inner = field(default_factory=Inner)


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipes:
    """A package with two recipes."""
    folder = tmp_path / "made_wing" / "recipes"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "second.yaml").write_text("title: Two\nreference: B\ninner: {rate: 0.5}\n")
    (folder / "first.yaml").write_text("title: One\nreference: A\n")
    (folder / "notes.txt").write_text("no recipe")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "made_wing", raising=False)
    return Recipes("made_wing")


def test_are_listed_and_described_by_name(recipes: Recipes) -> None:
    assert recipes.names() == ["first", "second"]
    assert recipes.describe()[1] == {"recipe": "second", "title": "Two", "reference": "B"}


def test_become_configurations_with_overrides(recipes: Recipes, tmp_path: Path) -> None:
    assert recipes.load(Outer, recipe="second").inner.rate == 0.5
    assert recipes.load(Outer, recipe="second", overrides=[("inner.rate", "0.25")]).inner.rate == 0.25
    file = tmp_path / "mine.yaml"
    file.write_text("inner: {rate: fast}\n")
    with pytest.raises(UserError, match=r"mine\.yaml.*rate"):
        recipes.load(Outer, file=file)


def test_mistakes_are_told(recipes: Recipes) -> None:
    with pytest.raises(UserError, match=r"unknown recipe .frist.*first"):
        recipes.load(Outer, recipe="frist")
    with pytest.raises(UserError, match="wanted either --recipe NAME or --config FILE"):
        recipes.load(Outer)
    with pytest.raises(UserError, match=r"recipe first.*rte"):
        recipes.load(Outer, recipe="first", overrides=[("inner.rte", "1")])
