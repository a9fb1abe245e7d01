"""Archives that try to get out of their folder, to fill the disk or to confuse, and honest ones that come out whole."""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_scripts.archive import extract, safe_name
from kdcore.config import UserError

Members = list[tuple[str, bytes]]


def write_zip(path: Path, members: Members) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return path


def write_tar(path: Path, members: Members) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


WRITERS = pytest.mark.parametrize("write", [write_zip, write_tar])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(archive: Path, match: str | None = None, **limits: int) -> None:
    before = sorted(archive.parent.rglob("*"))
    with pytest.raises(UserError, match=match) as caught:
        extract(archive, archive.parent / "out", **limits)
    assert str(archive) in str(caught.value)
    assert sorted(archive.parent.rglob("*")) == before  # nothing was left, inside or outside


SAFE = st.text(st.characters(categories=("Ll", "Nd"), exclude_characters="/\\"), min_size=1, max_size=8)


@WRITERS
@settings(max_examples=25, deadline=None)
@given(files=st.dictionaries(st.lists(SAFE, min_size=1, max_size=3).map("/".join), st.binary(max_size=300), max_size=6))
def test_honest_archives_come_out_whole(write: Callable[[Path, Members], Path], files: dict[str, bytes]) -> None:
    names = list(files)
    files = {n: files[n] for n in names if not any(other.startswith(f"{n}/") for other in names)}
    files = {n: d for n, d in files.items() if sum(n.casefold() == o.casefold() for o in files) == 1}
    with tempfile.TemporaryDirectory() as folder:
        archive = write(Path(folder) / "a", [("first.txt", b"x"), *((f"top/{n}", d) for n, d in files.items())])
        out = extract(archive, Path(folder) / "out")
        assert tree(out) == {"first.txt": b"x", **{f"top/{n}": d for n, d in files.items()}}


@WRITERS
@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(
        st.lists(st.sampled_from(["..", ".", "", "a", "A", "b", "C:", "\\", "..\\x", "é", "e\u0301"]), max_size=4).map(
            "/".join
        ),
        min_size=1,
        max_size=4,
    )
)
def test_no_name_leads_out(write: Callable[[Path, Members], Path], names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "inner"
        root.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zipfile warns of duplicate names
            archive = write(root / "a", [(name, b"data") for name in names])
        try:
            out = extract(archive, root / "out")
        except UserError:
            out = None
        assert sorted(os.listdir(folder)) == ["inner"]
        assert sorted(os.listdir(root)) == (["a", "out"] if out else ["a"])
        if out:
            assert not any(part in ("..", "") for name in names for part in name.rstrip("/").split("/")[:1])


@WRITERS
@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x", "a/../../x", "a/..", "C:/x", "c:x", "a\\b", "..\\x", "a\nb", "x" * 300, "\u202etxt"]
)
def test_dangerous_names(write: Callable[[Path, Members], Path], tmp_path: Path, name: str) -> None:
    assert_refused(write(tmp_path / "a", [("fine.txt", b"1"), (name, b"2")]), "member")


def test_a_name_with_a_nul_is_not_cut(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a", [("ratings_csv", b"1")])
    archive.write_bytes(archive.read_bytes().replace(b"ratings_csv", b"ratings\0csv"))
    assert_refused(archive, "control characters")


@pytest.mark.parametrize("name", ["", ".", "./", "//", "a/../b"])
def test_safe_name_refuses(name: str) -> None:
    with pytest.raises(ValueError):
        safe_name(name)


@WRITERS
@pytest.mark.parametrize(
    "names",
    [
        ("a.txt", "a.txt"),
        ("a.txt", "A.TXT"),
        ("a", "a/b"),
        ("a/b", "a"),
        ("A/x", "a/y"),
        ("é", "e\u0301"),
        ("a", "./a"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_colliding_names(write: Callable[[Path, Members], Path], tmp_path: Path, names: tuple[str, ...]) -> None:
    assert_refused(write(tmp_path / "a", [(name, b"data") for name in names]), "collides")


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.CONTTYPE]
)
def test_tar_links_and_devices(tmp_path: Path, kind: bytes) -> None:
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as opened:
        info = tarfile.TarInfo("x")
        info.type, info.linkname = kind, "/etc/passwd"
        opened.addfile(info)
    if kind == tarfile.CONTTYPE:  # an ordinary file under an old name
        assert tree(extract(archive, tmp_path / "out")) == {"x": b""}
    else:
        assert_refused(archive, "link, a device")


def test_zip_links(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("x")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as opened:
        opened.writestr(info, "/etc/passwd")
    assert_refused(tmp_path / "a.zip", "link or a device")


def test_an_encrypted_zip(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", [("x", b"data")])
    data = bytearray(archive.read_bytes())
    data[data.index(b"PK\x03\x04") + 6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(data)
    assert_refused(archive, "encrypted")


@WRITERS
def test_too_many_members(write: Callable[[Path, Members], Path], tmp_path: Path) -> None:
    archive = write(tmp_path / "a", [(f"{number}", b"") for number in range(11)])
    assert_refused(archive, "more than 10 members", max_files=10)
    assert len(tree(extract(archive, tmp_path / "out", max_files=11))) == 11


def write_gzip(path: Path, members: Members) -> Path:
    path.write_bytes(gzip.compress(b"".join(data for _, data in members)))
    return path


@pytest.mark.parametrize("write", [write_zip, write_tar, write_gzip])
def test_bombs(write: Callable[[Path, Members], Path], tmp_path: Path) -> None:
    archive = write(tmp_path / "a.gz", [("zeros", bytes(40_000_000))])
    assert archive.stat().st_size < 100_000
    assert_refused(archive, "unpacks to more than")  # by the ratio
    assert_refused(archive, "unpacks to more than 1000 bytes", max_bytes=1000)
    out = extract(archive, tmp_path / "out", max_ratio=2000)
    assert sum(path.stat().st_size for path in out.iterdir()) == 40_000_000


def test_a_bomb_that_lies_about_its_size(tmp_path: Path) -> None:
    size = 40_000_000
    archive = write_zip(tmp_path / "a.zip", [("zeros", bytes(size))])
    data = archive.read_bytes()
    lie = data.replace(size.to_bytes(4, "little"), (100).to_bytes(4, "little"))
    assert lie != data
    archive.write_bytes(lie)
    assert_refused(archive)


def test_members_that_are_not_wanted_count_all_the_same(tmp_path: Path) -> None:
    members = [("zeros", bytes(40_000_000)), ("x/ratings.csv", b"1,2")]
    kept = {"x/ratings.csv": b"1,2"}
    wanted = {"x/ratings.csv"}.__contains__
    assert tree(extract(write_zip(tmp_path / "a.zip", members), tmp_path / "zip", wanted=wanted)) == kept
    with pytest.raises(UserError, match="unpacks to more"):  # to pass over it, tar has to unpack it
        extract(write_tar(tmp_path / "a.tgz", members), tmp_path / "tar", wanted=wanted)
    small = write_tar(tmp_path / "b.tgz", [("y", bytes(1000)), members[1]])
    assert tree(extract(small, tmp_path / "tar", wanted=wanted)) == kept
    for write in (write_zip, write_tar):
        with pytest.raises(UserError, match="leads out"):
            extract(write(tmp_path / "c", [("../y", b""), members[1]]), tmp_path / "c-out", wanted=wanted)


def test_a_tar_header_that_fills_the_memory(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("x")
        info.pax_headers = {"comment": "c" * 8_000_000}
        archive.addfile(info)
    assert_refused(tmp_path / "a.tar.gz", "header is longer")


def test_kinds_of_archive(tmp_path: Path) -> None:
    (tmp_path / "data.json.gz").write_bytes(gzip.compress(b"{}"))
    assert tree(extract(tmp_path / "data.json.gz", tmp_path / "gz")) == {"data.json": b"{}"}
    with tarfile.open(tmp_path / "plain.tar", "w") as archive:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "x").write_bytes(b"1")
        archive.add(tmp_path / "folder", ".")  # as "tar -C folder -cf plain.tar ." does
    assert tree(extract(tmp_path / "plain.tar", tmp_path / "tar")) == {"x": b"1"}
    (tmp_path / "text").write_bytes(b"user,item\n")
    assert_refused(tmp_path / "text", "neither a zip")
    with pytest.raises(UserError, match="no such file"):
        extract(tmp_path / "none", tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        extract(tmp_path / "plain.tar", tmp_path / "tar")


def write_plain_tar(path: Path, members: Members) -> Path:
    path.write_bytes(gzip.decompress(write_tar(path, members).read_bytes()))
    return path


FRACTION = st.floats(0, 1, exclude_max=True)


@pytest.mark.parametrize("write", [write_zip, write_tar, write_plain_tar])
@settings(max_examples=80, deadline=None)
@given(changes=st.lists(st.tuples(FRACTION, st.integers(0, 255)), max_size=4), kept=FRACTION)
def test_damage_is_a_user_error(
    write: Callable[[Path, Members], Path], changes: list[tuple[float, int]], kept: float
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        archive = write(Path(folder) / "a", [("x/y", b"hello world" * 20), ("z", bytes(range(50)))])
        content = bytearray(archive.read_bytes())
        for where, value in changes:
            content[int(where * len(content))] = value
        archive.write_bytes(content[: len(content) - int(kept * kept * len(content))])
        try:
            extract(archive, Path(folder) / "out")
        except UserError:
            assert os.listdir(folder) == ["a"]
        assert set(os.listdir(folder)) <= {"a", "out"}
