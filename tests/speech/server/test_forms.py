from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from apps.speech.server.forms import Form, read_form
from apps.speech.server.settings import ServeSettings, ServiceError

BOUNDARY = "xYz"
FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def form(parts: list[tuple[str, str | None, bytes]], end: bytes = b"--\r\n") -> bytes:
    data = b""
    for name, filename, content in parts:
        file = f'; filename="{filename}"' if filename is not None else ""
        head = f'Content-Disposition: form-data; name="{name}"{file}\r\nContent-Type: a/b'
        data += f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode() + content + b"\r\n"
    return data + f"--{BOUNDARY}".encode() + end


def read(
    path: Path,
    data: bytes,
    size: int = 1000,
    kind: str = f"multipart/form-data; boundary={BOUNDARY}",
    headers: dict[str, str] | None = None,
    **options: Any,
) -> Form:
    """Read a form that arrives in pieces of ``size`` bytes."""
    cuts = [data[at : at + size] for at in range(0, len(data), size)]
    messages = [{"type": "http.request", "body": each, "more_body": True} for each in cuts]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    coming = iter(messages)

    async def receive() -> Any:
        return next(coming)

    head = [(b"content-type", kind.encode("latin-1"))]
    head += [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    request = Request({"type": "http", "method": "POST", "headers": head}, receive)
    return asyncio.run(read_form(request, path / "file", ServeSettings(**options)))


# contents full of what looks like a boundary
pieces = st.sampled_from([b"\r\n", b"--", b"xYz", b"\r\n--xY", b"\r", b"a", b"\0"])
contents = st.lists(pieces, max_size=8).map(b"".join).filter(lambda each: b"\r\n--xYz" not in b"\r\n" + each)
names = st.text(st.sampled_from("abcé[] "), min_size=1, max_size=5)


@FEW
@given(st.lists(st.tuples(names, contents), max_size=3), st.none() | st.tuples(names, contents), st.integers(1, 40))
def test_parts_do_not_depend_on_the_cuts(
    tmp_path: Path, fields: list[tuple[str, bytes]], file: tuple[str, bytes] | None, size: int
) -> None:
    parts = [(name, None, content) for name, content in fields]
    found = read(tmp_path, form([*parts, *([("file", *file)] if file else [])]), size)
    expected: dict[str, list[str]] = {}
    for name, content in fields:
        expected.setdefault(name, []).append(content.decode())
    assert found.fields == expected
    assert found.filename == (file[0] if file else None)
    assert found.path.read_bytes() == (file[1] if file else b"")


def test_a_form_that_is_cut_is_refused(tmp_path: Path) -> None:
    data = form([("model", None, b"m"), ("file", "a.wav", b"abc" * 30)])
    for cut in range(len(data) - 4):
        with pytest.raises(ServiceError, match=r"cut off|damaged") as caught:
            read(tmp_path, data[:cut], 7)
        assert (caught.value.status, caught.value.code) == (400, "bad_form")
        assert caught.value.headers == {"connection": "close"}


@FEW
@given(st.binary(max_size=300), st.booleans())
def test_noise_is_refused(tmp_path: Path, data: bytes, inside: bool) -> None:
    with pytest.raises(ServiceError) as caught:
        read(tmp_path, (b"--xYz\r\n" if inside else b"") + data, 11)
    assert caught.value.status in (400, 422)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"--xYz??", "damaged"),
        (b"--xYz\r\nContent-Type: a/b\r\n\r\n", "no name"),
        (b"--xYz\r\nContent-Disposition: form-data\r\n\r\n", "no name"),
        (b'--xYz\r\nContent-Disposition: attachment; name="a"\r\n\r\n', "no name"),
        (b"--xYz\r\n" + b"A: b\r\n" * 2000, "damaged"),
        (b"--xYz\r\nA: " + b"b" * 100_000, "damaged"),
        (form([("a", None, b"x" * 20_000)]), "more than 16384 bytes"),
        (form([("a", None, b"x")] * 65), "more than 64 fields"),
    ],
)
def test_what_is_no_form(tmp_path: Path, data: bytes, what: str) -> None:
    with pytest.raises(ServiceError, match=what) as caught:
        read(tmp_path, data)
    assert (caught.value.status, caught.value.code) == (400, "bad_form")


def test_boundaries(tmp_path: Path) -> None:
    data = form([("a", None, b"1")])
    for kind in (
        'Multipart/Form-Data; boundary="xYz"',
        "multipart/form-data; charset=x; Boundary=xYz",
    ):
        assert read(tmp_path, data, kind=kind).fields == {"a": ["1"]}
    for bad in ("multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "a" * 300):
        with pytest.raises(ServiceError, match=r"boundary|Boundary"):
            read(tmp_path, data, kind=bad)
    with pytest.raises(ServiceError) as caught:
        read(tmp_path, data, kind="application/json")
    assert caught.value.status == 415


def test_limits_hold_with_and_without_a_length(tmp_path: Path) -> None:
    data = form([("file", "a", bytes(4000))])
    for headers in ({"content-length": str(len(data))}, {"content-length": "1"}, {}):
        with pytest.raises(ServiceError) as caught:
            read(tmp_path, data, 100, headers=headers, max_upload=2000)
        assert (caught.value.status, caught.value.code) == (413, "too_large")
        path = tmp_path / "file"
        assert not path.exists() or path.stat().st_size <= 2000


@pytest.mark.parametrize(("size", "in_time"), [(1, False), (100, True)])
def test_a_form_may_take_as_long_as_its_size_lets_it(tmp_path: Path, size: int, in_time: bool) -> None:
    data = form([("file", "a", bytes(1000))])
    coming = iter([data[at : at + size] for at in range(0, len(data), size)])

    async def receive() -> Any:
        await asyncio.sleep(0.03)
        part = next(coming, b"")
        return {"type": "http.request", "body": part, "more_body": bool(part)}

    head = [(b"content-type", f"multipart/form-data; boundary={BOUNDARY}".encode())]
    request = Request({"type": "http", "method": "POST", "headers": head}, receive)
    reading = read_form(request, tmp_path / "file", ServeSettings(receive_seconds=0.2))
    if in_time:
        assert asyncio.run(reading).filename == "a"
        return
    with pytest.raises(ServiceError, match=r"^the form did not arrive: \d+ bytes in [\d.]+ s$") as caught:
        asyncio.run(reading)
    assert (caught.value.status, caught.value.code) == (408, "timeout")


@pytest.mark.parametrize(
    ("disposition", "filename"),
    [
        (b"filename*=UTF-8''na%C3%AFve%20talk.wav", "naïve talk.wav"),
        (b"filename*=utf-8'en'a.wav", "a.wav"),
        (b"FileName*=\"UTF-8''a%3B.wav\"", "a;.wav"),
        (b"filename*=ISO-8859-1''%E9.wav", "é.wav"),
        (b"filename*=UTF-8''%FF%E9.wav", "\ufffd\ufffd.wav"),
        (b"filename*=UTF-8''b.wav; filename=a.wav", "a.wav"),
        (b"filename=\"a; filename*=UTF-8''b.wav\"", "a; filename*=UTF-8''b.wav"),
        (b"filename*=utf-7''a.wav", None),
        (b"filename*=a.wav", None),
        (b"filename*", None),
    ],
)
def test_names_of_files(tmp_path: Path, disposition: bytes, filename: str | None) -> None:
    data = b"--xYz\r\nContent-Disposition: form-data; name=file; " + disposition + b"\r\n\r\nabc\r\n--xYz--\r\n"
    if filename is None:
        with pytest.raises(ServiceError, match="is no file"):
            read(tmp_path, data)
        return
    found = read(tmp_path, data)
    assert (found.filename, found.path.read_bytes()) == (filename, b"abc")


def test_a_file_is_written_as_it_comes(tmp_path: Path) -> None:
    """What has arrived is no longer in memory when the next piece is asked for."""
    data = form([("file", "a", bytes(1 << 20))])
    sizes = []

    async def receive() -> Any:
        at = len(sizes) << 16
        sizes.append((tmp_path / "file").stat().st_size)
        return {"type": "http.request", "body": data[at : at + (1 << 16)], "more_body": at + (1 << 16) < len(data)}

    head = [(b"content-type", f"multipart/form-data; boundary={BOUNDARY}".encode())]
    request = Request({"type": "http", "method": "POST", "headers": head}, receive)
    asyncio.run(read_form(request, tmp_path / "file", ServeSettings()))
    assert all(size > (place - 2) << 16 for place, size in enumerate(sizes))
    assert (tmp_path / "file").stat().st_size == 1 << 20
