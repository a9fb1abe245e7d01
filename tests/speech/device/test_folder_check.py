"""``kd speech check`` sees what is wrong with a folder before it ships."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import soundfile

from apps.speech.device.folder_check import Listener, check_folder, heard_text
from tests.speech.device.exported import SYMBOLS, export_tones, network, spoken


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tones(tmp_path_factory.mktemp("original") / "tones")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tones"))


def relist(folder: Path, **fields: Any) -> None:
    """Make the list true again, so that only what is in the files can be wrong."""
    file = folder / "kdsuite.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    for name in values["files"]:
        data = (folder / name).read_bytes()
        values["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    file.write_text(json.dumps({**values, **fields}), encoding="utf-8")


def bad(folder: Path) -> list[tuple[str, str, str]]:
    return [(each.file, each.check, each.detail) for each in check_folder(folder) if not each.ok]


def test_a_good_folder(folder: Path) -> None:
    found = check_folder(folder)
    assert not bad(folder)
    assert [(each.file, each.check) for each in found if each.check not in ("hash", "files")] == [
        (name, check) for name in ("model.onnx", "model.int8.onnx") for check in ("interface", "answers", "self test")
    ]
    assert {each.file for each in found if each.check == "hash"} == set(
        json.loads((folder / "kdsuite.json").read_text(encoding="utf-8"))["files"]
    )
    assert "'yes no'" in [each.detail for each in found]


def test_what_a_listener_hears(folder: Path) -> None:
    listener = Listener(folder / "model.onnx", 16)
    for text in ("yes no", "no", "sandy yes"):
        assert heard_text(listener, spoken(text), SYMBOLS) == text
    assert heard_text(listener, np.zeros(0, np.float32), SYMBOLS) == ""


def test_a_changed_model_is_not_run(folder: Path) -> None:
    data = bytearray((folder / "model.onnx").read_bytes())
    data[-1] ^= 1
    (folder / "model.onnx").write_bytes(bytes(data))
    found = check_folder(folder)
    assert [(each.file, each.check) for each in found if not each.ok] == [("model.onnx", "hash")]
    assert not any(each.file == "model.onnx" and each.check == "interface" for each in found)
    assert bad(folder)[0][2].endswith("model.onnx: was changed since the export")


def test_files_that_nobody_listed(folder: Path) -> None:
    (folder / "weights.data").write_bytes(b"x")
    (folder / "more.data").write_bytes(b"x")
    assert [(file, check) for file, check, _ in bad(folder)] == [("more.data", "listed"), ("weights.data", "listed")]
    assert all(detail.endswith(f"{file}: no export wrote this file") for file, _, detail in bad(folder))


def test_a_broken_description_is_the_only_finding(folder: Path) -> None:
    (folder / "kdsuite.json").write_text("{", encoding="utf-8")
    ((file, check, detail),) = bad(folder)
    assert (file, check) == ("kdsuite.json", "files") and "is not JSON" in detail and len(check_folder(folder)) == 1


def test_no_model_at_all(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"no model")
    relist(folder)
    ((file, check, detail),) = bad(folder)
    assert (file, check) == ("model.onnx", "runs") and "model.onnx: cannot be run" in detail


def test_a_model_with_other_inputs(folder: Path) -> None:
    x = onnx.helper.make_tensor_value_info("x", 1, [1])
    y = onnx.helper.make_tensor_value_info("y", 1, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "other", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, folder / "model.int8.onnx")
    relist(folder)
    ((file, check, detail),) = bad(folder)
    assert (file, check) == ("model.int8.onnx", "interface") and "has the inputs x; wanted audio_signal, " in detail


def test_tokens_of_another_model(folder: Path) -> None:
    (folder / "tokens.txt").write_text(
        "".join(f"{s} {i}\n" for i, s in enumerate(["a", "b", "<blk>"])), encoding="utf-8"
    )
    relist(folder)
    assert {(file, check) for file, check, _ in bad(folder)} == {
        ("model.onnx", "interface"),
        ("model.int8.onnx", "interface"),
    }
    assert "metadata vocab_size: got '8', wanted '2'" in bad(folder)[0][2]


def test_a_window_of_another_model(folder: Path) -> None:
    relist(folder, window_size=32, chunk_shift=32, chunk_ms=320)
    assert "metadata window_size: got '16', wanted '32'" in bad(folder)[0][2]


@pytest.mark.parametrize("name", ["model.onnx", "model.int8.onnx"])
def test_another_number_of_weights(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    relist(folder, parameters=1_000_000)
    held = sum(math.prod(each.dims) for each in onnx.load(folder / name).graph.initializer)
    message = f"{name}: holds {held:,} numbers; kdsuite.json says parameters: 1,000,000"
    assert [detail for file, check, detail in bad(folder) if (file, check) == (name, "interface")] == [
        f"{folder}/{message}"
    ]
    monkeypatch.setattr("apps.speech.device.folder_check._MOST_BESIDE", 40)
    relist(folder, parameters=3)
    assert {check for _, check, _ in bad(folder)} == {"interface"}
    relist(folder, parameters=720)
    assert not bad(folder)


def tampered(folder: Path, name: str, value: np.ndarray) -> None:
    """Replace a constant of the network."""
    model = network()
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, name))
    onnx.save(model, folder / "model.onnx")
    relist(folder)


def test_answers_that_are_not_finite(folder: Path) -> None:
    tampered(folder, "rest", np.array(np.nan, np.float32))
    ((file, check, detail),) = bad(folder)
    assert (file, check) == ("model.onnx", "answers") and "not finite" in detail


def test_lengths_of_other_frames(folder: Path) -> None:
    tampered(folder, "four", np.array([8], np.int64))
    assert "encoded_lengths: got [2, 2, 2]" in bad(folder)[0][2]


def test_answers_that_are_no_probabilities(folder: Path) -> None:
    model = network()
    node = next(node for node in model.graph.node if node.op_type == "LogSoftmax")
    node.op_type = "Identity"
    del node.attribute[:]
    onnx.save(model, folder / "model.onnx")
    relist(folder)
    assert "does not sum to 1" in bad(folder)[0][2]


def test_a_model_that_hears_something_else(folder: Path) -> None:
    tampered(folder, "threshold", np.array([-3.0] * len(SYMBOLS) + [50.0], np.float32))
    ((file, check, detail),) = bad(folder)
    assert (file, check) == ("model.onnx", "self test")
    assert "hears '' in self_test.wav, heard 'yes no' at its export" in detail


def test_a_clip_that_is_none(folder: Path) -> None:
    (folder / "self_test.wav").write_bytes(b"RIFF")
    relist(folder)
    assert "self_test.wav: is no audio" in bad(folder)[0][2]
    soundfile.write(folder / "self_test.wav", np.zeros((8000, 2), np.float32), 8000)
    relist(folder)
    assert "self_test.wav: got 8000 Hz, 2 channels" in bad(folder)[0][2]
