from __future__ import annotations

from pathlib import Path

import pytest

from tests.speech.server.served import exported


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder that hears tones as letters; nobody may change it."""
    return exported(tmp_path_factory.mktemp("exported"))
