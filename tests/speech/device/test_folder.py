"""An exported folder that is not whole is refused with the name of what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.speech.device.folder import ExportedFolder, Listed, is_export, sha256
from kdcore.config import UserError
from tests.speech.device.exported import SYMBOLS, export_tones


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tones(tmp_path_factory.mktemp("original") / "tones")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tones"))


def change(folder: Path, **fields: Any) -> None:
    file = folder / "kdsuite.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**values, **fields}), encoding="utf-8")


def test_what_is_in_it(folder: Path) -> None:
    found = ExportedFolder.open(folder, verify=True)
    assert found.symbols == SYMBOLS and found.blank == len(SYMBOLS)
    assert found.models == ("model.onnx", "model.int8.onnx")
    assert found.model(True) == folder / "model.int8.onnx" and found.model(False) == folder / "model.onnx"
    assert found.files["tokens.txt"] == Listed((folder / "tokens.txt").stat().st_size, sha256(folder / "tokens.txt"))
    assert is_export(folder) and not is_export(folder / "tokens.txt") and not is_export(folder.parent)
    for name in ("notes.txt", ".DS_Store"):
        (folder / name).write_text("mine", encoding="utf-8")
    assert ExportedFolder.open(folder).extra_files() == ["notes.txt"]


@pytest.mark.parametrize(
    "name", ["model.onnx", "model.int8.onnx", "tokens.txt", "README.md", "self_test.wav", "kdsuite.json"]
)
def test_a_missing_or_truncated_file_is_named(name: str, folder: Path) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1] if name != "kdsuite.json" else data[: len(data) // 2])
    with pytest.raises(UserError, match=rf"{name}: is (truncated: it has|not JSON)"):
        ExportedFolder.open(folder)
    (folder / name).write_bytes(data)
    ExportedFolder.open(folder, verify=True)
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name}:? is missing"):
        ExportedFolder.open(folder)


def test_a_foreign_file_is_named(folder: Path) -> None:
    with open(folder / "model.int8.onnx", "ab") as handle:
        handle.write(b"more")
    with pytest.raises(UserError, match=r"model\.int8\.onnx: is not the file that was exported: it has [\d,]+ bytes"):
        ExportedFolder.open(folder)


def test_a_change_of_the_same_size_is_seen_by_its_hash(folder: Path) -> None:
    data = bytearray((folder / "model.onnx").read_bytes())
    data[-1] ^= 1
    (folder / "model.onnx").write_bytes(bytes(data))
    ExportedFolder.open(folder)
    with pytest.raises(UserError, match=r"model\.onnx: was changed since the export"):
        ExportedFolder.open(folder, verify=True)


@pytest.mark.parametrize("name", ["model.onnx", "tokens.txt", "kdsuite.json"])
def test_a_link_out_of_the_folder_is_refused_and_one_within_is_not(name: str, folder: Path) -> None:
    outside = folder.parent / f"outside-{name}"
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(UserError, match=rf"{name}: is a link that leads out of the folder"):
        ExportedFolder.open(folder)
    (folder / name).unlink()
    (folder / name).symlink_to(name)  # to itself
    with pytest.raises(UserError, match=name):
        ExportedFolder.open(folder)
    (folder / name).unlink()
    shutil.move(outside, folder / "inside")
    (folder / name).symlink_to("inside")
    ExportedFolder.open(folder, verify=True)


def test_a_folder_or_a_pipe_in_a_files_place(folder: Path) -> None:
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    with pytest.raises(UserError, match=r"README\.md: is no file"):
        ExportedFolder.open(folder)
    (folder / "README.md").rmdir()
    os.mkfifo(folder / "README.md")
    with pytest.raises(UserError, match=r"README\.md: is no file"):
        ExportedFolder.open(folder)


def test_no_folder(folder: Path) -> None:
    with pytest.raises(UserError, match="no-such: does not exist; wanted an exported folder"):
        ExportedFolder.open(folder / "no-such")
    with pytest.raises(UserError, match=r"tokens\.txt: is a file; wanted an exported folder"):
        ExportedFolder.open(folder / "tokens.txt")
    with pytest.raises(UserError, match=r"no exported model here \(kdsuite\.json is missing\)"):
        ExportedFolder.open(folder.parent)


def test_a_huge_description_is_not_read(folder: Path) -> None:
    with open(folder / "kdsuite.json", "ab") as handle:
        handle.truncate(1 << 33)  # a sparse file
    with pytest.raises(UserError, match=r"kdsuite\.json: is larger than 1 MiB"):
        ExportedFolder.open(folder)
    (folder / "kdsuite.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(UserError, match=r"kdsuite\.json: is not JSON"):
        ExportedFolder.open(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": 2}, "format: got 2, wanted 1"),
        ({"format": "kdsuite-recsys/1"}, "format: got 'kdsuite-recsys/1'"),
        ({"format": True}, "format: got True"),
        ({"name": None}, "name: got None, wanted text"),
        ({"parameters": 0}, "parameters: got 0"),
        ({"units": "words"}, "units: got 'words', wanted characters or pieces"),
        ({"sample_rate": 8000}, "sample_rate: got 8000, wanted 16000"),
        ({"window_size": "16"}, "window_size: got '16'"),
        ({"window_size": 1 << 40}, "window_size: got"),
        ({"window_size": 8}, "window_size, chunk_shift: got 8 and 16"),
        ({"chunk_shift": 6}, "window_size, chunk_shift: got 16 and 6"),
        ({"chunk_ms": 1000}, "chunk_ms: got 1000, wanted 160, as chunk_shift has it"),
        ({"look_ahead_ms": 9}, "look_ahead_ms: got 9, wanted a multiple of 40 up to 120"),
        ({"look_ahead_ms": 160}, "look_ahead_ms: got 160"),
        ({"delay_ms": 5000}, "delay_ms: got 5000, wanted milliseconds, at most 2000"),
        ({"delay_ms": -1}, "delay_ms: got -1"),
        ({"confidence": {"slope": 1.0}}, "confidence: got {'slope': 1.0}, wanted slope above 0 and offset, or null"),
        ({"confidence": {"slope": -1, "offset": 0}}, "confidence: got {'slope': -1, 'offset': 0}"),
        ({"confidence": {"slope": 0.0, "offset": 0}}, "confidence: got"),
        ({"confidence_lm": {"slope": 1.0}}, "confidence_lm: got {'slope': 1.0}, wanted slope above 0 and offset"),
        ({"confidence": {"slope": 1.0, "offset": "0"}}, "confidence: got"),
        ({"confidence": {"slope": 10**400, "offset": 0}}, "confidence: got"),
        ({"decode": []}, "decode: got \\[\\]"),
        ({"self_test": {"audio": "other.wav", "text": {"model.onnx": "a"}}}, "self_test: names files that are not"),
        ({"self_test": {"audio": "self_test.wav", "text": {}}}, "self_test: got"),
        (
            {"self_test": {"audio": "self_test.wav", "text": {"model.onnx": "yes no"}}},
            r"self_test: has no text of model\.int8\.onnx",
        ),
        ({"files": {}}, "files: got {}"),
        ({"files": {"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}}, "files: got"),
        ({"files": {"a/b": {"bytes": 1, "sha256": "0" * 64}}}, "files: got"),
        ({"files": {"kdsuite.json": {"bytes": 1, "sha256": "0" * 64}}}, "files: got"),
        ({"files": {"tokens.txt": {"bytes": 1, "sha256": "z" * 64}}}, "files: got"),
        ({"files": {"tokens.txt": {"bytes": -1, "sha256": "0" * 64}}}, "files: got"),
        ({"files": {"tokens.txt": {"bytes": 1, "sha256": "0" * 64}}}, "files: model.onnx is not among them"),
    ],
)
def test_a_description_of_another_kind_is_refused(fields: dict[str, Any], message: str, folder: Path) -> None:
    change(folder, **fields)
    with pytest.raises(UserError, match=rf"kdsuite\.json: {message}"):
        ExportedFolder.open(folder)


def test_every_field_is_wanted(folder: Path) -> None:
    values = json.loads((folder / "kdsuite.json").read_text(encoding="utf-8"))
    for name in values:
        rest = {key: value for key, value in values.items() if key != name}
        (folder / "kdsuite.json").write_text(json.dumps(rest), encoding="utf-8")
        with pytest.raises(UserError, match=rf"kdsuite\.json: {name}: (is missing|got None)"):
            ExportedFolder.open(folder)
    for text in ("[]", "null", '{"format": NaN}', "{"):
        (folder / "kdsuite.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"kdsuite\.json: "):
            ExportedFolder.open(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 0\nb 1\n", "line 2: got 'b', wanted <blk> there"),
        ("<blk> 0\n", "line 1: got '<blk>', wanted <blk> there and symbols before it"),
        ("a 0\nb 2\n<blk> 2\n", "line 2: got 'b 2', wanted a symbol not seen before and 1"),
        ("a 0\na 1\n<blk> 2\n", "line 2: got 'a 1'"),
        ("a b 0\n<blk> 1\n", "line 1: got 'a b 0'"),
        ("<blk> 0\na 1\n<blk> 2\n", "line 3: got '<blk> 2'"),
        ("", "line 1: got ''"),
        ("\xff 0\n<blk> 1\n", "is not UTF-8 text"),
    ],
)
def test_bad_tokens_are_named_by_line(text: str, message: str, folder: Path) -> None:
    data = text.encode("latin-1")
    (folder / "tokens.txt").write_bytes(data)
    files = json.loads((folder / "kdsuite.json").read_text(encoding="utf-8"))["files"]
    change(folder, files={**files, "tokens.txt": {"bytes": len(data), "sha256": "0" * 64}})
    with pytest.raises(UserError, match=rf"tokens\.txt: {message}"):
        ExportedFolder.open(folder)


def test_a_card_that_was_taken_off_the_list(folder: Path) -> None:
    files = json.loads((folder / "kdsuite.json").read_text(encoding="utf-8"))["files"]
    change(folder, files={name: each for name, each in files.items() if name != "README.md"})
    (folder / "README.md").unlink()
    with pytest.raises(UserError, match=r"kdsuite\.json: files: README\.md is not among them"):
        ExportedFolder.open(folder)


def test_the_rest_of_a_chunk_is_a_look_ahead(folder: Path) -> None:
    change(folder, look_ahead_ms=120, delay_ms=2000)
    assert ExportedFolder.open(folder).look_ahead_ms == 120


def test_a_model_that_was_left_out(folder: Path) -> None:
    files = json.loads((folder / "kdsuite.json").read_text(encoding="utf-8"))["files"]
    test = {"audio": "self_test.wav", "text": {"model.int8.onnx": "yes no"}}
    change(folder, files={name: each for name, each in files.items() if name != "model.onnx"}, self_test=test)
    (folder / "model.onnx").unlink()
    found = ExportedFolder.open(folder, verify=True)
    assert found.models == ("model.int8.onnx",)
    with pytest.raises(
        UserError, match=r"model\.onnx: was not exported; the folder has model\.int8\.onnx: it runs without"
    ):
        found.model(False)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    value=JSON, name=st.sampled_from(["format", "files", "self_test", "confidence", "window_size", "decode", "name"])
)
def test_any_value_is_taken_or_refused_in_one_line(
    value: Any, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.exists():
        export_tones(folder)
        shutil.copy(folder / "kdsuite.json", folder.parent / "fuzzed.json")
    shutil.copy(folder.parent / "fuzzed.json", folder / "kdsuite.json")
    change(folder, **{name: value})
    try:
        ExportedFolder.open(folder)
    except UserError as error:
        assert "\n" not in str(error) and "kdsuite.json" in str(error)


def test_reading_a_folder_imports_no_torch() -> None:
    code = "import sys, apps.speech.device.folder, apps.speech.device.folder_check, apps.speech.card; "
    code += "print('torch' in sys.modules, 'onnxruntime' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False", "False"]
