from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.speech.server.multipart import FormError, FormReader, Part, boundary_of

BOUNDARY = b"xYz"


def form(parts: list[tuple[str, str | None, bytes]], *, preamble: bytes = b"", end: bytes = b"--\r\n") -> bytes:
    data = preamble
    for name, filename, content in parts:
        file = f'; filename="{filename}"' if filename is not None else ""
        head = f'Content-Disposition: form-data; name="{name}"{file}\r\nContent-Type: a/b'
        data += b"--" + BOUNDARY + b"\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n"
    return data + b"--" + BOUNDARY + end


def read(data: bytes, size: int) -> tuple[list[tuple[str, str | None, bytes]], bool]:
    reader = FormReader(BOUNDARY)
    found: list[tuple[str, str | None, bytes]] = []
    for at in range(0, len(data), size):
        for each in reader.feed(data[at : at + size]):
            if isinstance(each, Part):
                found.append((each.name, each.filename, b""))
            else:
                name, filename, content = found[-1]
                found[-1] = (name, filename, content + each)
    return found, reader.finished


# contents full of what looks like a boundary
pieces = st.sampled_from([b"\r\n", b"--", b"xYz", b"\r\n--xY", b"\r", b"a", b"\0"])
contents = st.lists(pieces, max_size=8).map(b"".join).filter(lambda each: b"\r\n--xYz" not in b"\r\n" + each)
names = st.text(st.sampled_from("abcé[] "), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(names, st.none() | names, contents), min_size=1, max_size=4),
    st.integers(1, 40),
    st.sampled_from([b"", b"preamble\r\n"]),
)
def test_parts_do_not_depend_on_the_cuts(
    parts: list[tuple[str, str | None, bytes]], size: int, preamble: bytes
) -> None:
    assert read(form(parts, preamble=preamble), size) == (parts, True)


def test_a_form_that_is_cut_is_not_finished() -> None:
    data = form([("file", "a.wav", b"abc" * 30)])
    for cut in range(1, len(data) - 4):
        assert not read(data[:cut], 7)[1]


@given(st.binary(max_size=300))
def test_noise_is_refused_or_never_finished(data: bytes) -> None:
    try:
        found, finished = read(b"--xYz" + data, 11)
    except FormError:
        return
    assert not found and (not finished or data.startswith(b"--"))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"--xYz??", "boundary"),
        (b"--xYz\r\nContent-Type: a/b\r\n\r\n", "no name"),
        (b"--xYz\r\nContent-Disposition: form-data\r\n\r\n", "no name"),
        (b"--xYz\r\n" + b"A: b\r\n" * 2000, "headers"),
    ],
)
def test_what_is_no_form(data: bytes, what: str) -> None:
    with pytest.raises(FormError, match=what):
        read(data, 100)


def test_boundaries() -> None:
    assert boundary_of('multipart/form-data; boundary="a b"') == b"a b"
    assert boundary_of("multipart/form-data; charset=x; Boundary=abc") == b"abc"
    for bad in ("multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "a" * 71):
        with pytest.raises(FormError, match="boundary"):
            boundary_of(bad)
