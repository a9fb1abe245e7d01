"""Recipes: YAML files that come with a wing, each a published system, and configurations made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from kdcore.config import UserError, apply_overrides, build, nearest, read_yaml

T = TypeVar("T")


@dataclass(frozen=True)
class Recipes:
    """The recipes in the folder ``recipes`` of a package."""

    package: str

    def names(self) -> list[str]:
        """Return the names of all recipes, sorted."""
        folder = resources.files(self.package) / "recipes"
        return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))

    def read(self, name: str) -> dict[str, Any]:
        """Return a recipe's settings by name; an unknown name is a UserError with the nearest ones."""
        known = self.names()
        if name not in known:
            raise UserError(f"--recipe: unknown recipe {name!r}, {nearest(name, known)}")
        with resources.as_file(resources.files(self.package) / "recipes" / f"{name}.yaml") as file:
            return read_yaml(file)

    def describe(self) -> list[dict[str, str]]:
        """Return name, title and reference of every recipe."""
        each = {name: self.read(name) for name in self.names()}
        return [{"recipe": n, "title": one["title"], "reference": one["reference"]} for n, one in each.items()]

    def load(
        self,
        cls: type[T],
        *,
        recipe: str | None = None,
        file: str | Path | None = None,
        overrides: Sequence[tuple[str, str]] = (),
    ) -> T:
        """Return the configuration of a recipe or a file (one of them) with overrides applied and types checked."""
        if (recipe is None) == (file is None):
            raise UserError("wanted either --recipe NAME or --config FILE")
        values = self.read(recipe) if recipe is not None else read_yaml(file or "")
        source = f"recipe {recipe}" if recipe is not None else str(file)
        return build(cls, apply_overrides(values, overrides), source)
