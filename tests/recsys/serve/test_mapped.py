"""Files read in place: what is written is found, and a file that lies about itself is refused by name."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from apps.recsys.serve import mapped
from apps.recsys.serve.mapped import IdMap, Texts, map_safetensors, verify_files
from kdcore.config import UserError

IDS = st.lists(
    st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.integers(-(2**63), 2**63 - 1)), max_size=40
)


def quiet(text: str) -> None:
    """Announce nothing."""


@given(IDS.map(lambda ids: list({str(each): each for each in ids}.values())), st.text())
@settings(deadline=None)
def test_every_id_is_found_as_text_and_as_number_and_no_other(ids, stranger):
    ids = [each for each in ids if not _surrogates(str(each))]
    arrays = IdMap.pack(ids)
    found = IdMap(arrays["hashes"], arrays["rows"], Texts(arrays["offsets"], arrays["data"]))
    assert [found.get(each) for each in ids] == list(range(len(ids)))
    assert [found.get(str(each)) for each in ids] == list(range(len(ids)))
    if not _surrogates(stranger):
        known = {str(each) for each in ids}
        assert (found.get(stranger) is not None) == (stranger in known)


def _surrogates(text: str) -> bool:
    return any("\ud800" <= sign <= "\udfff" for sign in text)


def test_two_ids_with_one_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr(mapped, "digest", lambda text: 7)
    arrays = IdMap.pack(["a", "b", "c"])
    found = IdMap(arrays["hashes"], arrays["rows"], Texts(arrays["offsets"], arrays["data"]))
    assert [found.get(each) for each in ("a", "b", "c", "d")] == [0, 1, 2, None]


def test_a_map_is_what_the_library_reads(tmp_path):
    generator = np.random.default_rng(0)
    tensors = {
        "f": generator.standard_normal((7, 3)).astype(np.float32),
        "i": generator.integers(0, 9, 5).astype(np.int32),
        "l": generator.integers(0, 9, 4),
        "u": generator.integers(0, 9, 4).astype(np.uint64),
        "b": np.frombuffer(b"text", np.uint8),
        "nothing": np.empty((0, 4), np.float32),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    wanted, got = load_file(tmp_path / "x.safetensors"), map_safetensors(tmp_path / "x.safetensors")
    assert set(wanted) == set(got)
    for name in wanted:
        np.testing.assert_array_equal(got[name], wanted[name])
        assert got[name].dtype == wanted[name].dtype
    with pytest.raises(ValueError, match="read-only"):
        got["f"][0, 0] = 1.0


def test_every_truncation_is_refused_by_name(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.arange(12, dtype=np.float32), "b": np.arange(3, dtype=np.int64)}, path)
    whole = path.read_bytes()
    for length in [*range(0, 12), *range(12, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"x\.safetensors: not a safetensors file"):
            map_safetensors(path)
    path.unlink()
    with pytest.raises(UserError, match=r"x\.safetensors: is missing"):
        map_safetensors(path)


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_garbage_is_refused_and_nothing_else_happens(data):
    path = Path(tempfile.gettempdir()) / f"kd-garbage-{os.getpid()}.safetensors"
    try:
        for content in (data, len(data).to_bytes(8, "little") + data):
            path.write_bytes(content)
            try:
                map_safetensors(path)
            except UserError as error:
                assert path.name in str(error)
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "about",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 17]},
        {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
        {"dtype": "F32", "shape": [-1, 4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 16]},
        {"dtype": "OBJ", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": ["4"], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": None},
        {"dtype": "F32"},
        "text",
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, about):
    header = json.dumps({"a": about}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(UserError, match="not a safetensors file"):
        map_safetensors(path)


def folder_of(tmp_path: Path) -> tuple[Path, dict]:
    import hashlib

    (tmp_path / "a.bin").write_bytes(b"first")
    (tmp_path / "b.bin").write_bytes(b"second")
    files = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in (("a.bin", b"first"), ("b.bin", b"second"))
    }
    return tmp_path, files


def test_a_content_is_hashed_once(tmp_path, monkeypatch):
    folder, files = folder_of(tmp_path)
    said: list[str] = []
    verify_files(folder, files, folder / "stamp.json", said.append)
    verify_files(folder, files, folder / "stamp.json", said.append)
    assert len(said) == 1
    os.utime(folder / "a.bin", ns=(1, 1))
    verify_files(folder, files, folder / "stamp.json", said.append)
    assert len(said) == 2


def test_a_missing_truncated_or_foreign_file_is_refused_by_name(tmp_path):
    folder, files = folder_of(tmp_path)
    stamp = folder / "stamp.json"
    verify_files(folder, files, stamp, quiet)
    (folder / "b.bin").write_bytes(b"secOnd")
    with pytest.raises(UserError, match=r"b\.bin: is not the file"):
        verify_files(folder, files, stamp, quiet)
    (folder / "b.bin").write_bytes(b"sec")
    with pytest.raises(UserError, match=r"b\.bin: has 3 bytes, wanted 6"):
        verify_files(folder, files, stamp, quiet)
    (folder / "b.bin").unlink()
    with pytest.raises(UserError, match=r"b\.bin: is missing"):
        verify_files(folder, files, stamp, quiet)
    with pytest.raises(UserError, match="outside its folder"):
        verify_files(folder, {"../b.bin": {"bytes": 1}}, stamp, quiet)


def test_a_damaged_stamp_costs_another_look(tmp_path):
    folder, files = folder_of(tmp_path)
    (folder / "stamp.json").write_text("[", encoding="utf-8")
    verify_files(folder, files, folder / "stamp.json", quiet)
    assert json.loads((folder / "stamp.json").read_text(encoding="utf-8"))["sha256"]
