"""The name of a Hugging Face folder: of all that a teacher is read from, and of nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from apps.speech.models.pretrained import folder_fingerprint
from kdcore.config import UserError

FILES = (
    *("config.json", "preprocessor_config.json", "tokenizer_config.json", "vocab.json"),
    *("model.safetensors.index.json", "model-00001-of-00001.safetensors"),
)


def test_a_folder_is_named_by_all_that_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text("{}")
    names = [folder_fingerprint(folder)]
    for name in FILES:
        (folder / name).write_text('{"a": 1}')
        names.append(folder_fingerprint(folder))
    assert len(set(names)) == len(FILES) + 1
    (folder / "README.md").write_text("of no meaning")
    assert folder_fingerprint(folder) == names[-1] == folder_fingerprint(folder.rename(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=r"model: No such file"):
        folder_fingerprint(folder)
