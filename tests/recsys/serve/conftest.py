"""Exports that the tests of serving share: each is made once, however many processes test."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.recsys.serve.served import exported

Exporter = Callable[..., Path]


@pytest.fixture(scope="session")
def shared_export(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Exporter:
    """Return what makes an export, or returns the one made before with the same options; nobody may change it."""
    base = tmp_path_factory.getbasetemp()
    base = base if worker_id == "master" else base.parent  # which all workers of pytest-xdist share

    def make(**options: Any) -> Path:
        name = "-".join(["export", *(f"{key}_{value}" for key, value in sorted(options.items()))])
        with open(base / f"{name}.lock", "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            return base / name / "export" if (base / name / "export").exists() else exported(base / name, **options)

    return make


@pytest.fixture(scope="session")
def model(shared_export: Exporter) -> Path:
    """Return an export of a matrix factorisation with hostile titles, categories and segments."""
    return shared_export()
