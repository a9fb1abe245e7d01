from __future__ import annotations

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.speech.serve_cli import add_serve, run_serve
from apps.speech.server.origins import origin, permitted
from kdcore.command_line import Parser
from kdcore.config import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://example.org", "https://example.org"),
        ("HTTPS://Example.ORG:443", "https://example.org"),
        ("http://localhost:80", "http://localhost"),
        ("http://localhost:443", "http://localhost:443"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_origins_are_written_one_way(text: str, expected: str) -> None:
    assert origin(text) == origin(expected) == expected


NONE = (
    *("", "null", "*", "example.org", "ftp://example.org", "https://", "https://example.org/", "https://a?b"),
    *("https://a#b", "https://u@example.org", "https://a b", "https://[::1", "https://a:x", "https://a:99999"),
    *("https://exämple.org", "https://a\n", "https://a https://b"),
)


@pytest.mark.parametrize("text", NONE)
def test_what_is_no_origin(text: str) -> None:
    with pytest.raises(ValueError, match=r"got .*, wanted"):
        origin(text)
    assert not permitted([text], "example.org", ())
    parser = Parser(prog="kd speech")
    add_serve(parser.add_subparsers(dest="verb"))
    args: argparse.Namespace = parser.parse_args(["serve", "--model", "none", "--allow-origin", text])
    with pytest.raises(UserError, match=r"^--allow-origin: got .*, wanted one such as https://"):
        run_serve(args)


@given(st.text(max_size=30), st.text(max_size=30))
def test_noise_is_not_permitted(text: str, host: str) -> None:
    assert not permitted([text], host, {"https://example.org"}) or "://" in text


@pytest.mark.parametrize(
    ("origins", "host", "may"),
    [
        ([], "a:8000", True),
        (["http://a:8000"], "a:8000", True),
        (["http://a:8000"], "A:8000", True),
        # a proxy for TLS passes the host on
        (["https://a"], "a", True),
        (["https://a"], "a:443", True),
        (["http://a"], "a:8000", False),
        (["http://a:8000"], "a", False),
        (["http://a.b"], "b", False),
        (["http://a:8000", "http://a:8000"], "a:8000", True),
        (["http://a:8000", "https://evil"], "a:8000", False),
        (["http://a:8000"], "", False),
        (["http://a:8000"], "x@a:8000", False),
        (["https://friend"], "a", True),
        (["http://friend"], "a", False),
    ],
)
def test_who_may_connect(origins: list[str], host: str, may: bool) -> None:
    assert permitted(origins, host, {"https://friend"}) is may
